"""Our objectives as policy losses of the installed verl, reached the way verl reaches them: by name, with its configuration.

Skipped where verl is not installed: it needs an environment of its own (`make venv-verl`, `make test-verl`).
"""

import importlib
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fixture import AGGREGATIONS, HORIZON, random_tokens, rows
from torch import Tensor

from cppo import divergences
from cppo.integrations import SampledTokenLoss
from cppo.loss import Aggregation, policy_loss
from cppo.objectives import Tokens, names, objective

pytest.importorskip("verl", reason="verl is not installed; it has an environment of its own: make test-verl")
from hydra import compose, initialize_config_module
from hydra.errors import InstantiationException
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, get_policy_loss_fn
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.workers.config import FSDPActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from cppo.integrations.verl import PolicyLoss

ROOT = Path(__file__).resolve().parent.parent
BINARY = {"estimator": "binary", "kind": "tv"}
BYPASS = {"bypass_mode": True}
# Parameters under which something is masked on the batches here.
TIGHT: dict[str, dict[str, Any]] = {
    "cppo": {"delta": 0.06, "delta_b": 0.02},
    "dppo": {"delta": 0.03},
    "trm": {"delta_max": 0.3},
    "gspo": {"clip_low": 0.1, "clip_high": 0.1},
}


def batch(seed: int = 5) -> Tokens:
    """Ragged, with holes and an empty row; the divergence is the binary TV of its log-probabilities, as verl has it."""
    tokens = random_tokens(seed, batch=8, width=10)
    tokens.mask[3] = False
    divergence = divergences.binary(tokens.logp, tokens.rollout_logp, "tv")
    return replace(tokens, divergence=divergence, position=None)


def actor(loss: Any, **changes: Any) -> Any:
    """verl's actor configuration with this `policy_loss`."""
    return FSDPActorConfig(policy_loss=loss, rollout_n=2, ppo_micro_batch_size_per_gpu=1, **changes)


def ours(name: str, divergence: dict[str, Any] | None = None, **params: Any) -> Any:
    if divergence is None and "divergence" in objective(name).needs:
        divergence = BINARY
    return PolicyLoss(loss_mode=f"cppo_bench_{name}", params=params, divergence=divergence, rollout_correction=BYPASS)


def called(
    mode: str, config: Any, tokens: Tokens, aggregation: str = "token-mean"
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(loss, d loss / d logp, metrics) of the registered loss `mode`."""
    logp = tokens.logp.clone().requires_grad_()
    loss, metrics = get_policy_loss_fn(mode)(
        old_log_prob=tokens.rollout_logp,
        log_prob=logp,
        advantages=tokens.advantages,
        response_mask=tokens.mask,
        loss_agg_mode=aggregation,
        config=config,
        rollout_is_weights=None,
    )
    (gradient,) = torch.autograd.grad(loss, logp)
    return loss.detach(), gradient, metrics


def by_hand(
    name: str, tokens: Tokens, aggregation: Aggregation = "token-mean", count: float | None = None, **params: Any
) -> tuple[Tensor, Tensor]:
    logp = tokens.logp.clone().requires_grad_()
    horizon = HORIZON if aggregation == "seq-mean-token-sum-norm" else None
    loss, _ = policy_loss(objective(name, **params), replace(tokens, logp=logp), aggregation, horizon, count)
    (gradient,) = torch.autograd.grad(loss, logp)
    return loss.detach(), gradient


def exact(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_every_objective_is_registered_and_no_name_of_verls_is_taken() -> None:
    assert {f"cppo_bench_{name}" for name in names()} <= set(POLICY_LOSS_REGISTRY)
    for own in ("vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "geo_mean", "cispo", "bypass_mode"):
        assert POLICY_LOSS_REGISTRY[own].__module__ == "verl.trainer.ppo.core_algos"


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("name", names())
def test_called_by_name_equals_ours(name: str, mode: Aggregation) -> None:
    params = TIGHT.get(name, {})
    tokens = batch()
    config = actor(ours(name, **params), loss_scale_factor=HORIZON)
    loss, gradient, metrics = called(f"cppo_bench_{name}", config, tokens, mode)
    expected_loss, expected_gradient = by_hand(name, tokens, mode, **params)
    exact(loss, expected_loss)
    exact(gradient, expected_gradient)
    assert gradient.abs().max() > 0 and not gradient[~tokens.mask].any()
    if name in ("cppo", "dppo", "trm", "gspo", "grpo", "ppo", "gmpo"):
        assert 0 < metrics["actor/cppo_bench/mask_share"] < 1
        assert gradient[tokens.mask & (tokens.advantages != 0)].eq(0).any()


OWN: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], str, bool]] = {
    # case: our rule, its parameters, verl's loss, verl's settings, aggregation, whether the loss values agree too
    "ppo": (
        "ppo",
        {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 1.5},
        "vanilla",
        {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 1.5},
        "token-mean",
        False,
    ),
    "grpo": (
        "grpo",
        {"dual_clip": 3.0},
        "vanilla",
        {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28},
        "seq-mean-token-sum",
        False,
    ),
    "dppo, tv": (
        "dppo",
        {"delta": 0.03, "cap": 1.2},
        "dppo_tv",
        {"clip_ratio_low": 0.03, "clip_ratio_high": 0.03, "clip_ratio_c": 1.2},
        "seq-mean-token-sum-norm",
        True,
    ),
    "dppo, kl": (
        "dppo",
        {"delta": 0.005, "cap": 20.0},
        "dppo_kl",
        {"clip_ratio_low": 0.005, "clip_ratio_high": 0.005, "clip_ratio_c": 20.0},
        "token-mean",
        True,
    ),
    "cispo": (
        "cispo",
        {"clip_low": 0.1, "clip_high": 0.2},
        "cispo",
        {"clip_ratio_low": 0.1, "clip_ratio_high": 0.2},
        "token-mean",
        True,
    ),
    "gspo": (
        "gspo",
        {"clip_low": 0.05, "clip_high": 0.05},
        "gspo",
        {"clip_ratio_low": 0.05, "clip_ratio_high": 0.05},
        "seq-mean-token-mean",
        False,
    ),
    "sapo": (
        "sapo",
        {"tau_pos": 1.5, "tau_neg": 2.0},
        "sapo",
        {"tau_pos": 1.5, "tau_neg": 2.0},
        "seq-mean-token-mean",
        True,
    ),
    "gmpo": (
        "gmpo",
        {"clip_low": 0.3, "clip_high": 0.4},
        "geo_mean",
        {"clip_ratio_low": 0.3, "clip_ratio_high": 0.4},
        "seq-mean-token-mean",
        False,
    ),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", OWN)
def test_gradient_equals_verls_own(case: str, seed: int) -> None:
    """verl's GMPO averages over all rows of the micro-batch; ours gets that count."""
    name, params, verl_name, verl_settings, aggregation, same_loss = OWN[case]
    tokens = batch(seed)
    if name == "gmpo":  # verl's takes one advantage a row
        tokens = replace(tokens, advantages=tokens.advantages[:, :1].expand_as(tokens.mask))
    kind = {"estimator": "binary", "kind": case[-2:]} if name == "dppo" else None
    config = actor(ours(name, kind, **params), loss_scale_factor=HORIZON)
    if name == "gmpo":
        config.global_batch_info.update(global_batch_size=len(tokens.mask))
    loss, gradient, metrics = called(f"cppo_bench_{name}", config, tokens, aggregation)
    own = actor(PolicyLossConfig(loss_mode=verl_name), **verl_settings)
    own.global_batch_info.update(loss_scale_factor=HORIZON)  # as verl's ppo_loss does
    expected_loss, expected_gradient, _ = called(verl_name, own, tokens, aggregation)
    tolerance = 1e-6 if case == "gmpo" else 1e-7  # verl adds 1e-8 to lengths
    torch.testing.assert_close(gradient, expected_gradient, atol=tolerance, rtol=tolerance)
    if same_loss:
        torch.testing.assert_close(loss, expected_loss, atol=tolerance, rtol=tolerance)
    if name not in ("cispo", "sapo"):
        assert 0 < metrics["actor/cppo_bench/mask_share"] < 1
    if "cap" in params and params["cap"] < 2:
        assert (tokens.logp - tokens.rollout_logp).exp()[tokens.mask].max() > params["cap"]


def test_pg_equals_verls_reinforce() -> None:
    """verl's bypass mode with token-level truncated weights, loss and gradient."""
    correction = {**BYPASS, "loss_type": "reinforce", "rollout_is": "token", "rollout_is_threshold": 1.3}
    own = actor(PolicyLossConfig(loss_mode="bypass_mode", rollout_correction=correction))
    tokens = batch()
    expected_loss, expected_gradient, _ = called("bypass_mode", own, tokens)
    loss, gradient, _ = called("cppo_bench_pg", actor(ours("pg", cap=1.3)), tokens)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(loss, expected_loss, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_micro_batches_and_ranks_add_up_to_the_mini_batch(mode: Aggregation) -> None:
    """verl's ppo_loss on nested data: 2 ranks x 2 micro-batches, losses averaged over ranks and summed over micro-batches."""
    tokens = batch()
    config = actor(ours("cppo", **TIGHT["cppo"]), loss_agg_mode=mode, loss_scale_factor=HORIZON)
    count = {"batch_num_tokens": int(tokens.mask.sum()), "global_batch_size": len(tokens.mask), "dp_size": 2}
    total, gradient = 0.0, torch.zeros_like(tokens.logp)
    sums = {"mask_share": [0.0, 0.0], "divergence": [0.0, 0.0]}
    for part in ([0, 1], [2, 3], [4, 5], [6, 7]):
        here = rows(tokens, part)
        logp = here.logp.clone().requires_grad_()
        loss, metrics = ppo_loss(config, {"log_probs": shifted(logp)}, nested(here, count))
        total += loss.item() / 2
        gradient[part] = torch.autograd.grad(loss, logp)[0] / 2
        for name, pair in sums.items():
            pair[0] += metrics[f"actor/cppo_bench/{name}_sum"].aggregate()
            pair[1] += metrics[f"actor/cppo_bench/{name}_count"].aggregate()
        assert metrics["actor/pg_loss"].aggregate() == pytest.approx(loss.item())
    whole = float(len(tokens.mask)) if mode.startswith("seq") else None
    expected_loss, expected_gradient = by_hand("cppo", tokens, mode, whole, **TIGHT["cppo"])
    assert total == pytest.approx(expected_loss.item(), abs=1e-12)
    exact(gradient, expected_gradient)
    _, metrics = policy_loss(objective("cppo", **TIGHT["cppo"]), tokens)
    for name, pair in sums.items():
        assert pair == pytest.approx(list(metrics[name])), name


def shifted(logp: Tensor) -> Tensor:
    """A model's output for rows of 2 prompt tokens and all response tokens: position t predicts token t + 1."""
    padded = [torch.nn.functional.pad(row, (1, 1)) for row in logp]
    return torch.nested.as_nested_tensor(padded, layout=torch.jagged)


def nested(tokens: Tokens, extra: dict[str, int]) -> Any:
    """verl's batch of those rows."""

    def jagged(values: Tensor) -> Tensor:
        return torch.nested.as_nested_tensor(list(values), layout=torch.jagged)

    fields = {
        "prompts": jagged(torch.ones(len(tokens.mask), 2, dtype=torch.int64)),
        "responses": jagged(torch.ones_like(tokens.mask, dtype=torch.int64)),
        "response_mask": jagged(tokens.mask.long()),
        "old_log_probs": jagged(tokens.rollout_logp),
        "advantages": jagged(tokens.advantages),
    }
    data = TensorDict(fields, batch_size=len(tokens.mask))
    for name, value in extra.items():
        data.set_non_tensor(name, value)
    return data


def test_no_trained_token_in_the_mini_batch_is_no_loss() -> None:
    tokens = batch()
    empty = replace(tokens, mask=torch.zeros_like(tokens.mask))
    config = actor(ours("grpo"))
    config.global_batch_info.update(batch_num_tokens=0, dp_size=2)
    loss, gradient, _ = called("cppo_bench_grpo", config, empty)
    assert loss == 0 and not gradient.any()


REFUSED = [
    ({"divergence": {"estimator": "top_k", "kind": "tv", "k": 20}}, "divergence.estimator: top_k"),
    ({"divergence": {"estimator": "exact", "kind": "kl"}}, "divergence.estimator: exact"),
    ({"divergence": {"estimator": "binary", "kind": "js"}}, "divergence.kind: 'js'"),
    ({"divergence": None}, "divergence: objective cppo needs one"),
    ({"params": {"clip_ratio": 0.2}}, "clip_ratio: unknown parameter of objective cppo"),
    ({"params": {"delta": "much"}}, "delta: 'much' of objective cppo"),
    ({"params": {"shuffle": True}}, "objective cppo needs position with these params"),
    ({"loss_mode": "vanilla"}, "policy_loss.loss_mode: vanilla is not one of cppo_bench_cispo"),
    ({"loss_mode": "cppo_bench_unheard"}, "unknown objective 'unheard'"),
    ({"rollout_correction": {"bypass_mode": False}}, "rollout_correction.bypass_mode: must be True"),
    ({"rollout_correction": {**BYPASS, "rollout_is": "token"}}, "rollout_correction.rollout_is: must be null"),
    ({"rollout_correction": {**BYPASS, "rollout_rs": "token_k1"}}, "rollout_correction.rollout_rs: must be null"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[r[1] for r in REFUSED])
def test_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    chosen = {"loss_mode": "cppo_bench_cppo", "divergence": BINARY, "rollout_correction": BYPASS}
    with pytest.raises(ValueError) as caught:
        PolicyLoss(**{**chosen, **changes})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_bypass_mode_is_off_by_default() -> None:
    with pytest.raises(ValueError, match="bypass_mode: must be True"):
        PolicyLoss(loss_mode="cppo_bench_grpo")


def test_refused_when_called() -> None:
    """Configurations that only the call can see."""
    tokens = batch()
    with pytest.raises(
        ValueError, match=r"policy_loss._target_: cppo_bench_grpo needs cppo.integrations.verl.PolicyLoss"
    ):
        called("cppo_bench_grpo", actor(PolicyLossConfig(loss_mode="cppo_bench_grpo")), tokens)
    with pytest.raises(ValueError, match="with loss_mode=cppo_bench_dppo"):
        called("cppo_bench_dppo", actor(ours("grpo")), tokens)
    with pytest.raises(ValueError, match="horizon: aggregation seq-mean-token-sum-norm needs a horizon"):
        called("cppo_bench_grpo", actor(ours("grpo")), tokens, "seq-mean-token-sum-norm")
    for mode in ("token-mean", "seq-mean-token-sum"):
        config = actor(ours("grpo"))
        config.global_batch_info.update(dp_size=2)
        with pytest.raises(ValueError, match=f"global_batch_info: {mode} on 2 ranks"):
            called("cppo_bench_grpo", config, tokens, mode)
    with pytest.raises(ValueError, match="rollout_is_weights: cppo_bench_grpo takes its ratio to the rollout"):
        get_policy_loss_fn("cppo_bench_grpo")(
            old_log_prob=tokens.rollout_logp,
            log_prob=tokens.logp,
            advantages=tokens.advantages,
            response_mask=tokens.mask,
            config=actor(ours("grpo")),
            rollout_is_weights=torch.ones_like(tokens.logp),
        )


def documented() -> list[str]:
    """The overrides of the launch command in docs/integrations.md."""
    text = (ROOT / "docs" / "integrations.md").read_text()
    (command,) = re.findall(r"```bash\n(python -m verl\.trainer\.main_ppo .*?)```", text, re.DOTALL)
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "verl.trainer.main_ppo"]
    return words[3:]


def composed(overrides: list[str]) -> Any:
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides)


def test_documented_launch_command() -> None:
    """verl composes and checks it; the actor's configuration gives CPPO with the parameters of the command."""
    config = composed(documented())
    validate_config(config, use_reference_policy=False, use_critic=False)
    assert config.trainer.use_v1 and config.actor_rollout_ref.rollout.calculate_log_probs
    made = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert made.policy_loss.rule == SampledTokenLoss.of("cppo", {"delta": 0.15, "delta_b": 0.02}, BINARY)
    tokens = batch()
    _, gradient, _ = called(made.policy_loss.loss_mode, made, tokens, made.loss_agg_mode)
    _, expected = by_hand("cppo", tokens, "seq-mean-token-sum-norm", delta=0.15, delta_b=0.02)
    exact(gradient * made.loss_scale_factor, expected * HORIZON)
    for line, message in {
        "algorithm.rollout_correction.bypass_mode=False": "bypass_mode: must be True",
        "+actor_rollout_ref.actor.policy_loss.params.detla=0.1": "detla: unknown parameter",
        "+actor_rollout_ref.actor.policy_loss.delta=0.1": "unexpected keyword argument 'delta'",
    }.items():
        with pytest.raises(InstantiationException, match=message):
            omega_conf_to_dataclass(composed([*documented(), line]).actor_rollout_ref.actor)


def test_launch_without_bypass_mode_ends_before_ray(tmp_path: Path) -> None:
    """The real command line: `main_ppo` exits with our line."""
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *documented()]
    done = subprocess.run(
        [*command, "algorithm.rollout_correction.bypass_mode=False"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    assert "algorithm.rollout_correction.bypass_mode: must be True" in done.stderr
    assert "ray init" not in done.stdout


HOOKS = {
    "external_lib": "from verl.utils.import_utils import import_external_libs as load; load('cppo.integrations.verl')",
    "_target_": "from hydra.utils import instantiate; instantiate({'_target_': 'cppo.integrations.verl.PolicyLoss', "
    "'loss_mode': 'cppo_bench_pg', 'rollout_correction': {'bypass_mode': True}})",
    "VERL_USE_EXTERNAL_MODULES": "import os; os.environ['VERL_USE_EXTERNAL_MODULES'] = 'cppo.integrations.verl'; import verl",
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_register_in_a_fresh_process(hook: str) -> None:
    code = f"{HOOKS[hook]}\nfrom verl.trainer.ppo.core_algos import get_policy_loss_fn; get_policy_loss_fn('cppo_bench_cppo')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_objective_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By import path, as `loss_mode`."""
    (tmp_path / "my_rules.py").write_text(
        "from dataclasses import dataclass\nfrom cppo.objectives import Terms, Tokens, register\n"
        "from cppo.objectives.ratio import hard_gate\n\n"
        "@dataclass(frozen=True)\nclass Mine:\n    limit: float = 0.1\n\n"
        "@register()\ndef my_own(cfg: Mine, tokens: Tokens) -> Terms:\n"
        "    near = (tokens.logp - tokens.rollout_logp).abs() <= cfg.limit\n"
        "    return hard_gate(tokens.advantages * tokens.logp, near)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    mode = "cppo_bench_my_rules:my_own"
    loss = PolicyLoss(loss_mode=mode, params={"limit": 0.3}, rollout_correction=BYPASS)
    tokens = batch()
    _, gradient, _ = called(mode, actor(loss), tokens)
    _, expected = by_hand("my_rules:my_own", tokens, limit=0.3)
    exact(gradient, expected)


@pytest.mark.filterwarnings("ignore:.*engine is not available")
@pytest.mark.parametrize("bypass", [True, False])
def test_verls_trainer_anchors_on_the_rollout_in_bypass_mode_only(
    bypass: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """verl's v1 trainer: old_log_probs are the recorded ones, nothing is recomputed, and loss_mode stays ours."""
    from verl.trainer.ppo.v1 import trainer_base

    stored: dict[str, Any] = {"rollout_log_probs": batch().rollout_logp}
    queue = SimpleNamespace(
        kv_batch_get=lambda **_: dict(stored), kv_batch_put=lambda fields, **_: stored.update(fields)
    )
    monkeypatch.setattr(trainer_base, "tq", queue)
    config = composed([*documented(), f"algorithm.rollout_correction.bypass_mode={bypass}"])

    class Recomputed(Exception):
        pass

    def recompute(_: Any) -> None:
        raise Recomputed

    trainer = SimpleNamespace(config=config, actor_rollout_wg=SimpleNamespace(compute_log_prob=recompute))
    data = SimpleNamespace(keys=[], partition_id="", extra_info={})
    if not bypass:
        with pytest.raises(Recomputed):
            trainer_base.PPOTrainer._compute_old_log_prob(trainer, data, {})
        return
    trainer_base.PPOTrainer._compute_old_log_prob(trainer, data, {})
    assert torch.equal(stored["old_log_probs"], batch().rollout_logp)
    assert config.actor_rollout_ref.actor.policy_loss.loss_mode == "cppo_bench_cppo"
    assert not hasattr(trainer_base, "apply_bypass_mode"), "the legacy helper, which would replace loss_mode"
