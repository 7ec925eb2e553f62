"""The reduction against loops, the metrics by hand, and every error a user can make."""

import itertools
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fixture import AGGREGATIONS, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from cppo.integrations import SampledTokenLoss
from cppo.loss import Aggregation, batch_denominator, policy_loss, reduce_terms
from cppo.objectives import Terms, Tokens, names, objective, params_of, register, spec
from cppo.objectives.registry import _REGISTRY

HORIZON = 20


def aggregate_loop(
    per_token: list[list[float]], aggregation: Aggregation, horizon: int, denominator: float | None
) -> float:
    """The five modes; each row holds its trained tokens only."""
    rows = [row for row in per_token if row]
    tokens = sum(len(row) for row in rows)
    over_tokens = denominator if denominator is not None else tokens
    over_rows = denominator if denominator is not None else len(rows)
    total = sum(sum(row) for row in rows)
    if not rows:
        return 0.0
    match aggregation:
        case "token-mean":
            return total / over_tokens
        case "seq-mean-token-mean":
            return sum(sum(row) / len(row) for row in rows) / over_rows
        case "seq-mean-token-sum":
            return total / over_rows
        case "seq-mean-token-sum-norm":
            return total / over_rows / horizon
        case "token-sum":
            return total


def unclipped(tokens: Tokens) -> list[list[float]]:
    """-A rho of each row's trained tokens."""
    per_token = -tokens.advantages * (tokens.logp - tokens.rollout_logp).exp()
    return [[float(x) for x, m in zip(*row, strict=True) if m] for row in zip(per_token, tokens.mask, strict=True)]


def loss_of(tokens: Tokens, aggregation: Aggregation, denominator: float | None = None) -> float:
    horizon = HORIZON if aggregation == "seq-mean-token-sum-norm" else None
    return float(policy_loss(objective("pg", cap=None), tokens, aggregation, horizon, denominator)[0])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("denominator", [None, 1.0, 37.0, 0.5])
@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 10))
def test_aggregation_is_its_loop(
    aggregation: Aggregation, denominator: float | None, seed: int, batch: int, width: int
) -> None:
    tokens = random_tokens(seed, batch, width)
    expected = aggregate_loop(unclipped(tokens), aggregation, HORIZON, denominator)
    assert loss_of(tokens, aggregation, denominator) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_the_five_aggregations_differ() -> None:
    """On ragged rows, one of them empty, all five give different numbers (equal lengths would hide a wrong one)."""
    mask = torch.tensor([[True] * 6 + [False], [True, False, True, False, False, True, False], [False] * 7, [True] * 7])
    tokens = random_tokens(seed=5, batch=4, width=7, mask=mask)
    losses = {mode: loss_of(tokens, mode) for mode in AGGREGATIONS}
    for one, other in itertools.combinations(losses.values(), 2):
        assert abs(one - other) > 0.01 * max(abs(one), abs(other))
    for mode, loss in losses.items():
        assert loss == pytest.approx(aggregate_loop(unclipped(tokens), mode, HORIZON, None), rel=1e-12)
    assert {mode: batch_denominator(mask, mode) for mode in AGGREGATIONS} == {
        "token-mean": 16,
        "seq-mean-token-mean": 3,
        "seq-mean-token-sum": 3,
        "seq-mean-token-sum-norm": 3,
        "token-sum": 16,
    }


def test_masked_tokens_stay_in_the_denominator() -> None:
    """Dropping tokens must not raise the step size of the others."""
    tokens = one_row([0.5, 0.0, 0.5, 0.0], [1.0, 1.0, 1.0, 1.0], [0.9, 0.0, 0.9, 0.0])
    loss, _ = policy_loss(objective("dppo", cap=None), tokens)
    assert float(loss) == pytest.approx(-2 / 4)


def one_row(log_ratio: list[float], advantages: list[float], divergence: list[float], masked_out: int = 0) -> Tokens:
    """One response with mu = 1/e everywhere, then `masked_out` tokens of padding like the last."""
    ratios, a, d = (torch.tensor([x + x[-1:] * masked_out]) for x in (log_ratio, advantages, divergence))
    mask = torch.tensor([[True] * len(log_ratio) + [False] * masked_out])
    return Tokens(ratios - 1, torch.full_like(ratios, -1.0), a, mask, d)


def test_mask_share_counts_tokens_with_an_advantage() -> None:
    """By hand: 6 trained tokens, 4 with A != 0, of which 1 is dropped; padding that would be dropped is not counted."""
    tokens = one_row([0.5, 0.5, -0.5, 0.1, 0.5, 0.5], [1, 0, 1, 1, 0, 1], [0.4, 0.4, 0.4, 0.01, 0.4, 0.1], masked_out=2)
    _, metrics = policy_loss(objective("dppo", delta=0.15), tokens)
    assert metrics == {
        "mask_share": (1.0, 4.0),
        "mask_share/threshold": (1.0, 4.0),
        "mask_share/budget": (0.0, 4.0),
        "mask_share/sequence": (0.0, 4.0),
        "gate_mean": (3.0, 4.0),
        "divergence": pytest.approx((0.4 * 4 + 0.11, 6.0)),
    }


CAUSES = one_row([0.5] * 5, [1.0, 1.0, 1.0, 1.0, -1.0], [0.25, 0.5, 0.125, 0.0625, 0.9])
"""w = 1, delta = .25, delta_b = .125. c = .25, .125, -.25, -.25 and the last moves toward one: kept, threshold, budget,
budget, kept."""


def test_mask_share_by_cause() -> None:
    settings: dict[str, Any] = {"delta": 0.25, "delta_b": 0.125, "w_min": 1.0, "adaptive": False}
    _, metrics = policy_loss(objective("cppo", **settings), CAUSES)
    assert metrics["mask_share"] == (3.0, 5.0)
    assert metrics["mask_share/threshold"] == (1.0, 5.0)
    assert metrics["mask_share/budget"] == (2.0, 5.0)
    assert metrics["mask_share/sequence"] == (0.0, 5.0)
    assert metrics["gate_mean"] == (2.0, 5.0)


def test_soft_gate_shares_its_causes_with_the_hard_one() -> None:
    """The same counts, while the mean gate says how much is left. x = 2, .875 / .5 and .9375 / .625 for the three."""
    settings: dict[str, Any] = {"delta": 0.25, "delta_b": 0.125, "w_min": 1.0, "adaptive": False}
    _, hard = policy_loss(objective("cppo", **settings), CAUSES)
    _, soft = policy_loss(objective("cppo", **settings, soft=True), CAUSES)
    for name in ("mask_share", "mask_share/threshold", "mask_share/budget", "mask_share/sequence"):
        assert soft[name] == hard[name]
    assert soft["gate_mean"] == pytest.approx((2 + 1 / 2 + 0.5 / 0.875 + 0.625 / 0.9375, 5.0))


def test_metrics_of_a_rule_without_divergence() -> None:
    tokens = replace(random_tokens(seed=3), divergence=None)
    _, metrics = policy_loss(objective("ppo"), tokens)
    assert "divergence" not in metrics and metrics["mask_share"][0] == metrics["mask_share/threshold"][0] > 0


def test_metric_sums_are_not_rounded_to_the_inputs_precision() -> None:
    """1,000 tokens of divergence 2^-8 + 2^-15: a sum kept in bfloat16 would be off by a few in a thousand."""
    x = torch.zeros(1, 1001, dtype=torch.bfloat16)
    tokens = Tokens(x, x, x + 1, torch.ones(1, 1001, dtype=torch.bool), x + (2**-8 + 2**-15))
    _, metrics = policy_loss(objective("dppo"), tokens)
    assert metrics["divergence"] == pytest.approx((1001 * (2**-8 + 2**-15), 1001.0), rel=1e-6)


@pytest.mark.parametrize("name", names())
def test_inputs_are_not_modified(name: str) -> None:
    """Also not in the padding, whose NaN the rules replace by 0 on their own copy."""
    tokens = random_tokens(seed=3)
    fields = {key: torch.where(tokens.mask, x, torch.nan) for key, x in vars(tokens).items() if x.is_floating_point()}
    tokens = replace(tokens, **fields)
    before = {key: value.clone() for key, value in vars(tokens).items()}
    policy_loss(objective(name), tokens)
    for key, value in vars(tokens).items():
        torch.testing.assert_close(value, before[key], atol=0, rtol=0, equal_nan=True)


# Errors: each names what is wrong.

TOKENS = random_tokens(seed=1, batch=3, width=4)


def test_unknown_aggregation() -> None:
    wrong: Any = "mean"
    with pytest.raises(ValueError, match="aggregation: 'mean' is not one of token-mean, seq-mean-token-mean"):
        policy_loss(objective("pg"), TOKENS, wrong)


def test_missing_horizon() -> None:
    with pytest.raises(ValueError, match="horizon: aggregation seq-mean-token-sum-norm needs a horizon"):
        policy_loss(objective("pg"), TOKENS, "seq-mean-token-sum-norm")


@pytest.mark.parametrize("aggregation", [mode for mode in AGGREGATIONS if mode != "seq-mean-token-sum-norm"])
def test_needless_horizon(aggregation: Aggregation) -> None:
    with pytest.raises(ValueError, match=f"horizon: aggregation {aggregation} takes no horizon"):
        policy_loss(objective("pg"), TOKENS, aggregation, horizon=8)


@pytest.mark.parametrize("horizon", [0, -8])
def test_bad_horizon(horizon: int) -> None:
    with pytest.raises(ValueError, match=f"horizon: {horizon} must be above 0"):
        policy_loss(objective("pg"), TOKENS, "seq-mean-token-sum-norm", horizon=horizon)


@pytest.mark.parametrize("denominator", [0, 0.0, -3.0, float("nan")])
def test_bad_denominator(denominator: float) -> None:
    with pytest.raises(ValueError, match=r"denominator: .* must be above 0"):
        policy_loss(objective("pg"), TOKENS, denominator=denominator)


@pytest.mark.parametrize("field", ["logp", "rollout_logp", "advantages", "divergence", "position"])
@pytest.mark.parametrize("shape", [(3, 5), (2, 4), (3,), (1, 4), (3, 1)])
def test_wrong_shape(field: str, shape: tuple[int, ...]) -> None:
    """Also those that would broadcast."""
    value = torch.zeros(shape, dtype=getattr(TOKENS, field).dtype)
    with pytest.raises(ValueError, match=rf"tokens\.{field}: shape .* differs from the mask's \(3, 4\)"):
        objective("cppo")(replace(TOKENS, **{field: value}))


@pytest.mark.parametrize("mask", [torch.ones(3, 4), torch.ones(3, 4, dtype=torch.int64), torch.ones(12).bool()])
def test_wrong_mask(mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"tokens\.mask: expected bool \[B, T\], got"):
        policy_loss(objective("pg"), replace(TOKENS, mask=mask))


@pytest.mark.parametrize("name", ["dppo", "cppo", "trm"])
def test_missing_divergence(name: str) -> None:
    """An error, not a silent binary estimate."""
    with pytest.raises(ValueError, match=f"objective {name} needs tokens.divergence"):
        policy_loss(objective(name), replace(TOKENS, divergence=None))


def test_missing_position() -> None:
    with pytest.raises(ValueError, match=r"^objective cppo needs tokens\.position: a permutation"):
        policy_loss(objective("cppo", shuffle=True), replace(TOKENS, position=None))


def test_unknown_objective() -> None:
    with pytest.raises(ValueError, match=r"unknown objective 'cpo'; known: .*cppo.*dppo"):
        objective("cpo")


@pytest.mark.parametrize("name", names())
def test_unknown_setting(name: str) -> None:
    with pytest.raises(ValueError, match=f"detla: unknown parameter of objective {name}; known: "):
        objective(name, detla=0.1)


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("cppo", "delta", "0.15"),
        ("cppo", "delta", None),
        ("cppo", "delta", True),
        ("cppo", "adaptive", 1),
        ("cppo", "adaptive", "yes"),
        ("cppo", "span", 8.5),
        ("cppo", "span", True),
        ("ppo", "dual_clip", [3.0]),
    ],
)
def test_wrong_type(name: str, setting: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{setting}: .* of objective {name}: Input should be a valid"):
        objective(name, **{setting: value})


@pytest.mark.parametrize(
    ("name", "setting", "value", "message"),
    [
        ("cppo", "delta", 0.0, "above 0"),
        ("cppo", "delta", -0.1, "above 0"),
        ("cppo", "delta_b", 0.0, "above 0"),
        ("cppo", "cap", -1.0, "above 0"),
        ("cppo", "span", 0, "above 0"),
        ("cppo", "w_min", 0.0, r"in \(0, 1\]"),
        ("cppo", "w_min", 1.1, r"in \(0, 1\]"),
        ("cppo", "quantile", 0.0, r"in \(0, 1\]"),
        ("cppo", "quantile", 1.5, r"in \(0, 1\]"),
        ("cppo", "clamp_factor", 0.9, "at least 1"),
        ("dppo", "delta", 0.0, "above 0"),
        ("dppo", "cap", 0.0, "above 0"),
        ("pg", "cap", 0.0, "above 0"),
        ("ppo", "clip_low", -0.2, "above 0"),
        ("ppo", "clip_high", 0.0, "above 0"),
        ("ppo", "dual_clip", 1.0, "above 1"),
        ("grpo", "dual_clip", 0.5, "above 1"),
        ("grpo", "clip_high", -0.28, "above 0"),
        ("cispo", "clip_low", 0.0, "above 0"),
        ("minpro", "clip_low", 0.0, "above 0"),
        ("minpro", "clip_high", -0.28, "above 0"),
        ("sapo", "tau_pos", 0.0, "above 0"),
        ("sapo", "tau_neg", -1.0, "above 0"),
        ("drpo", "delta", 0.0, "above 0"),
        ("gspo", "clip_low", -3e-4, "above 0"),
        ("gspo", "clip_high", 0.0, "above 0"),
        ("gmpo", "clip_low", 0.0, "above 0"),
        ("gmpo", "clip_high", -0.4, "above 0"),
        ("trm", "delta_max", 0.0, "above 0"),
        ("trm", "delta_mean", -0.001, "above 0"),
        ("trm", "cap", 0.0, "above 0"),
        ("cispo", "clip_high", -4.0, "above 0"),
    ],
)
def test_out_of_range(name: str, setting: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{setting}: {value} must be {message}"):
        objective(name, **{setting: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_parameters_are_finite(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^delta: {value} of objective cppo: Input should be a finite number"):
        objective("cppo", delta=value)
    if not value > 0:
        with pytest.raises(ValueError, match=rf"^delta: {value} must be above 0"):
            spec("cppo").params(delta=value)


def test_trm_needs_a_criterion() -> None:
    with pytest.raises(ValueError, match="one of delta_max and delta_mean is needed"):
        objective("trm", delta_max=None)


def test_the_edges_of_the_ranges_are_allowed() -> None:
    """And an int where a float is expected, which is what YAML gives for `cap: 20`."""
    settings = params_of("cppo", w_min=1.0, quantile=1.0, clamp_factor=1.0, span=1, cap=20, delta_b=None)
    assert (settings.w_min, settings.cap, settings.delta_b) == (1.0, 20, None)


# Plug-ins.


@dataclass(frozen=True)
class Frozen:
    limit: float = 0.1


@dataclass
class Thawed:
    limit: float = 0.1


def test_settings_must_be_a_frozen_dataclass() -> None:
    def thawed(cfg: Thawed, tokens: Tokens) -> Terms:
        raise NotImplementedError

    def untyped(cfg, tokens: Tokens) -> Terms:  # type: ignore[no-untyped-def]
        raise NotImplementedError

    def plain(cfg: dict[str, float], tokens: Tokens) -> Terms:
        raise NotImplementedError

    def nothing() -> Terms:
        raise NotImplementedError

    before = names()
    wrong: list[Any] = [thawed, untyped, plain, nothing]
    for function in wrong:
        message = f"objective {function.__name__}: annotate its first parameter with a frozen dataclass of parameters"
        with pytest.raises(ValueError, match=message):
            register()(function)
    assert names() == before


def test_settings_are_frozen() -> None:
    rule = objective("cppo")
    with pytest.raises(AttributeError, match="cannot assign to field 'delta'"):
        rule.params.delta = 1.0


def test_names_are_taken_once() -> None:
    def ppo(cfg: Frozen, tokens: Tokens) -> Terms:
        raise NotImplementedError

    with pytest.raises(ValueError, match=r"objective ppo: already registered by cppo\.objectives\.ratio"):
        register()(ppo)
    assert spec("ppo").function is not ppo


PLUGIN = """
from dataclasses import dataclass
import torch
from cppo.objectives import Terms, Tokens, register

@dataclass(frozen=True)
class Near:
    limit: float = 0.1

@register()
def near(cfg: Near, tokens: Tokens) -> Terms:
    keep = (tokens.logp - tokens.rollout_logp).detach().abs() <= cfg.limit
    return Terms(tokens.advantages * tokens.logp, keep.float(), (~keep).long())

def bare(cfg: Near, tokens: Tokens) -> Terms:
    raise NotImplementedError
"""


def test_a_plugin_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "near_rules.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_REGISTRY, "_entries", dict(_REGISTRY._entries))
    rule = objective("near_rules:near", limit=0.2)
    assert rule.name == "near" and "near" in names()
    tokens = one_row([0.1, 0.3], [1.0, 1.0], [0.0, 0.0])
    assert rule(tokens).gate.tolist() == [[1.0, 0.0]]
    for path, message in {
        "near_rules:far": "near_rules has no function far decorated with",
        "near_rules:bare": "near_rules has no function bare decorated with",
        "no_such_module:near": "No module named 'no_such_module'; is its folder on PYTHONPATH",
    }.items():
        with pytest.raises(ValueError, match=message):
            objective(path)
    with pytest.raises(ValueError, match="limt: unknown parameter of objective near_rules:near"):
        objective("near_rules:near", limt=0.2)


# Traces and needs -----------------------------------------------------------------------------------------------------

SHOWING = """
from dataclasses import dataclass, replace

import torch
from cppo.objectives import Terms, Tokens, register
from cppo.objectives.ratio import hard_gate, ratio


@dataclass(frozen=True)
class Showing:
    name: str = "half"
    shape: str = "row"
    deep: bool = False


def needs(cfg):
    return ("position", "divergence") if cfg.deep else ()


@register(needs=needs, traces=("half", "limit"))
def showing(cfg: Showing, tokens: Tokens) -> Terms:
    rho = ratio(tokens)
    shown = {"row": rho.mean(-1), "token": rho / 2, "column": rho[:, :1], "scalar": rho.sum()}[cfg.shape]
    return replace(hard_gate(tokens.advantages * rho, torch.ones_like(tokens.mask)), traces={cfg.name: shown})
"""


@pytest.fixture
def showing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The import path of a user's rule that shows what its parameters say."""
    (tmp_path / "showing_rules.py").write_text(SHOWING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "showing_rules", raising=False)
    monkeypatch.setattr(_REGISTRY, "_entries", dict(_REGISTRY._entries))
    return "showing_rules:showing"


HOLES = Tokens(
    logp=torch.tensor([[0.0, -1.0, torch.nan], [0.5, torch.nan, -0.5], [torch.nan, torch.nan, torch.nan]]),
    rollout_logp=torch.zeros(3, 3),
    advantages=torch.ones(3, 3),
    mask=torch.tensor([[True, True, False], [True, False, True], [False, False, False]]),
)


def test_a_trace_by_token_is_0_outside_the_mask_and_has_no_gradient(showing: str) -> None:
    leaf = HOLES.logp.clone().requires_grad_()
    rule = objective(showing, name="limit", shape="token")
    terms = rule(replace(HOLES, logp=leaf))
    half = terms.traces["limit"]
    assert terms.surrogate.requires_grad and not half.requires_grad
    torch.testing.assert_close(half, torch.where(HOLES.mask, HOLES.logp.exp() / 2, 0))
    _, metrics = policy_loss(rule, HOLES)
    assert "limit" not in metrics and "half" not in metrics


def test_a_trace_by_response_becomes_a_metric(showing: str) -> None:
    """Its mean over the responses that have trained tokens: a row without any counts neither above nor below the line."""
    rule = objective(showing)
    trace = rule(HOLES).traces["half"]
    assert trace.shape == (3,) and trace[2] == 0 and not trace.requires_grad
    _, metrics = policy_loss(rule, HOLES)
    first, second = (1 + math.exp(-1) + 1) / 3, (math.exp(0.5) + 1 + math.exp(-0.5)) / 3  # padding has ratio 1
    assert metrics["half"] == (pytest.approx(first + second), 2.0)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"name": "secret"}, "objective showing: trace secret is not among @register's traces"),
        ({"shape": "column"}, r"objective showing: trace half: expected shape \(3, 3\) or \(3,\), got \(3, 1\)"),
        ({"shape": "scalar"}, r"objective showing: trace half: expected shape \(3, 3\) or \(3,\), got \(\)"),
        ({"deep": True}, r"objective showing needs tokens\.divergence: compute one with cppo\.divergences"),
    ],
)
def test_undeclared_traces_and_missing_needs_are_refused(showing: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        objective(showing, **params)(HOLES)


def test_needs_follow_the_parameters(showing: str) -> None:
    assert objective(showing).needs == frozenset()
    assert objective(showing, deep=True).needs == {"position", "divergence"}
    assert objective("cppo").needs == {"divergence"}
    assert objective("cppo", shuffle=True).needs == {"divergence", "position"}
    assert {name for name in names() if objective(name).needs} == {"cppo", "dppo", "trm"}
    given = replace(HOLES, divergence=torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"^objective showing needs tokens\.position: a permutation of 1\.\.T_i"):
        objective(showing, deep=True)(given)


def test_unknown_needs_are_refused_when_the_rule_is_registered() -> None:
    def rule(cfg: Frozen, tokens: Tokens) -> Terms:
        raise NotImplementedError

    before = names()
    with pytest.raises(ValueError, match=r"^objective rule: needs \['entropy'\] is not among divergence, position$"):
        register(needs=("divergence", "entropy"))(rule)
    assert names() == before


def test_a_sampled_token_loss_refuses_what_it_cannot_give() -> None:
    """TRL and verl record the sampled token only: no positions, and a divergence only if it is asked for."""
    binary = {"estimator": "binary", "kind": "tv"}
    with pytest.raises(
        ValueError, match=r"^objective cppo needs position with these params, which is not recorded here$"
    ):
        SampledTokenLoss.of("cppo", {"shuffle": True}, binary)
    with pytest.raises(ValueError, match=r"^divergence: objective cppo needs one: "):
        SampledTokenLoss.of("cppo")
    assert SampledTokenLoss.of("cppo", {}, binary).objective.needs == {"divergence"}


def test_cppos_quantities_are_traces() -> None:
    """Its thresholds by token and its budget by response, under every parameter."""
    for params in ({}, {"delta_b": None}, {"adaptive": False}, {"soft": True}):
        rule = objective("cppo", **params)
        traces = rule(TOKENS).traces
        expected = {"weighted", "prefix_threshold", "threshold"} | (
            {"delta_b"} if params.get("delta_b", 0) == 0 else set()
        )
        assert set(traces) == expected <= set(rule.spec.traces)
        assert all(trace.shape == (TOKENS.mask.shape if name != "delta_b" else (3,)) for name, trace in traces.items())
        torch.testing.assert_close(traces["threshold"], traces["prefix_threshold"].clamp(max=0.15))
        _, metrics = policy_loss(rule, TOKENS)
        assert ("delta_b" in metrics) == ("delta_b" in traces)


@pytest.mark.parametrize("part", ["surrogate", "gate", "reason"])
def test_terms_of_another_shape_are_refused(part: str) -> None:
    """Also those that would broadcast."""

    def narrow(cfg: object, tokens: Tokens) -> Terms:
        terms = objective("pg")(tokens)
        return replace(terms, **{part: getattr(terms, part)[:, :1]})

    rule = replace(objective("pg"), spec=replace(spec("pg"), function=narrow))
    with pytest.raises(ValueError, match=rf"^objective pg: {part}: expected shape \(3, 4\), got \(3, 1\)$"):
        rule(TOKENS)


def test_a_loss_of_two_components_has_a_denominator_for_each() -> None:
    """`reduce_terms` is one component: its own mask and denominator, and the sum is the loss."""
    terms = objective("pg")(TOKENS)
    first = TOKENS.mask & (torch.arange(4) < 2)
    second = TOKENS.mask & ~first
    parts = [reduce_terms(terms, mask, "token-mean", None, count) for mask, count in ((first, 8.0), (second, 2.0))]
    per_token = -terms.gate * terms.surrogate
    expected = per_token[first].sum() / 8 + per_token[second].sum() / 2
    torch.testing.assert_close(sum(parts), expected)
    whole, _ = policy_loss(objective("pg"), TOKENS)
    torch.testing.assert_close(reduce_terms(terms, TOKENS.mask, "token-mean", None, None), whole)
