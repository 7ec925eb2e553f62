"""The batched rules and divergences against the same mathematics as slow, obvious loops over Python floats."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from fixture import loss_and_grad, ragged_mask, random_tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cppo import divergences
from cppo.objectives import Reason, Tokens, names, objective
from cppo.objectives.divergence import prefix_sums
from cppo.objectives.types import padded_like

ATOL = 1e-12
SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 14))
CAPS = st.sampled_from([20.0, 1.1, 0.9, None])  # the low ones bind often


class One(NamedTuple):
    """What a loop says about one token."""

    surrogate: float
    weight: float
    """d surrogate / d logp."""
    gate: float = 1.0
    reason: Reason = Reason.KEPT


class Token(NamedTuple):
    """One trained token; t counts from 1 over the trained tokens of its row."""

    logp: float
    rho: float
    advantage: float
    divergence: float
    position: int

    @property
    def toward(self) -> bool:
        return self.advantage * (self.rho - 1) <= 0


Row = list[Token]


def read(tokens: Tokens) -> list[tuple[list[int], Row]]:
    """Per row: the columns of its trained tokens, and these tokens."""
    assert tokens.divergence is not None and tokens.position is not None
    out = []
    for i in range(tokens.mask.shape[0]):
        columns = [t for t in range(tokens.mask.shape[1]) if tokens.mask[i, t]]
        row = []
        for t in columns:
            logp, anchor = float(tokens.logp[i, t]), float(tokens.rollout_logp[i, t])
            rho = math.exp(min(max(logp - anchor, -20.0), 20.0))
            token = Token(
                logp, rho, float(tokens.advantages[i, t]), float(tokens.divergence[i, t]), int(tokens.position[i, t])
            )
            row.append(token)
        out.append((columns, row))
    return out


def weighted(token: Token, cap: float | None) -> tuple[float, float]:
    """(surrogate, its derivative) of A sg[min(rho, cap)] logp, or of A rho without a cap."""
    if cap is None:
        return token.advantage * token.rho, token.advantage * token.rho
    weight = token.advantage * min(token.rho, cap)
    return weight * token.logp, weight


def pg_loop(row: Row, cap: float | None) -> list[One]:
    return [One(*weighted(token, cap)) for token in row]


def clip_loop(row: Row, clip_low: float | None, clip_high: float | None, dual_clip: float | None) -> list[One]:
    """PPO and GRPO: the gradient of the published min of two terms is that of whichever is smaller."""
    out = []
    for token in row:
        a, rho = token.advantage, token.rho
        low = -math.inf if clip_low is None else 1 - clip_low
        high = math.inf if clip_high is None else 1 + clip_high
        free, clipped = a * rho, a * min(max(rho, low), high)
        constant = clipped < free
        if dual_clip is not None and a < 0 and min(free, clipped) < a * dual_clip:
            constant = True
        gate, reason = (0.0, Reason.THRESHOLD) if constant else (1.0, Reason.KEPT)
        out.append(One(free, free, gate, reason))
    return out


def cispo_loop(row: Row, clip_low: float | None, clip_high: float | None) -> list[One]:
    out = []
    for token in row:
        weight = token.rho
        if clip_low is not None:
            weight = max(weight, 1 - clip_low)
        if clip_high is not None:
            weight = min(weight, 1 + clip_high)
        out.append(One(token.advantage * weight * token.logp, token.advantage * weight))
    return out


def dppo_loop(row: Row, delta: float, cap: float | None) -> list[One]:
    out = []
    for token in row:
        away = (token.advantage > 0 and token.rho > 1) or (token.advantage < 0 and token.rho < 1)
        if away and token.divergence > delta:
            out.append(One(*weighted(token, cap), 0.0, Reason.THRESHOLD))
        else:
            out.append(One(*weighted(token, cap)))
    return out


def quantile(values: list[float], q: float) -> float:
    """Linear interpolation between the two nearest order statistics."""
    ordered = sorted(values)
    rank = q * (len(ordered) - 1)
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (rank - below) * (ordered[above] - ordered[below])


def budget(row: Row, delta_b: float, adaptive: bool, q: float, clamp_factor: float) -> float:
    """delta_b of one response (Eq. 22)."""
    if not adaptive:
        return delta_b
    return min(max(quantile([token.divergence for token in row], q), delta_b), clamp_factor * delta_b)


def cppo_loop(
    row: Row,
    delta: float,
    w_min: float,
    delta_b: float | None,
    adaptive: bool,
    quantile: float,
    clamp_factor: float,
    span: int | None,
    shuffle: bool,
    soft: bool,
    cap: float | None,
    enters: Callable[[Token, float], bool] = lambda token, gate: True,
) -> list[One]:
    """Algorithm 1, with the two conditions written apart: w_t D_t <= delta and S_t <= delta + delta_b W_{t-1}."""
    out: list[One] = []
    length = len(row) if span is None else span
    used = allowed = 0.0  # S_{t-1} and W_{t-1}
    effective = None if delta_b is None or not row else budget(row, delta_b, adaptive, quantile, clamp_factor)
    for t, token in enumerate(row, start=1):
        position = token.position if shuffle else t
        weight = 1 - (1 - w_min) * (position - 1) / max(length - 1, 1)
        drift = weight * token.divergence
        excess = drift / delta
        if effective is not None:
            excess = max(excess, (used + drift) / (delta + effective * allowed))
        if token.toward or excess <= 1:
            gate, reason = 1.0, Reason.KEPT
        else:
            gate = 1 / excess if soft else 0.0
            reason = Reason.THRESHOLD if drift > delta else Reason.BUDGET
        out.append(One(*weighted(token, cap), gate, reason))
        if enters(token, gate):  # by the paper every token does, also a masked one and one that moves toward mu
            used += drift
            allowed += weight
    return out


LOOPS: dict[str, Any] = {
    "pg": pg_loop,
    "ppo": clip_loop,
    "grpo": clip_loop,
    "cispo": cispo_loop,
    "dppo": dppo_loop,
    "cppo": cppo_loop,
}


def check_against_loop(name: str, settings: dict[str, Any], tokens: Tokens) -> Counter[Reason]:
    """Surrogate, gate, reason and gradient of every token; returns how often each reason occurred in the mask."""
    rule = objective(name, **settings)
    terms = rule(tokens)
    _, grad, _ = loss_and_grad(rule, tokens, "token-sum")
    surrogate, gate = torch.zeros_like(tokens.logp), torch.ones_like(tokens.logp)
    reason, expected_grad = torch.zeros_like(tokens.mask, dtype=torch.int64), torch.zeros_like(tokens.logp)
    for i, (columns, row) in enumerate(read(tokens)):
        for t, one in zip(columns, LOOPS[name](row, **vars(rule.settings)), strict=True):
            surrogate[i, t], gate[i, t], reason[i, t] = one.surrogate, one.gate, one.reason
            expected_grad[i, t] = -one.gate * one.weight
    assert torch.equal(terms.reason, reason)
    torch.testing.assert_close(terms.gate, gate, atol=ATOL, rtol=0)
    torch.testing.assert_close(terms.surrogate, surrogate, atol=ATOL, rtol=ATOL)
    torch.testing.assert_close(grad, expected_grad, atol=ATOL, rtol=ATOL)
    return Counter(Reason(int(r)) for r in reason[tokens.mask])


@given(SEEDS, SHAPES, CAPS)
def test_pg_is_its_loop(seed: int, shape: tuple[int, int], cap: float | None) -> None:
    check_against_loop("pg", {"cap": cap}, random_tokens(seed, *shape))


CLIPS = st.sampled_from([None, 0.05, 0.2, 0.5])


@pytest.mark.parametrize("name", ["ppo", "grpo"])
@given(SEEDS, SHAPES, CLIPS, CLIPS, st.sampled_from([None, 1.3, 3.0]))
def test_clip_rules_are_their_loop(
    name: str, seed: int, shape: tuple[int, int], low: float | None, high: float | None, dual: float | None
) -> None:
    settings = {"clip_low": low, "clip_high": high, "dual_clip": dual}
    check_against_loop(name, settings, random_tokens(seed, *shape))


@given(SEEDS, SHAPES, CLIPS, CLIPS)
def test_cispo_is_its_loop(seed: int, shape: tuple[int, int], low: float | None, high: float | None) -> None:
    check_against_loop("cispo", {"clip_low": low, "clip_high": high}, random_tokens(seed, *shape))


@given(SEEDS, SHAPES, st.sampled_from([0.005, 0.02, 0.15]), CAPS)
def test_dppo_is_its_loop(seed: int, shape: tuple[int, int], delta: float, cap: float | None) -> None:
    check_against_loop("dppo", {"delta": delta, "cap": cap}, random_tokens(seed, *shape))


@st.composite
def cppo_settings(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "delta": draw(st.sampled_from([0.03, 0.08, 0.15])),
        "w_min": draw(st.sampled_from([0.3, 0.8, 1.0])),
        "delta_b": draw(st.sampled_from([0.01, 0.02, 0.01, 0.02, None])),
        "adaptive": draw(st.booleans()),
        "quantile": draw(st.sampled_from([0.5, 0.9, 1.0])),
        "clamp_factor": draw(st.sampled_from([1.0, 2.0, 5.0])),
        "span": draw(st.sampled_from([None, None, 14, 40])),
        "shuffle": draw(st.booleans()),
        "soft": draw(st.booleans()),
        "cap": draw(CAPS),
    }


@given(SEEDS, SHAPES, cppo_settings())
def test_cppo_is_its_loop(seed: int, shape: tuple[int, int], settings: dict[str, Any]) -> None:
    check_against_loop("cppo", settings, random_tokens(seed, *shape))


VARIANTS: dict[str, dict[str, Any]] = {
    "adaptive": {},
    "fixed": {"adaptive": False},
    "no_prefix": {"delta_b": None},
    "no_position_weight": {"w_min": 1.0},
    "soft": {"soft": True},
    "shuffle": {"shuffle": True},
    "span": {"span": 30},
    "differentiable": {"cap": None},
}
MANY = random_tokens(seed=7, batch=120, width=20)
"""A batch in which everything below occurs; the tests that use it assert so."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_cppo_variant_is_its_loop(variant: str) -> None:
    """The same comparison where it is known that every cause of a masked token occurs."""
    settings = {"delta": 0.06} | VARIANTS[variant]
    reasons = check_against_loop("cppo", settings, MANY)
    assert reasons[Reason.KEPT] > 20 and reasons[Reason.THRESHOLD] > 3
    assert (reasons[Reason.BUDGET] > 10) == (settings.get("delta_b", 0.02) is not None)
    if variant in ("no_position_weight", "shuffle", "span", "fixed", "no_prefix"):
        full = objective("cppo", delta=0.06)(MANY)
        assert not torch.equal(objective("cppo", **settings)(MANY).reason, full.reason)  # the setting matters here


def test_adaptive_budgets_are_at_the_floor_between_and_at_the_ceiling() -> None:
    rule = objective("cppo", delta=0.06)
    delta_b = prefix_sums(rule.settings, padded_like(MANY)).delta_b
    expected = [budget(row, 0.02, True, 0.9, 2.0) if row else 0.02 for _, row in read(MANY)]
    torch.testing.assert_close(delta_b, torch.tensor(expected, dtype=torch.float64), atol=ATOL, rtol=0)
    between = (delta_b > 0.02) & (delta_b < 0.04)
    assert (delta_b == 0.02).sum() > 10 and between.sum() > 10 and (delta_b == 0.04).sum() > 10


@pytest.mark.parametrize("wrong", ["only kept tokens", "only tokens moving away"])
def test_the_batch_notices_which_tokens_enter_the_prefix(wrong: str) -> None:
    """Sums over fewer tokens than all give other reasons, in at least two responses of this batch."""
    kept_only = wrong == "only kept tokens"
    settings = vars(objective("cppo", delta=0.06, adaptive=False).settings)
    differ = 0
    for _, row in read(MANY):
        right = [one.reason for one in cppo_loop(row, **settings)]
        fewer = cppo_loop(row, **settings, enters=lambda token, gate: gate > 0 if kept_only else not token.toward)
        differ += right != [one.reason for one in fewer]
    assert differ >= 2


PAPER: dict[str, dict[str, Any]] = {
    "ppo": {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None},
    "grpo": {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": None},
    "cispo": {"clip_low": None, "clip_high": 4.0},
    "dppo": {"delta": 0.15, "cap": 20.0},
    "pg": {"cap": 20.0},
    "cppo": {
        "delta": 0.15,
        "w_min": 0.8,
        "delta_b": 0.02,
        "adaptive": True,
        "quantile": 0.9,
        "clamp_factor": 2.0,
        "span": None,
        "shuffle": False,
        "soft": False,
        "cap": 20.0,
    },
}


@pytest.mark.parametrize("name", PAPER)
def test_defaults_are_the_papers(name: str) -> None:
    """CPPO (arXiv:2606.10968) Table 3 for a dense Base model, and section 4.1 for the baselines."""
    assert vars(objective(name).settings) == PAPER[name]


# Ties. Dyadic numbers make every sum exact in float32.


def tie(divergence: list[float], logp: list[float] | None = None, advantage: float = 1.0) -> Tokens:
    """One response; log-ratios of 0.5 unless given."""
    d = torch.tensor([divergence])
    log_ratio = torch.full_like(d, 0.5) if logp is None else torch.tensor([logp])
    return Tokens(log_ratio - 1, torch.full_like(d, -1.0), torch.full_like(d, advantage), torch.ones_like(d) > 0, d)


def test_thresholds_are_not_strict() -> None:
    """A divergence equal to its threshold is kept."""
    assert objective("dppo", delta=0.25)(tie([0.25, 0.25 + 2**-20])).gate.tolist() == [[1, 0]]
    cppo = objective("cppo", delta=0.25, w_min=1.0, delta_b=0.125, adaptive=False)
    # c = .25, .25 + .125 - .25 = .125, .25 + .25 - .375 = .125; then one hair more than .25 + .375 - .5 = .125.
    terms = cppo(tie([0.25, 0.125, 0.125, 0.125 + 2**-20]))
    assert terms.gate.tolist() == [[1, 1, 1, 0]]
    assert terms.reason.tolist() == [[0, 0, 0, Reason.BUDGET]]
    soft = objective("cppo", delta=0.25, w_min=1.0, delta_b=0.125, adaptive=False, soft=True)
    assert (soft(tie([0.25, 0.125, 0.125, 0.125 + 2**-20])).gate < 1).tolist() == [[False, False, False, True]]


@pytest.mark.parametrize("name", ["dppo", "cppo"])
def test_toward_tokens_are_kept_however_far(name: str) -> None:
    """A (rho - 1) <= 0, equality included (rho = 1, A = 0)."""
    far = [0.9, 0.9, 0.9]
    log_ratio = [-0.5, 0.0, 0.5]
    assert objective(name)(tie(far, log_ratio, advantage=1.0)).gate.tolist() == [[1, 1, 0]]
    assert objective(name)(tie(far, log_ratio, advantage=-1.0)).gate.tolist() == [[0, 1, 1]]
    assert objective(name)(tie(far, log_ratio, advantage=0.0)).gate.tolist() == [[1, 1, 1]]


def test_tiny_advantages_keep_their_sign() -> None:
    """A (rho - 1) of two small float32 numbers underflows to 0, which would read as "toward one"."""
    tokens = tie([0.9], [1e-5], advantage=1e-42)
    assert tokens.advantages.item() > 0
    assert objective("dppo")(tokens).gate.item() == 0


def test_soft_gate_is_below_one_where_rounding_hides_the_excess() -> None:
    """In float32 x_t can round to 1 although w_t D_t > c_t; the gate must still say that the token is not kept."""
    soft = objective("cppo", delta=0.15, delta_b=0.02, adaptive=False, soft=True)
    hard = objective("cppo", delta=0.15, delta_b=0.02, adaptive=False)
    rounded = 0
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        divergence = 0.03 * torch.rand(1, 200, generator=g)
        for t in range(1, 200):  # put every token on its threshold, then a hair above
            tokens = tie(divergence[0].tolist())
            threshold = prefix_sums(hard.settings, padded_like(tokens)).threshold
            weight = prefix_sums(hard.settings, padded_like(replace(tokens, divergence=torch.ones(1, 200)))).weighted
            divergence[0, t] = torch.nextafter(threshold[0, t] / weight[0, t], torch.tensor(2.0))
            if t >= 12:
                break
        tokens = tie(divergence[0].tolist())
        rounded += int((hard(tokens).gate == 0).sum())
        assert torch.equal(soft(tokens).gate == 1, hard(tokens).gate == 1)
    assert rounded > 0


# Limits and invariants.


@given(SEEDS, SHAPES)
def test_cppo_without_its_two_ideas_is_dppo_bit_for_bit(seed: int, shape: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.float64):
        tokens = cast_to(random_tokens(seed, *shape), dtype)
        ours = objective("cppo", delta=0.03, w_min=1.0, delta_b=None)(tokens)
        theirs = objective("dppo", delta=0.03)(tokens)
        for one, other in zip(vars(ours).values(), vars(theirs).values(), strict=True):
            assert torch.equal(one, other)


def cast_to(tokens: Tokens, dtype: torch.dtype) -> Tokens:
    """The floating-point fields in `dtype`."""
    fields = {name: value for name, value in vars(tokens).items() if value is not None}
    return Tokens(**{name: x.to(dtype) if x.is_floating_point() else x for name, x in fields.items()})


@given(SEEDS, SHAPES)
def test_a_large_budget_is_no_budget(seed: int, shape: tuple[int, int]) -> None:
    """delta_b >= max D means S_{t-1} <= delta_b W_{t-1}, so the threshold stays at delta."""
    tokens = random_tokens(seed, *shape)
    assert tokens.divergence is not None
    largest = float(tokens.divergence.max())
    for delta_b in (largest * (1 + 1e-9), math.inf):
        for adaptive in (True, False):
            with_budget = objective("cppo", delta=0.03, delta_b=delta_b, adaptive=adaptive)(tokens)
            without = objective("cppo", delta=0.03, delta_b=None)(tokens)
            assert torch.equal(with_budget.reason, without.reason)
            assert torch.equal(with_budget.gate, without.gate)


@given(SEEDS, SHAPES)
def test_infinite_thresholds_are_the_policy_gradient(seed: int, shape: tuple[int, int]) -> None:
    tokens = random_tokens(seed, *shape)
    plain = objective("pg")(tokens)
    for rule in (objective("dppo", delta=math.inf), objective("cppo", delta=math.inf, delta_b=math.inf)):
        terms = rule(tokens)
        assert torch.equal(terms.gate, plain.gate) and torch.equal(terms.surrogate, plain.surrogate)


@given(SEEDS, SHAPES, cppo_settings())
def test_the_prefix_budget_only_removes(seed: int, shape: tuple[int, int], settings: dict[str, Any]) -> None:
    """Kept by CPPO => kept without the budget; kept by DPPO => kept without the budget, since w <= 1."""
    tokens = random_tokens(seed, *shape)
    settings |= {"soft": False}
    without = objective("cppo", **settings | {"delta_b": None})(tokens).gate
    assert (objective("cppo", **settings)(tokens).gate <= without).all()
    assert (objective("dppo", delta=settings["delta"])(tokens).gate <= without).all()


@given(SEEDS, SHAPES, cppo_settings())
def test_soft_gate_is_one_exactly_where_the_hard_one_is(
    seed: int, shape: tuple[int, int], settings: dict[str, Any]
) -> None:
    tokens = random_tokens(seed, *shape)
    soft = objective("cppo", **settings | {"soft": True})(tokens)
    hard = objective("cppo", **settings | {"soft": False})(tokens)
    assert torch.equal(soft.gate == 1, hard.gate == 1)
    assert torch.equal(soft.reason, hard.reason)
    assert ((soft.gate > 0) & (soft.gate <= 1)).all()


@pytest.mark.parametrize("name", names())
@given(SEEDS, SHAPES, st.sampled_from([1e-3, 0.5, 7.0]))
def test_scaling_advantages_changes_no_gate(name: str, seed: int, shape: tuple[int, int], factor: float) -> None:
    tokens = random_tokens(seed, *shape)
    before = objective(name)(tokens)
    after = objective(name)(replace(tokens, advantages=factor * tokens.advantages))
    assert torch.equal(before.gate, after.gate) and torch.equal(before.reason, after.reason)


@pytest.mark.parametrize("name", names())
@given(SEEDS, SHAPES)
def test_on_policy_every_rule_is_reinforce(name: str, seed: int, shape: tuple[int, int]) -> None:
    """rho = 1 everywhere: all gates 1, and the gradient of each token is its advantage."""
    tokens = random_tokens(seed, *shape)
    tokens = replace(tokens, rollout_logp=tokens.logp, divergence=torch.zeros_like(tokens.logp))
    assert (objective(name)(tokens).gate == 1).all()
    _, grad, _ = loss_and_grad(objective(name), tokens, "token-sum")
    torch.testing.assert_close(grad, -tokens.advantages * tokens.mask, atol=ATOL, rtol=0)


def test_log_ratios_are_clamped_at_20() -> None:
    """The one place where a ratio's value at the clamp is visible: the uncapped surrogate."""
    tokens = tie([0.0, 0.0, 0.0], [19.0, 21.0, -21.0])
    expected = torch.tensor([[19.0, 20.0, -20.0]]).exp()
    torch.testing.assert_close(objective("pg", cap=None)(tokens).surrogate, expected)
    _, grad, _ = loss_and_grad(objective("pg", cap=None), tokens, "token-sum")
    torch.testing.assert_close(grad, -torch.tensor([[math.exp(19.0), 0.0, 0.0]]))


# Divergences.


def divergence_loop(p: list[float], q: list[float], kind: str) -> float:
    """TV, or KL in the direction q to p, of two distributions."""
    if kind == "tv":
        return 0.5 * sum(abs(a - b) for a, b in zip(p, q, strict=True))
    return max(0.0, sum(b * math.log(b / a) for a, b in zip(p, q, strict=True) if b > 0))


def restrict(p: list[float], support: list[int]) -> list[float]:
    """The probabilities of `support`, then the rest in one category."""
    kept = [p[v] for v in support]
    return [*kept, max(1 - sum(kept), 1e-12)]


def reduced_loop(p: list[float], q: list[float], y: int, estimator: str, kind: str, k: int) -> float:
    order = sorted(range(len(q)), key=lambda v: -q[v])[:k]
    if estimator == "exact":
        return divergence_loop(p, q, kind)
    if estimator == "binary":
        support = [y]
    elif y in order:
        support = order
    else:
        support = [*order, y] if estimator == "union" else [*order[:-1], y]
    return divergence_loop(restrict(p, support), restrict(q, support), kind)


ESTIMATORS = ("binary", "replace", "union", "exact")


def batched(logp_all: Tensor, rollout_logp_all: Tensor, y: Tensor, estimator: str, kind: Any, k: int) -> Tensor:
    if estimator == "exact":
        return divergences.exact(logp_all, rollout_logp_all, kind)
    logp, rollout_logp = (x.gather(-1, y.unsqueeze(-1)).squeeze(-1) for x in (logp_all, rollout_logp_all))
    if estimator == "binary":
        return divergences.binary(logp, rollout_logp, kind)
    rollout_topk_logp, ids = rollout_logp_all.topk(k, dim=-1)
    shuffled = torch.randperm(k, generator=torch.Generator().manual_seed(k))  # the order of the K must not matter
    rollout_topk_logp, ids = rollout_topk_logp[..., shuffled], ids[..., shuffled]
    topk_logp = logp_all.gather(-1, ids)
    support: Any = estimator
    return divergences.top_k(logp, rollout_logp, topk_logp, rollout_topk_logp, ids.int(), y, kind=kind, support=support)


def distributions(seed: int, vocabulary: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """(log pi, log mu, y) for 3 x 4 tokens; y is uniform, so it is often outside mu's top K."""
    g = torch.Generator().manual_seed(seed)
    z_mu = 2 * torch.randn(3, 4, vocabulary, generator=g, dtype=torch.float64)
    z_pi = z_mu + spread * torch.randn(3, 4, vocabulary, generator=g, dtype=torch.float64)
    return z_pi.log_softmax(-1), z_mu.log_softmax(-1), torch.randint(0, vocabulary, (3, 4), generator=g)


@pytest.mark.parametrize("kind", ["tv", "kl"])
@given(SEEDS, st.integers(2, 9), st.sampled_from([0.0, 0.1, 1.0, 3.0]), st.data())
def test_divergences_are_their_loops_and_ordered(
    kind: str, seed: int, vocabulary: int, spread: float, data: st.DataObject
) -> None:
    """binary <= top-K replace <= top-K union <= exact, at each token."""
    k = data.draw(st.integers(1, vocabulary))
    logp_all, rollout_logp_all, y = distributions(seed, vocabulary, spread)
    results = {e: batched(logp_all, rollout_logp_all, y, e, kind, k) for e in ESTIMATORS}
    for estimator, result in results.items():
        assert result.dtype == torch.float64 and result.shape == y.shape
        for i, t in ((i, t) for i in range(3) for t in range(4)):
            p, q = logp_all[i, t].exp().tolist(), rollout_logp_all[i, t].exp().tolist()
            expected = reduced_loop(p, q, int(y[i, t]), estimator, kind, k)
            assert abs(float(result[i, t]) - expected) < 1e-10
    for smaller, larger in zip(ESTIMATORS, ESTIMATORS[1:], strict=False):
        assert (results[smaller] <= results[larger] + 1e-10).all()


def test_the_estimators_differ() -> None:
    """All four, both kinds and both directions of KL give different numbers somewhere, or the test above is idle."""
    logp_all, rollout_logp_all, y = distributions(seed=3, vocabulary=8, spread=2.0)
    for kind in ("tv", "kl"):
        results = [batched(logp_all, rollout_logp_all, y, e, kind, 3) for e in ESTIMATORS]
        for smaller, larger in zip(results, results[1:], strict=False):
            assert (larger - smaller).max() > 0.01
        backward = batched(rollout_logp_all, logp_all, y, "exact", kind, 3)
        assert ((backward - results[-1]).abs().max() > 0.01) == (kind == "kl")


@given(SEEDS)
def test_sampled_estimators_average_to_the_exact_kl(seed: int) -> None:
    """E[k3] under y ~ mu is KL(mu, pi) exactly; k2 is (ln rho)^2 / 2."""
    logp_all, rollout_logp_all, _ = distributions(seed, vocabulary=7, spread=1.0)
    k3 = divergences.sampled(logp_all, rollout_logp_all, "k3")
    expected = divergences.exact(logp_all, rollout_logp_all, "kl")
    torch.testing.assert_close((rollout_logp_all.exp() * k3).sum(-1), expected, atol=1e-10, rtol=0)
    k2 = divergences.sampled(logp_all, rollout_logp_all, "k2")
    torch.testing.assert_close(k2, (logp_all - rollout_logp_all) ** 2 / 2, atol=ATOL, rtol=ATOL)


@pytest.mark.parametrize("kind", ["tv", "kl"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_divergences_in_half_precision(estimator: str, kind: str) -> None:
    """Computed in float32 whatever comes in, without a gradient, zero for equal policies, and finite at the edges."""
    logp_all, rollout_logp_all, y = (x.bfloat16() if x.is_floating_point() else x for x in distributions(1, 8, 1.0))
    logp_all.requires_grad_()
    result = batched(logp_all, rollout_logp_all, y, estimator, kind, 3)
    assert result.dtype == torch.float32 and not result.requires_grad
    exact_inputs = batched(logp_all.double(), rollout_logp_all.double(), y, estimator, kind, 3)
    torch.testing.assert_close(result, exact_inputs.float(), atol=1e-6, rtol=1e-5)
    assert (batched(logp_all, logp_all, y, estimator, kind, 3) == 0).all()
    certain = torch.tensor([0.0, -80.0, -80.0, -80.0]).expand(1, 2, 4)
    flat = torch.full((1, 2, 4), math.log(0.25))
    for p, q in ((certain, flat), (flat, certain)):
        value = batched(p, q, torch.tensor([[0, 3]]), estimator, kind, 2)
        assert value.isfinite().all() and (value >= 0).all()


def test_binary_of_a_log_probability_above_zero() -> None:
    """bf16 rounding can give one; the binary KL must not take the logarithm of a negative 1 - p."""
    above = torch.tensor([[1e-3, -1e-3]])
    kinds: tuple[divergences.Kind, ...] = ("tv", "kl")
    for kind in kinds:
        result = divergences.binary(above, above.flip(-1), kind)
        assert torch.equal(result, divergences.binary(above.clamp(max=0), above.flip(-1).clamp(max=0), kind))


def test_divergence_arguments_are_checked() -> None:
    x, ids = torch.full((1, 1, 2), -1.0), torch.zeros(1, 1, 2, dtype=torch.int64)
    one, wrong = x[..., 0], "js"
    calls: list[Callable[[Any], Tensor]] = [
        lambda kind: divergences.binary(one, one, kind),
        lambda kind: divergences.sampled(one, one, kind),
        lambda kind: divergences.exact(x, x, kind),
        lambda kind: divergences.top_k(one, one, x, x, ids, ids[..., 0], kind),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="kind: 'js' is not one of"):
            call(wrong)
    bad: Any = wrong
    with pytest.raises(ValueError, match="support: 'js' is not one of 'union', 'replace'"):
        divergences.top_k(one, one, x, x, ids, ids[..., 0], "tv", bad)


def test_ragged_masks_have_holes_and_empty_rows() -> None:
    """The batches of this file are as irregular as they claim."""
    mask = ragged_mask(40, 9, torch.Generator().manual_seed(0))
    lengths = mask.sum(-1)
    last = torch.where(mask, torch.arange(9), -1).amax(-1)
    assert (lengths == 0).any() and (lengths == 1).any() and (last + 1 > lengths).any()
    assert not MANY.mask[:, 0].all() and (MANY.advantages == 0).any()
