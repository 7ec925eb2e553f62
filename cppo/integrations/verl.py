"""Our objectives as policy losses of verl 0.9.1, `cppo_bench_<objective>` in its registry.

    actor_rollout_ref.model.external_lib=cppo.integrations.verl                      # registers them in every worker
    actor_rollout_ref.actor.policy_loss._target_=cppo.integrations.verl.PolicyLoss   # the parameters below, checked
    actor_rollout_ref.actor.policy_loss.loss_mode=cppo_bench_cppo
    +actor_rollout_ref.actor.policy_loss.params={delta:0.15,delta_b:0.02}
    +actor_rollout_ref.actor.policy_loss.divergence={estimator:binary,kind:tv}
    +actor_rollout_ref.actor.policy_loss.rollout_correction=${algorithm.rollout_correction}
    algorithm.rollout_correction.bypass_mode=True                                    # the anchor is the rollout policy

verl's stock configuration class refuses keys that it does not know; `PolicyLoss` adds ours. verl builds it before it
starts Ray, so a wrong parameter ends the launch there (and again in each worker), with our line in hydra's error.

Left out are dual clip, `clip_ratio*`, `tau_*` and other keys of verl's own losses, because an objective reads `params` only.
Importance weights and rejection from `rollout_correction` are refused. verl adds its own entropy and KL terms after ours.
"""

import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, cast

from torch import Tensor
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, register_policy_loss
from verl.workers.config import PolicyLossConfig

from cppo.integrations import SampledTokenLoss
from cppo.integrations.verl_launch import keep_weights
from cppo.loss import Aggregation, check_aggregation
from cppo.objectives import names
from cppo.rewards import Judge

PREFIX = "cppo_bench_"


@dataclass
class PolicyLoss(PolicyLossConfig):  # type: ignore[misc]
    """verl's `actor.policy_loss` with the parameters of one of our objectives. Raises ValueError for any that do not fit."""

    params: dict[str, Any] = field(default_factory=dict)
    """Hyper-parameters of the objective that `loss_mode` names: `cppo_bench_<name>` or `cppo_bench_<module>:<function>`."""
    divergence: dict[str, Any] | None = None
    """{estimator: binary, kind: tv or kl}: required by objectives that need a divergence, only logged for others."""

    def __post_init__(self) -> None:
        if not self.loss_mode.startswith(PREFIX):
            raise ValueError(
                f"policy_loss.loss_mode: {self.loss_mode} is not one of {', '.join(map(loss_mode, names()))}"
            )
        correction = self.rollout_correction
        if correction.get("bypass_mode") is not True:
            raise ValueError(
                "algorithm.rollout_correction.bypass_mode: must be True, or ratios refer to a recomputed policy; pass "
                "+actor_rollout_ref.actor.policy_loss.rollout_correction=${algorithm.rollout_correction} with it"
            )
        for key in ("rollout_is", "rollout_rs"):
            if correction.get(key) is not None:
                raise ValueError(
                    f"algorithm.rollout_correction.{key}: must be null, the ratio already refers to the rollout"
                )
        self.rule = SampledTokenLoss.of(self.loss_mode.removeprefix(PREFIX), self.params, self.divergence)
        register(self.loss_mode)  # makes an objective of the user's own known to verl


def loss_mode(objective: str) -> str:
    """verl's name of an objective."""
    return PREFIX + objective


def compute_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    *,
    mode: str,
) -> tuple[Tensor, dict[str, float]]:
    """(loss, metrics): one micro-batch's part of the mini-batch loss, in verl's signature. All tensors are [B, T].

    loss_agg_mode: verl's five modes are ours. Their denominators are verl's global ones where it gives them: token-mean
        divides by the mini-batch's trained tokens, and the seq modes divide by its rows (verl counts empty ones, we would
        not). -norm also divides by `actor.loss_scale_factor`, which must be set, because verl's default is the width of the
        micro-batch. The loss is multiplied by dp_size, because verl averages gradients over the data-parallel ranks.

    The metrics are named actor/cppo_bench/NAME. Each is given as sum / count of the micro-batch, as _sum and as _count. verl
    averages all three over micro-batches and ranks; the ratio of the last two is exact.

    Raises ValueError when verl is not configured as this module's docstring says.
    """
    configured = config.policy_loss
    if not isinstance(configured, PolicyLoss) or configured.loss_mode != mode:
        raise ValueError(f"policy_loss._target_: {mode} needs {__name__}.PolicyLoss with loss_mode={mode}")
    if rollout_is_weights is not None:
        raise ValueError(
            f"rollout_is_weights: {mode} takes its ratio to the rollout; set rollout_correction.bypass_mode=True"
        )
    aggregation = cast(Aggregation, loss_agg_mode)
    horizon = config.loss_scale_factor if aggregation == "seq-mean-token-sum-norm" else None
    check_aggregation(aggregation, horizon)
    whole = config.global_batch_info
    ranks = whole.get("dp_size") or 1
    count = whole.get("global_batch_size" if aggregation.startswith("seq-") else "batch_num_tokens")
    if count is None and ranks > 1 and aggregation != "token-sum":
        raise ValueError(f"global_batch_info: {loss_agg_mode} on {ranks} ranks needs the global batch's counts")
    loss, metrics = configured.rule(
        log_prob,
        old_log_prob,  # in bypass mode: the rollout's log-probabilities
        advantages,
        response_mask.bool(),
        aggregation,
        horizon,
        count or None,  # a mini-batch without any trained token has loss 0
    )
    shown: dict[str, float] = {}
    for name, (total, number) in metrics.items():
        shown[f"actor/cppo_bench/{name}"] = total / max(number, 1)
        shown[f"actor/cppo_bench/{name}_sum"], shown[f"actor/cppo_bench/{name}_count"] = total, number
    return loss * ranks, shown


_judge, _judging = Judge(), Lock()
"""One judge per process of verl. verl asks from several threads, and a judge answers one question at a time."""


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **_: Any
) -> dict[str, float]:
    """The verdict on a response, as verl's `custom_reward_function`.

    verl has no third value: a response without a verdict scores 0, and a warning is logged.
    """
    with _judging:
        verdict = _judge.verdict(solution_str, ground_truth)
    if verdict is None:
        logging.getLogger(__name__).warning(
            "could not judge a response to %s", (extra_info or {}).get("id", data_source)
        )
    return {"score": verdict or 0.0, "acc": verdict or 0.0, "unjudged": float(verdict is None)}


class KeepWeights(CheckpointCallback):  # type: ignore[misc]
    """verl's `checkpoint_callback_class` for runs of trainer verl: see `verl_launch.keep_weights`."""

    def on_save(self, trainer: Any, global_step: int, checkpoint_dir: str, **_: Any) -> None:
        """Called on the driver after each checkpoint."""
        keep_weights(Path(checkpoint_dir).parents[1])


def register(mode: str) -> None:
    """Make `mode` a policy loss of verl. A second call with the same mode does nothing."""
    if mode not in POLICY_LOSS_REGISTRY:
        register_policy_loss(mode)(partial(compute_policy_loss, mode=mode))


for _name in names():
    register(loss_mode(_name))
