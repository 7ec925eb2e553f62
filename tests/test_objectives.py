"""The batched rules and divergences against the same mathematics as slow, obvious loops over Python floats."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from fixture import loss_and_grad, ragged_mask, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import LOOPS, budget, cppo_loop, read

from cppo.objectives import Objective, Reason, Tokens, names, objective, spec
from cppo.objectives.divergence import position_weight, prefix_sums
from cppo.objectives.types import padded_like

ATOL = 1e-12
SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 14))


def check_against_loop(name: str, settings: dict[str, Any], tokens: Tokens) -> Counter[Reason]:
    """Surrogate, gate, reason and gradient of every token; returns how often each reason occurred in the mask."""
    rule = objective(name, **settings)
    terms = rule(tokens)
    _, grad, _ = loss_and_grad(rule, tokens, "token-sum")
    surrogate, gate = torch.zeros_like(tokens.logp), torch.ones_like(tokens.logp)
    reason, expected_grad = torch.zeros_like(tokens.mask, dtype=torch.int64), torch.zeros_like(tokens.logp)
    for i, (columns, row) in enumerate(read(tokens)):
        for t, one in zip(columns, LOOPS[name](row, **vars(rule.params)), strict=True):
            surrogate[i, t], gate[i, t], reason[i, t] = one.surrogate, one.gate, one.reason
            expected_grad[i, t] = -one.gate * one.weight
    assert torch.equal(terms.reason, reason)
    torch.testing.assert_close(terms.gate, gate, atol=ATOL, rtol=0)
    torch.testing.assert_close(terms.surrogate, surrogate, atol=ATOL, rtol=ATOL)
    torch.testing.assert_close(grad, expected_grad, atol=ATOL, rtol=ATOL)
    return Counter(Reason(int(r)) for r in reason[tokens.mask])


def maybe(*values: float) -> st.SearchStrategy[float | None]:
    return st.sampled_from([None, *values])


CLIPS = maybe(0.05, 0.2, 0.5)
CAPS = maybe(0.9, 1.1, 20.0)  # the low ones bind often
SETTINGS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "gpg": {},
    "pg": {"cap": CAPS},
    "ppo": {"clip_low": CLIPS, "clip_high": CLIPS, "dual_clip": maybe(1.3, 3.0)},
    "grpo": {"clip_low": CLIPS, "clip_high": CLIPS, "dual_clip": maybe(1.3, 3.0)},
    "cispo": {"clip_low": CLIPS, "clip_high": CLIPS},
    "minpro": {"clip_low": CLIPS, "clip_high": CLIPS, "cap_prefix_at_1": st.booleans()},
    "sapo": {"tau_pos": st.sampled_from([0.5, 1.0, 3.0]), "tau_neg": st.sampled_from([0.7, 1.05, 3.0])},
    "drpo": {"delta": st.sampled_from([0.15, 12.5]), "weight_by_mu": st.booleans()},
    "gspo": {"clip_low": maybe(3e-4, 0.1), "clip_high": maybe(4e-4, 0.15)},
    "gmpo": {"clip_low": st.sampled_from([0.1, 0.4]), "clip_high": st.sampled_from([0.2, 0.5])},
    "trm": {"delta_max": st.sampled_from([0.02, 0.1]), "delta_mean": maybe(0.01, 0.03), "cap": CAPS},
    "dppo": {"delta": st.sampled_from([0.005, 0.02, 0.15]), "cap": CAPS},
    "cppo": {
        "delta": st.sampled_from([0.03, 0.08, 0.15]),
        "w_min": st.sampled_from([0.3, 0.8, 1.0]),
        "delta_b": st.sampled_from([0.01, 0.02, 0.01, 0.02, None]),
        "adaptive": st.booleans(),
        "quantile": st.sampled_from([0.5, 0.9, 1.0]),
        "clamp_factor": st.sampled_from([1.0, 2.0, 5.0]),
        "span": st.sampled_from([None, None, 14, 40]),
        "shuffle": st.booleans(),
        "soft": st.booleans(),
        "cap": CAPS,
    },
}
"""Every setting of every rule, drawn from values that matter on the random batches."""


def test_every_rule_has_a_loop_and_every_setting_a_range() -> None:
    assert set(names()) == set(LOOPS) == set(SETTINGS)
    for name in names():
        assert set(vars(objective(name).params)) == set(SETTINGS[name]), name


@pytest.mark.parametrize("name", SETTINGS)
@given(SEEDS, SHAPES, st.data())
def test_rule_is_its_loop(name: str, seed: int, shape: tuple[int, int], data: st.DataObject) -> None:
    settings = data.draw(st.fixed_dictionaries(SETTINGS[name]))
    check_against_loop(name, settings, random_tokens(seed, *shape))


@pytest.mark.parametrize("name", SETTINGS)
def test_rule_is_its_loop_by_default(name: str) -> None:
    """The same on one large batch, and the rule masks some tokens and not others there, if it masks any."""
    reasons = check_against_loop(name, {}, MANY)
    assert reasons[Reason.KEPT] > 20
    assert (reasons.total() > reasons[Reason.KEPT]) == (name not in ("gpg", "pg", "cispo", "minpro", "sapo", "drpo"))


@pytest.mark.parametrize("settings", [{"delta_max": None, "delta_mean": 0.02}, {"delta_max": 0.05, "delta_mean": 0.02}])
def test_trm_by_the_mean_is_its_loop(settings: dict[str, Any]) -> None:
    reasons = check_against_loop("trm", settings, MANY)
    assert reasons[Reason.KEPT] > 20 and reasons[Reason.SEQUENCE] > 20
    assert not torch.equal(objective("trm", **settings)(MANY).gate, objective("trm", delta_max=0.05)(MANY).gate)


CPPO_SETTINGS = st.fixed_dictionaries(SETTINGS["cppo"])

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
    delta_b = prefix_sums(rule.params, padded_like(MANY)).delta_b
    expected = [budget(row, 0.02, True, 0.9, 2.0) if row else 0.02 for _, row in read(MANY)]
    torch.testing.assert_close(delta_b, torch.tensor(expected, dtype=torch.float64), atol=ATOL, rtol=0)
    between = (delta_b > 0.02) & (delta_b < 0.04)
    assert (delta_b == 0.02).sum() > 10 and between.sum() > 10 and (delta_b == 0.04).sum() > 10


@pytest.mark.parametrize("wrong", ["only kept tokens", "only tokens moving away"])
def test_the_batch_notices_which_tokens_enter_the_prefix(wrong: str) -> None:
    """Sums over fewer tokens than all give other reasons, in at least two responses of this batch."""
    kept_only = wrong == "only kept tokens"
    settings = vars(objective("cppo", delta=0.06, adaptive=False).params)
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
    "gpg": {},
    "minpro": {"clip_low": None, "clip_high": 0.28, "cap_prefix_at_1": False},
    "sapo": {"tau_pos": 1.0, "tau_neg": 1.05},
    "drpo": {"delta": 12.5, "weight_by_mu": True},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4},
    "gmpo": {"clip_low": 0.4, "clip_high": 0.4},
    "trm": {"delta_max": 0.05, "delta_mean": None, "cap": 20.0},
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


@pytest.mark.parametrize("name", names())
def test_defaults_are_the_papers(name: str) -> None:
    """CPPO (arXiv:2606.10968) Table 3 for a dense Base model, and each baseline's paper or release."""
    assert vars(objective(name).params) == PAPER[name]


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


def test_trm_thresholds_are_not_strict() -> None:
    """Largest divergence .25 and mean .125, each equal to its threshold, then a hair above."""
    tokens = tie([0.25, 0.0])
    above = replace(tokens, divergence=torch.tensor([[0.25 + 2**-20, 0.0]]))
    for rule in (objective("trm", delta_max=0.25), objective("trm", delta_max=None, delta_mean=0.125)):
        assert rule(tokens).gate.tolist() == [[1, 1]]
        assert rule(above).gate.tolist() == [[0, 0]]


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
            threshold = prefix_sums(hard.params, padded_like(tokens)).threshold
            weight = prefix_sums(hard.params, padded_like(replace(tokens, divergence=torch.ones(1, 200)))).weighted
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
        for field in ("surrogate", "gate", "reason"):
            assert torch.equal(getattr(ours, field), getattr(theirs, field))


def unchecked(name: str, **params: Any) -> Objective:
    """The objective with parameters that need not be finite, which `objective` refuses."""
    return Objective(spec(name), spec(name).params(**params))


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
            with_budget = unchecked("cppo", delta=0.03, delta_b=delta_b, adaptive=adaptive)(tokens)
            without = objective("cppo", delta=0.03, delta_b=None)(tokens)
            assert torch.equal(with_budget.reason, without.reason)
            assert torch.equal(with_budget.gate, without.gate)


@given(SEEDS, SHAPES)
def test_infinite_thresholds_are_the_policy_gradient(seed: int, shape: tuple[int, int]) -> None:
    tokens = random_tokens(seed, *shape)
    plain = objective("pg")(tokens)
    for rule in (unchecked("dppo", delta=math.inf), unchecked("cppo", delta=math.inf, delta_b=math.inf)):
        terms = rule(tokens)
        assert torch.equal(terms.gate, plain.gate) and torch.equal(terms.surrogate, plain.surrogate)


@given(SEEDS, SHAPES, CPPO_SETTINGS)
def test_the_prefix_budget_only_removes(seed: int, shape: tuple[int, int], settings: dict[str, Any]) -> None:
    """Kept by CPPO => kept without the budget; kept by DPPO => kept without the budget, since w <= 1."""
    tokens = random_tokens(seed, *shape)
    settings |= {"soft": False}
    without = objective("cppo", **settings | {"delta_b": None})(tokens).gate
    assert (objective("cppo", **settings)(tokens).gate <= without).all()
    assert (objective("dppo", delta=settings["delta"])(tokens).gate <= without).all()


@given(SEEDS, SHAPES, CPPO_SETTINGS)
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
@settings(max_examples=15)
@given(SEEDS, SHAPES, st.sampled_from([1e-3, 0.5, 7.0]))
def test_scaling_advantages_changes_no_gate(name: str, seed: int, shape: tuple[int, int], factor: float) -> None:
    tokens = random_tokens(seed, *shape)
    before = objective(name)(tokens)
    after = objective(name)(replace(tokens, advantages=factor * tokens.advantages))
    assert torch.equal(before.gate, after.gate) and torch.equal(before.reason, after.reason)


@pytest.mark.parametrize("name", names())
@settings(max_examples=15)
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


def test_gspo_limits_the_mean_log_ratio_at_10() -> None:
    surrogate = objective("gspo")(tie([0.0, 0.0], [12.0, 14.0])).surrogate
    torch.testing.assert_close(surrogate, torch.full((1, 2), math.exp(10.0)))


@pytest.mark.parametrize("soft", [False, True])
def test_a_divergence_with_a_gradient_gets_none(soft: bool) -> None:
    """`cppo.divergences` gives none, other code may: the gate is a number all the same."""
    tokens = tie([0.05, 0.3, 0.3])
    assert tokens.divergence is not None
    tokens.divergence.requires_grad_()
    terms = objective("cppo", soft=soft)(replace(tokens, logp=tokens.logp.requires_grad_()))
    assert not terms.gate.requires_grad and (terms.gate < 1).any()
    loss = (terms.gate * terms.surrogate).sum()
    (grad,) = torch.autograd.grad(loss, tokens.divergence, allow_unused=True)
    assert grad is None


def test_ragged_masks_have_holes_and_empty_rows() -> None:
    """The batches of this file are as irregular as they claim."""
    mask = ragged_mask(40, 9, torch.Generator().manual_seed(0))
    lengths = mask.sum(-1)
    last = torch.where(mask, torch.arange(9), -1).amax(-1)
    assert (lengths == 0).any() and (lengths == 1).any() and (last + 1 > lengths).any()
    assert not MANY.mask[:, 0].all() and (MANY.advantages == 0).any()


def test_weights_stay_at_w_min_beyond_the_span() -> None:
    """A padded horizon shorter than a response: the weights fall over it, then stay, instead of going on to fall."""
    mask = torch.ones(1, 9, dtype=torch.bool)
    tokens = random_tokens(0, 1, 9, mask)
    for w_min in (0.8, 0.1):
        rule = objective("cppo", span=5, w_min=w_min)
        weight = prefix_sums(rule.params, replace(tokens, divergence=torch.ones_like(tokens.logp))).weighted
        step = (1 - w_min) / 4
        expected = [1 - step * t for t in range(5)] + [w_min] * 4
        torch.testing.assert_close(weight, torch.tensor([expected], dtype=torch.float64))
    one = prefix_sums(objective("cppo", span=1).params, replace(tokens, divergence=torch.ones_like(tokens.logp)))
    torch.testing.assert_close(one.weighted[0, :2], torch.tensor([1.0, 0.8], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_position_weight(dtype: torch.dtype) -> None:
    """One function for the rule, the theory and the figures; its span is a number or one of each response."""
    position = torch.arange(1, 7, dtype=dtype)
    expected = torch.tensor([1 - 0.2 * min(t / 4, 1) for t in range(6)], dtype=dtype)
    torch.testing.assert_close(position_weight(position, 5, 0.8), expected)
    by_row = position_weight(position.expand(2, 6), torch.tensor([[5], [3]]), 0.8)
    assert by_row.dtype == dtype
    torch.testing.assert_close(by_row[0], expected)
    torch.testing.assert_close(by_row[1], torch.tensor([1, 0.9, 0.8, 0.8, 0.8, 0.8], dtype=dtype))
    assert position_weight(torch.ones(1), 1, 0.5).item() == 1
