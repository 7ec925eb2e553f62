"""What every registered objective must do, whatever its mathematics. A new one is tested here without a line of code.

A fault of these kinds makes a loss depend on padding, on the micro-batch size or on the order of rows.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from fixture import AGGREGATIONS, loss_and_grad, random_tokens, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cppo.loss import Aggregation, batch_denominator
from cppo.objectives import Objective, Reason, Terms, Tokens, names, objective

EXTRA: dict[str, tuple[str, dict[str, Any]]] = {
    "cppo-shuffle": ("cppo", {"delta": 0.06, "shuffle": True}),
    "cppo-soft": ("cppo", {"delta": 0.06, "soft": True}),
    "cppo-span": ("cppo", {"delta": 0.06, "span": 50}),
    "cppo-fixed": ("cppo", {"delta": 0.06, "adaptive": False}),
    "cppo-no-prefix": ("cppo", {"delta": 0.02, "delta_b": None}),
    "cppo-differentiable": ("cppo", {"delta": 0.06, "cap": None}),
    "dppo-tight": ("dppo", {"delta": 0.02, "cap": None}),
    "ppo-dual": ("ppo", {"dual_clip": 1.3}),
    "cispo-two-sided": ("cispo", {"clip_low": 0.2, "clip_high": 0.2}),
}
"""Settings besides the defaults: those that read other inputs, and some under which more tokens are masked."""

RULES: dict[str, Objective] = {name: objective(name) for name in names()}
RULES |= {label: objective(name, **settings) for label, (name, settings) in EXTRA.items()}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
each_mode = pytest.mark.parametrize("mode", AGGREGATIONS)
two_modes = pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
"""Where only the rule is in question, not the reduction."""

SEEDS = st.integers(0, 2**32 - 1)
EXACT: dict[str, Any] = {"atol": 1e-12, "rtol": 1e-12}


def by_hand() -> Tensor:
    """bool [8, 10]: a full row, holes at the start, inside and at the end, one token, none, and one token late."""
    patterns = "1111111111 0011111100 1101101100 1000000000 0000000000 0000010000 1111111000 1010101010"
    return torch.tensor([[c == "1" for c in pattern] for pattern in patterns.split()])


BATCH = random_tokens(seed=91, batch=8, width=10, mask=by_hand())


def test_the_batch_has_masked_tokens() -> None:
    """In the batch of this file every rule that masks does so, or equal losses would show little."""
    for (
        label
    ) in "ppo grpo gspo gmpo trm cppo cppo-shuffle cppo-soft cppo-fixed cppo-no-prefix dppo-tight ppo-dual".split():
        assert (RULES[label](BATCH).gate < 1).any(), label
    for reason in (Reason.THRESHOLD, Reason.BUDGET):
        assert (RULES["cppo"](BATCH).reason == reason).any()
    for sign in (-1, 0, 1):
        assert (BATCH.advantages.sign()[BATCH.mask] == sign).any()


def widen(tokens: Tokens, columns: int) -> Tokens:
    """`columns` more columns of padding."""

    def pad(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, columns))

    return Tokens(**{name: pad(x) for name, x in vars(tokens).items() if x is not None})


def with_garbage(tokens: Tokens, value: float) -> Tokens:
    """`value` in every field outside the mask."""

    def spoil(x: Tensor) -> Tensor:
        if x.dtype == torch.bool:
            return x
        return torch.where(tokens.mask, x, value if x.is_floating_point() else -(2**62))

    return Tokens(**{name: spoil(x) for name, x in vars(tokens).items() if x is not None})


def assert_same(one: tuple[Tensor, Tensor, Any], other: tuple[Tensor, Tensor, Any]) -> None:
    """Equal losses, gradients and metrics."""
    torch.testing.assert_close(one[0], other[0], **EXACT)
    torch.testing.assert_close(one[1], other[1], **EXACT)
    assert one[2].keys() == other[2].keys()
    for name in one[2]:
        assert one[2][name] == pytest.approx(other[2][name], rel=1e-12, abs=1e-12), name


@each_rule
@each_mode
def test_padding_changes_nothing(rule: Objective, mode: Aggregation) -> None:
    """Neither what it holds nor how much of it there is."""
    clean = loss_and_grad(rule, with_garbage(BATCH, 0.0), mode)
    assert_same(loss_and_grad(rule, with_garbage(BATCH, torch.inf), mode), clean)
    loss, grad, metrics = loss_and_grad(rule, with_garbage(widen(BATCH, 5), torch.nan), mode)
    assert_same((loss, grad[:, :10], metrics), clean)
    assert (grad[~widen(BATCH, 5).mask] == 0).all()
    assert (clean[1] != 0).any()


@each_rule
def test_padding_is_kept_with_nothing_to_maximise(rule: Objective) -> None:
    terms = rule(with_garbage(BATCH, torch.nan))
    assert (terms.surrogate[~BATCH.mask] == 0).all()
    assert (terms.gate[~BATCH.mask] == 1).all()
    assert (terms.reason[~BATCH.mask] == Reason.KEPT).all()


@each_rule
@two_modes
def test_row_order_changes_nothing(rule: Objective, mode: Aggregation) -> None:
    order = [5, 2, 7, 0, 4, 6, 1, 3]
    loss, grad, metrics = loss_and_grad(rule, BATCH, mode)
    assert_same(loss_and_grad(rule, rows(BATCH, order), mode), (loss, grad[order], metrics))


@each_rule
@each_mode
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1, 1, 1), (3, 5)])
def test_micro_batches_add_up(rule: Objective, mode: Aggregation, sizes: tuple[int, ...]) -> None:
    """Loss, gradient and metrics of the parts, each over the whole step's denominator, sum to those of the whole."""
    whole = loss_and_grad(rule, BATCH, mode)
    denominator = batch_denominator(BATCH.mask, mode)
    loss, grads, shares, start = torch.zeros_like(whole[0]), [], 0.0, 0
    metrics: dict[str, tuple[float, float]] = {}
    for size in sizes:
        part = rows(BATCH, slice(start, start + size))
        start += size
        part_loss, part_grad, part_metrics = loss_and_grad(rule, part, mode, denominator)
        loss += part_loss
        grads.append(part_grad)
        shares += batch_denominator(part.mask, mode)
        for name, (total, count) in part_metrics.items():
            before = metrics.get(name, (0.0, 0.0))
            metrics[name] = (before[0] + total, before[1] + count)
    assert_same((loss, torch.cat(grads), metrics), whole)
    assert shares == denominator


@each_rule
@settings(max_examples=15)
@given(SEEDS, st.integers(1, 4), st.integers(1, 9))
def test_padding_order_and_split_on_random_batches(rule: Objective, seed: int, batch: int, width: int) -> None:
    """The three together on batches nobody chose: spoil the padding, reverse the rows, one row at a time."""
    tokens = random_tokens(seed, batch, width)
    loss, grad, metrics = loss_and_grad(rule, tokens, "token-mean")
    denominator = max(batch_denominator(tokens.mask, "token-mean"), 1.0)
    spoilt = with_garbage(widen(tokens, 2), torch.nan)
    parts = [loss_and_grad(rule, rows(spoilt, [i]), "token-mean", denominator) for i in reversed(range(batch))]
    torch.testing.assert_close(sum((part[0] for part in parts), torch.tensor(0.0).double()), loss, **EXACT)
    torch.testing.assert_close(torch.cat([part[1] for part in parts])[:, :width], grad.flip(0), **EXACT)
    for name in metrics:
        assert sum(part[2][name][1] for part in parts) == metrics[name][1]


@each_rule
@each_mode
def test_nothing_to_train(rule: Objective, mode: Aggregation) -> None:
    """A wholly empty batch, whatever it holds: loss 0 and gradient 0, never NaN."""
    empty = with_garbage(replace(BATCH, mask=torch.zeros_like(BATCH.mask)), torch.nan)
    loss, grad, metrics = loss_and_grad(rule, empty, mode)
    assert loss == 0 and (grad == 0).all()
    assert all(value == (0.0, 0.0) for value in metrics.values())


@each_rule
@each_mode
def test_empty_rows_change_no_gradient(rule: Objective, mode: Aggregation) -> None:
    """B+ counts rows that have a trained token."""
    some = [0, 1, 3, 6]
    alone, among = rows(BATCH, some), rows(BATCH, [4, 0, 1, 4, 3, 6, 4])
    assert not BATCH.mask[4].any()
    loss, grad, metrics = loss_and_grad(rule, among, mode)
    assert_same((loss, grad[[1, 2, 4, 5]], metrics), loss_and_grad(rule, alone, mode))
    assert (grad[[0, 3, 6]] == 0).all()


@each_rule
@two_modes
def test_single_tokens(rule: Objective, mode: Aggregation) -> None:
    """T = 1, in a tensor of width 1 and alone in a wider one: the same finite numbers."""
    columns = [0, 0, 0, 0, 0, 5, 0, 0]
    first = rows(BATCH, [3, 5])
    narrow = Tokens(**{name: x[[3, 5], [columns[3], columns[5]]].unsqueeze(-1) for name, x in vars(BATCH).items()})
    wide, thin = loss_and_grad(rule, first, mode), loss_and_grad(rule, narrow, mode)
    assert thin[0].isfinite() and thin[1].isfinite().all()
    assert_same((thin[0], thin[1].squeeze(-1), thin[2]), (wide[0], wide[1][[0, 1], [0, 5]], wide[2]))


@each_rule
@two_modes
def test_holes_are_skipped(rule: Objective, mode: Aggregation) -> None:
    """A response with tool tokens inside counts as the same response without them."""
    spread = rows(BATCH, [2, 7])
    columns = [[t for t in range(10) if spread.mask[i, t]] for i in range(2)]
    length = max(len(c) for c in columns)

    def close_up(x: Tensor) -> Tensor:
        out = torch.zeros(2, length, dtype=x.dtype)
        for i, c in enumerate(columns):
            out[i, : len(c)] = x[i, c]
        return out

    closed = Tokens(**{name: close_up(x) for name, x in vars(spread).items()})
    loss, grad, metrics = loss_and_grad(rule, spread, mode)
    assert_same((loss, close_up(grad), metrics), loss_and_grad(rule, closed, mode))


def as_dtype(tokens: Tokens, dtype: torch.dtype) -> Tokens:
    return Tokens(**{name: x.to(dtype) if x.is_floating_point() else x for name, x in vars(tokens).items()})


@each_rule
@two_modes
def test_half_precision_is_computed_in_float32(rule: Objective, mode: Aggregation) -> None:
    """bfloat16 inputs give exactly what their float32 copies give; only the gradient is rounded on the way back."""
    half = as_dtype(BATCH, torch.bfloat16)
    loss, grad, metrics = loss_and_grad(rule, half, mode)
    loss_32, grad_32, metrics_32 = loss_and_grad(rule, as_dtype(half, torch.float32), mode)
    assert loss.dtype == torch.float32 and grad.dtype == torch.bfloat16
    assert torch.equal(loss, loss_32) and metrics == metrics_32
    assert torch.equal(grad, grad_32.bfloat16())
    assert rule(half).gate.dtype == torch.float32


@each_rule
def test_float64_stays_float64(rule: Objective) -> None:
    terms = rule(BATCH)
    assert terms.surrogate.dtype == terms.gate.dtype == torch.float64 and terms.reason.dtype == torch.int64


@each_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_ratios_stay_finite(rule: Objective, dtype: torch.dtype) -> None:
    """Log-ratios of +-50, as a broken engine would give them."""
    shift = torch.where(torch.arange(10) % 2 == 0, 50.0, -50.0)
    low, high = BATCH.rollout_logp.clamp(max=0) - 50, BATCH.rollout_logp.clamp(max=0)
    logp = torch.where(shift > 0, high, low)
    rollout_logp = torch.where(shift > 0, low, high)
    assert BATCH.divergence is not None
    for divergence in (BATCH.divergence, torch.ones_like(logp)):
        tokens = as_dtype(replace(BATCH, logp=logp, rollout_logp=rollout_logp, divergence=divergence), dtype)
        loss, grad, metrics = loss_and_grad(rule, tokens, "token-sum")
        assert loss.isfinite() and grad.isfinite().all()
        assert all(torch.tensor(value).isfinite().all() for value in metrics.values())


def assert_equal_terms(one: Terms, other: Terms) -> None:
    """Equal bit for bit."""
    for name, value in vars(one).items():
        assert torch.equal(value, getattr(other, name)), name


def assert_gate_is_well_formed(terms: Terms) -> None:
    assert not terms.gate.requires_grad and not terms.reason.requires_grad
    assert ((terms.gate >= 0) & (terms.gate <= 1)).all()
    assert torch.equal(terms.gate == 1, terms.reason == Reason.KEPT)


@each_rule
@settings(max_examples=15)
@given(SEEDS, st.integers(1, 6), st.integers(1, 12))
def test_gate_is_a_share_with_a_reason(rule: Objective, seed: int, batch: int, width: int) -> None:
    """In [0, 1], without a gradient, and 1 exactly where the reason is KEPT; in float32 too."""
    tokens = random_tokens(seed, batch, width)
    for dtype in (torch.float64, torch.float32):
        cast = as_dtype(tokens, dtype)
        terms = rule(replace(cast, logp=cast.logp.requires_grad_()))
        assert_gate_is_well_formed(terms)
        assert terms.surrogate.requires_grad


@each_rule
def test_rows_without_advantage_have_no_gradient(rule: Objective) -> None:
    """Zero-variance groups stay in the batch with A = 0: no gradient of their own, and none for the others."""
    quiet = [0, 2, 5]
    advantages = BATCH.advantages.clone()
    advantages[quiet] = 0
    _, grad, metrics = loss_and_grad(rule, replace(BATCH, advantages=advantages), "token-sum")
    assert (grad[quiet] == 0).all() and (grad != 0).any()
    others = [1, 3, 4, 6, 7]
    _, expected, _ = loss_and_grad(rule, rows(BATCH, others), "token-sum")
    torch.testing.assert_close(grad[others], expected, **EXACT)
    assert metrics["mask_share"][1] == float((BATCH.mask & (advantages != 0)).sum())


@each_rule
def test_inputs_are_not_modified(rule: Objective) -> None:
    tokens = with_garbage(BATCH, torch.nan)
    before = {name: x.clone() for name, x in vars(tokens).items()}
    loss_and_grad(rule, tokens, "token-mean")
    rule(tokens)
    for name, value in vars(tokens).items():
        torch.testing.assert_close(value, before[name], atol=0, rtol=0, equal_nan=True)


@each_rule
def test_no_gradient_reaches_the_other_fields(rule: Objective) -> None:
    """Only `logp` is trained: the gate is detached, and metrics hold no graph."""
    leaf = BATCH.logp.clone().requires_grad_()
    terms = rule(replace(BATCH, logp=leaf))
    assert terms.surrogate.requires_grad and not terms.gate.requires_grad
    _, _, metrics = loss_and_grad(rule, BATCH, "token-mean")
    assert all(type(x) is float for value in metrics.values() for x in value)


@each_rule
def test_divergence_is_required_where_it_is_read(rule: Objective) -> None:
    without = replace(BATCH, divergence=None)
    if rule.spec.divergence:
        with pytest.raises(ValueError, match=f"objective {rule.name} needs tokens.divergence"):
            rule(without)
    else:
        assert_equal_terms(rule(without), rule(BATCH))


@pytest.mark.parametrize("name", names())
def test_position_only_matters_to_a_shuffle(name: str) -> None:
    """By default a token's weight comes from its own order, so `position` is not read."""
    assert_equal_terms(objective(name)(replace(BATCH, position=None)), objective(name)(BATCH))


def test_cppo_shuffle_reads_positions() -> None:
    """The identity permutation is no shuffle; another one changes some gate; leaving it out is an error."""
    plain, shuffled = objective("cppo", delta=0.06, w_min=0.1), objective("cppo", delta=0.06, w_min=0.1, shuffle=True)
    identity = replace(BATCH, position=BATCH.mask.cumsum(-1))
    assert torch.equal(shuffled(identity).gate, plain(BATCH).gate)
    reversed_order = BATCH.mask.sum(-1, keepdim=True) + 1 - BATCH.mask.cumsum(-1)
    assert not torch.equal(shuffled(replace(BATCH, position=reversed_order)).gate, plain(BATCH).gate)
    with pytest.raises(ValueError, match=r"shuffle=True needs tokens\.position"):
        shuffled(replace(BATCH, position=None))
