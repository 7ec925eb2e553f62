"""The policy losses that the installed verl calls give the stored numbers: those of every rule's `SampledTokenLoss`.

Skipped where verl is not installed: it needs an environment of its own (`make venv-verl`, `make test-verl`).
"""

import golden
import pytest
from torch import Tensor

from cppo.loss import Aggregation
from cppo.objectives import Tokens, names

pytest.importorskip("verl", reason="verl is not installed; it has an environment of its own: make test-verl")
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import FSDPActorConfig

from cppo.integrations.verl import PolicyLoss, loss_mode


def verl_loss(name: str, logp: Tensor, batch: Tokens, aggregation: Aggregation, horizon: int | None) -> Tensor:
    """The loss as verl gets it: by name, with its own configuration classes."""
    configured = PolicyLoss(
        loss_mode=loss_mode(name),
        params=golden.WIDER.get(name, {}),
        divergence={"estimator": "binary", "kind": "tv"} if golden.sampled_rule(name).kind else None,
        rollout_correction={"bypass_mode": True},
    )
    actor = FSDPActorConfig(
        policy_loss=configured, rollout_n=2, ppo_micro_batch_size_per_gpu=1, loss_scale_factor=horizon
    )
    loss, _ = get_policy_loss_fn(loss_mode(name))(
        old_log_prob=batch.rollout_logp,
        log_prob=logp,
        advantages=batch.advantages,
        response_mask=batch.mask,
        loss_agg_mode=aggregation,
        config=actor,
        rollout_is_weights=None,
    )
    assert isinstance(loss, Tensor)
    return loss


@pytest.mark.parametrize("name", names())
def test_numbers_are_the_stored_ones(name: str) -> None:
    moved = golden.differences(golden.integration_trace(name, verl_loss), golden.stored("integrations")["traces"][name])
    assert not moved, f"{len(moved)} numbers moved, the first: {moved[0]}: {golden.REMEDY}"
