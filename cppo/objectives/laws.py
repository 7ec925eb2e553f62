"""Laws that every objective must keep, whatever its mathematics; `cppo check my_module:my_rule` checks them.

Where a law is broken, the loss depends on padding, on the size of micro-batches or on the order of rows, or the gradient is
not what the rule says. A law is a function of an objective and a batch, and raises AssertionError when it is broken.

Legend: B responses, T tokens.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cppo.loss import Aggregation, Metrics, batch_denominator, policy_loss
from cppo.objectives import Objective, Reason, Terms, Tokens
from cppo.objectives.registry import NEEDS
from cppo.objectives.types import padded_like

MODES: tuple[Aggregation, ...] = get_args(Aggregation)
TWO_MODES: tuple[Aggregation, ...] = ("token-mean", "seq-mean-token-mean")
"""The aggregations for laws that are about the rule alone, not about the reduction."""

Result = tuple[Tensor, Tensor, Metrics]
"""Loss, its gradient in `logp` [B, T], metrics."""


def example() -> Tokens:
    """A float64 batch of 8 responses: full, with holes, single tokens, empty; small and large drift, A of every sign."""
    patterns = [
        "1111111111",
        "0011111100",
        "1101101100",
        "1000000000",
        "0000000000",
        "0000010000",
        "1111111000",
        "1010101010",
    ]
    mask = torch.tensor([[c == "1" for c in pattern] for pattern in patterns])
    g = torch.Generator().manual_seed(1)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    rollout_logp = -3 * uniform(8, 10)
    logp = rollout_logp + uniform(8, 10) - 0.5 + (uniform(8, 1) - 0.5)
    by_row = torch.tensor([1.0, -0.5, 0.8, -1.0, 1.0, 0.7, 0.0, -0.6], dtype=torch.float64).unsqueeze(-1)
    by_token = (torch.arange(8) % 5 == 2).unsqueeze(-1)  # as GAE gives them
    advantages = torch.where(by_token, 2 * uniform(8, 10) - 1, by_row.expand(8, 10))
    scale = torch.tensor([0.08, 0.1, 0.01, 0.3, 1, 0.2, 0.05, 0.06], dtype=torch.float64).unsqueeze(-1)
    order = torch.where(mask, uniform(8, 10), 2.0)
    position = torch.where(mask, order.argsort(-1).argsort(-1) + 1, 0)
    return Tokens(logp, rollout_logp, advantages, mask, scale * -uniform(8, 10).log(), position)


EXAMPLE = example()


# Helpers: batches -----------------------------------------------------------------------------------------------------


def each_field(tokens: Tokens, change: Callable[[Tensor], Tensor]) -> Tokens:
    """The tokens with `change` applied to every field that is not None."""
    return Tokens(**{name: change(x) for name, x in vars(tokens).items() if x is not None})


def rows(tokens: Tokens, index: Tensor | list[int] | slice) -> Tokens:
    """The batch of some rows."""
    return each_field(tokens, lambda x: x[index])


def widened(tokens: Tokens, columns: int) -> Tokens:
    """The batch with so many more columns of padding."""
    return each_field(tokens, lambda x: torch.nn.functional.pad(x, (0, columns)))


def spoiled(tokens: Tokens, value: float) -> Tokens:
    """The batch with `value` in every field outside the mask."""

    def spoil(x: Tensor) -> Tensor:
        return torch.where(tokens.mask, x, value if x.is_floating_point() else -(2**62))

    return replace(each_field(replace(tokens, mask=tokens.logp), spoil), mask=tokens.mask)


def cast(tokens: Tokens, dtype: torch.dtype) -> Tokens:
    """The batch with its floating-point fields in `dtype`."""
    return each_field(tokens, lambda x: x.to(dtype) if x.is_floating_point() else x)


# Helpers: results -----------------------------------------------------------------------------------------------------


def terms_of(rule: Objective, tokens: Tokens) -> Terms:
    """The rule's terms on a copy, so that a rule which writes into its input breaks no other law."""
    return rule(each_field(tokens, torch.clone))


def result_of(rule: Objective, tokens: Tokens, mode: Aggregation, denominator: float | None = None) -> Result:
    """Loss, gradient in `logp` (0 where the loss does not depend on it) and metrics, on a copy."""
    copy = each_field(tokens, lambda x: x.detach().clone())
    leaf = copy.logp.requires_grad_()
    horizon = 6 if mode == "seq-mean-token-sum-norm" else None
    loss, metrics = policy_loss(rule, copy, mode, horizon, denominator)
    if not loss.requires_grad:
        return loss, torch.zeros_like(leaf), metrics
    (grad,) = torch.autograd.grad(loss, leaf, allow_unused=True, materialize_grads=True)
    return loss.detach(), grad, metrics


def require(condition: object, message: str) -> None:
    """Raise AssertionError unless the condition holds (also under `python -O`)."""
    if not condition:
        raise AssertionError(message)


def require_close(result: Tensor, expected: Tensor, what: str, tolerance: float = 1e-11) -> None:
    """Raise AssertionError, saying by how much they differ, unless two tensors are close."""
    if not torch.allclose(result, expected, rtol=tolerance, atol=tolerance):
        raise AssertionError(f"{what} differs by up to {float((result - expected).abs().max()):.3g}")


def require_same(result: Result, expected: Result, when: str) -> None:
    """Raise AssertionError unless losses, gradients and metrics are close."""
    require_close(result[0], expected[0], f"{when}: the loss")
    require_close(result[1], expected[1], f"{when}: the gradient")
    require(result[2].keys() == expected[2].keys(), f"{when}: other metrics")
    for name in expected[2]:
        one, other = (torch.tensor(m[2][name], dtype=torch.float64) for m in (result, expected))
        require_close(one, other, f"{when}: the metric {name}")


def require_equal_terms(result: Terms, expected: Terms, when: str, *fields: str) -> None:
    """Raise AssertionError unless these fields of the terms are equal bit for bit."""
    for name in fields or ("surrogate", "gate", "reason"):
        same = torch.equal(getattr(result, name).nan_to_num(), getattr(expected, name).nan_to_num())
        require(same, f"{when}: another {name}")


class SeenDtypes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, collects the dtypes of all results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen |= {x.dtype for x in (out if isinstance(out, tuple | list) else (out,)) if isinstance(x, Tensor)}
        return out


# The laws -------------------------------------------------------------------------------------------------------------


def padding_changes_nothing(rule: Objective, tokens: Tokens = EXAMPLE) -> None:
    """Neither what padding holds nor how much of it there is changes loss, gradient or metrics."""
    for mode in MODES:
        clean, width = result_of(rule, spoiled(tokens, 0.0), mode), tokens.mask.shape[1]
        require_same(result_of(rule, spoiled(tokens, torch.inf), mode), clean, f"{mode}, infinities in the padding")
        loss, grad, metrics = result_of(rule, spoiled(widened(tokens, 5), torch.nan), mode)
        require_same((loss, grad[:, :width], metrics), clean, f"{mode}, five more columns of NaN")


def padding_has_no_gradient(rule: Objective, tokens: Tokens = EXAMPLE) -> None:
    """Outside the mask the gradient and the surrogate are 0, and the token counts as kept."""
    spoilt, outside = spoiled(widened(tokens, 1), torch.nan), ~widened(tokens, 1).mask
    terms, (_, grad, _) = terms_of(rule, spoilt), result_of(rule, spoilt, "token-sum")
    require((grad[outside] == 0).all(), "padding has a gradient")
    require((terms.surrogate[outside] == 0).all(), "padding has a surrogate")
    require(((terms.gate == 1) & (terms.reason == Reason.KEPT))[outside].all(), "padding is not KEPT with gate 1")


def row_order_changes_nothing(rule: Objective, tokens: Tokens = EXAMPLE) -> None:
    """Shuffling the responses of a batch shuffles the gradient and changes nothing else."""
    count = tokens.mask.shape[0]
    for mode in TWO_MODES:
        loss, grad, metrics = result_of(rule, tokens, mode)
        for order in (torch.arange(count).flip(0), torch.arange(count).roll(count // 2)):
            require_same(result_of(rule, rows(tokens, order), mode), (loss, grad[order], metrics), f"{mode}, shuffled")


def micro_batches_add_up(rule: Objective, tokens: Tokens = EXAMPLE) -> None:
    """Parts of a batch, each over the whole step's denominator, sum to the whole, in every aggregation."""
    count = tokens.mask.shape[0]
    for mode in MODES:
        whole = result_of(rule, tokens, mode)
        denominator = max(batch_denominator(tokens.mask, mode), 1.0)
        for size in {1, max(1, count // 3)}:
            parts = [
                result_of(rule, rows(tokens, slice(start, start + size)), mode, denominator)
                for start in range(0, count, size)
            ]
            metrics = {
                name: (sum(part[2][name][0] for part in parts), sum(part[2][name][1] for part in parts))
                for name in whole[2]
            }
            total = torch.stack([part[0] for part in parts]).sum()
            gradient = torch.cat([part[1] for part in parts])
            require_same((total, gradient, metrics), whole, f"{mode}, micro-batches of {size}")


def empty_batches_are_harmless(rule: Objective, tokens: Tokens = EXAMPLE) -> None:
    """A batch without a trained token, or without a row, has loss 0, gradient 0 and empty metrics, never NaN."""
    untrained = spoiled(replace(tokens, mask=torch.zeros_like(tokens.mask)), torch.nan)
    for empty in (untrained, rows(tokens, slice(0, 0))):
        for mode in MODES:
            loss, grad, metrics = result_of(rule, empty, mode)
            where = f"{mode}, {len(empty.mask)} rows"
            require(loss == 0 and (grad == 0).all(), f"{where}: loss or gradient is not 0")
            require(all(value == (0.0, 0.0) for value in metrics.values()), f"{where}: a metric counts something")


def empty_rows_change_nothing(rule: Objective, tokens: Tokens = EXAMPLE) -> None:
    """Responses without a trained token change no loss, gradient or metric of the others."""
    nothing = spoiled(replace(tokens, mask=torch.zeros_like(tokens.mask)), torch.nan)
    among = Tokens(
        **{name: torch.cat([getattr(nothing, name), x]) for name, x in vars(tokens).items() if x is not None}
    )
    count = tokens.mask.shape[0]
    for mode in MODES:
        loss, grad, metrics = result_of(rule, among, mode)
        require_same((loss, grad[count:], metrics), result_of(rule, tokens, mode), f"{mode}, beside empty rows")
        require((grad[:count] == 0).all(), f"{mode}: empty rows have a gradient")


def holes_are_skipped(rule: Objective, tokens: Tokens = EXAMPLE) -> None:
    """A response with untrained tool tokens inside counts as the same response without them."""
    order = (~tokens.mask).long().argsort(dim=-1, stable=True)
    closed = each_field(tokens, lambda x: x.gather(-1, order))
    for mode in TWO_MODES:
        loss, grad, metrics = result_of(rule, tokens, mode)
        require_same((loss, grad.gather(-1, order), metrics), result_of(rule, closed, mode), f"{mode}, without holes")


def single_tokens_work(rule: Objective, tokens: Tokens = EXAMPLE) -> None:
    """A response of one token gives the same finite numbers alone in its tensor and anywhere in a wider one."""
    some = rows(tokens, tokens.mask.any(-1))
    if not some.mask.any():
        return
    column = some.mask.long().argmax(-1, keepdim=True)
    first = torch.zeros_like(some.mask).scatter(-1, column, True)
    wide = replace(some, mask=first, position=first.long())
    narrow = each_field(wide, lambda x: x.gather(-1, column))
    for mode in TWO_MODES:
        loss, grad, metrics = result_of(rule, wide, mode)
        alone = result_of(rule, narrow, mode)
        require(alone[0].isfinite() and alone[1].isfinite().all(), f"{mode}, T = 1: not finite")
        require_same((loss, grad.gather(-1, column), metrics), alone, f"{mode}, T = 1 in a wider tensor")


def half_precision_is_computed_in_float32(rule: Objective, tokens: Tokens = EXAMPLE) -> None:
    """bfloat16 inputs give what their float32 copies give, no coarser than float32; float64 stays float64."""
    half = cast(tokens, torch.bfloat16)
    for mode in TWO_MODES:
        loss, grad, metrics = result_of(rule, half, mode)
        loss_32, grad_32, metrics_32 = result_of(rule, cast(half, torch.float32), mode)
        require(loss.dtype == torch.float32, f"{mode}: the loss of bfloat16 inputs is {loss.dtype}")
        require(torch.equal(loss, loss_32) and metrics == metrics_32, f"{mode}: bfloat16 gives other numbers")
        require(torch.equal(grad, grad_32.bfloat16()), f"{mode}: bfloat16 gives another gradient")
    with SeenDtypes() as results:
        terms_of(rule, tokens)
    require(not results.seen & {torch.bfloat16, torch.float16}, "the rule itself computes in half precision")
    single, double = (terms_of(rule, cast(half, dtype)).surrogate for dtype in (torch.float32, torch.float64))
    require(double.dtype == torch.float64, f"the surrogate of float64 inputs is {double.dtype}")
    require_close(single.double(), double, "the surrogate in float32 and in float64", tolerance=1e-4)


def extreme_ratios_stay_finite(rule: Objective, tokens: Tokens = EXAMPLE) -> None:
    """Log-ratios of +-50, as a broken engine gives them, leave loss, gradient and metrics finite."""
    above = torch.arange(tokens.mask.shape[1]).expand_as(tokens.mask) % 2 == 0
    high = tokens.rollout_logp.clamp(max=0)
    logp, rollout_logp = torch.where(above, high, high - 50), torch.where(above, high - 50, high)
    for divergence in (tokens.divergence, torch.ones_like(logp)):
        far = replace(tokens, logp=logp, rollout_logp=rollout_logp, divergence=divergence)
        for dtype in (torch.float32, torch.float64):
            loss, grad, metrics = result_of(rule, cast(far, dtype), "token-sum")
            require(loss.isfinite() and grad.isfinite().all(), f"{dtype}: loss or gradient is not finite")
            finite = all(torch.tensor(value).isfinite().all() for value in metrics.values())
            require(finite, f"{dtype}: a metric is not finite")


def equal_rewards_give_no_gradient(rule: Objective, tokens: Tokens = EXAMPLE) -> None:
    """Responses with A = 0 (a group of equal rewards) have no gradient, and the others keep theirs."""
    quiet = torch.arange(tokens.mask.shape[0]) % 3 == 1
    some = replace(tokens, advantages=torch.where(quiet.unsqueeze(-1), 0, tokens.advantages))
    _, grad, metrics = result_of(rule, some, "token-sum")
    _, others, _ = result_of(rule, rows(tokens, ~quiet), "token-sum")
    require((grad[quiet] == 0).all(), "a response with A = 0 has a gradient")
    require_close(grad[~quiet], others, "beside responses with A = 0: the gradient")
    counted = float((tokens.mask & (some.advantages != 0)).sum())
    require(metrics["mask_share"][1] == counted, "the mask share counts tokens with A = 0")


def on_policy_it_is_reinforce(rule: Objective, tokens: Tokens = EXAMPLE) -> None:
    """For pi = mu (ratio 1, divergence 0) every token is kept and the gradient of A log pi is left."""
    same = replace(tokens, rollout_logp=tokens.logp, divergence=torch.zeros_like(tokens.logp))
    require((terms_of(rule, same).gate == 1).all(), "pi = mu: a token is not kept")
    _, grad, _ = result_of(rule, same, "token-sum")
    require_close(grad, -torch.where(tokens.mask, tokens.advantages, 0), "pi = mu: the gradient of A log pi")


def scaling_advantages_changes_no_mask(rule: Objective, tokens: Tokens = EXAMPLE) -> None:
    """Multiplying A by k > 0 changes no gate and no reason."""
    plain = terms_of(rule, tokens)
    for factor in (1e-3, 0.5, 7.0):
        scaled = terms_of(rule, replace(tokens, advantages=factor * tokens.advantages))
        require_equal_terms(scaled, plain, f"A times {factor}", "gate", "reason")


def gates_are_shares_with_a_reason(rule: Objective, tokens: Tokens = EXAMPLE) -> None:
    """A gate is in [0, 1], carries no gradient, and is 1 exactly where the reason is KEPT."""
    for dtype in (torch.float32, torch.float64):
        copy = each_field(cast(tokens, dtype), torch.clone)
        leaf = replace(copy, logp=copy.logp.requires_grad_())
        raw = rule.spec.function(rule.params, padded_like(leaf))  # `Objective` would hide a gradient of the gate
        require(not raw.gate.requires_grad, "the gate carries a gradient, which would be dropped: detach the ratio")
        terms = terms_of(rule, cast(tokens, dtype))
        require(((terms.gate >= 0) & (terms.gate <= 1)).all(), f"{dtype}: a gate is outside [0, 1]")
        same = torch.equal(terms.gate == 1, terms.reason == Reason.KEPT)
        require(same, f"{dtype}: gate 1 and reason KEPT do not coincide")
        require(terms.reason.dtype == torch.int64, f"the reason is {terms.reason.dtype}, not int64")


def inputs_are_not_modified(rule: Objective, tokens: Tokens = EXAMPLE) -> None:
    """The rule writes into none of its arguments."""
    given = each_field(spoiled(tokens, torch.nan), torch.clone)
    before = each_field(given, torch.clone)
    inner = padded_like(given)  # what the rule itself gets
    inner_before = each_field(inner, torch.clone)
    rule(given)
    rule.spec.function(rule.params, inner)
    for name, then in vars(before).items():
        if then is not None:
            unchanged = torch.equal(getattr(given, name).nan_to_num(), then.nan_to_num())
            unchanged = unchanged and torch.equal(getattr(inner, name), getattr(inner_before, name))
            require(unchanged, f"the rule wrote into tokens.{name}")


def only_logp_is_differentiated(rule: Objective, tokens: Tokens = EXAMPLE) -> None:
    """The surrogate depends on `logp` differentiably, and on no other trainable tensor."""
    copy = each_field(tokens, torch.clone)
    leaf = copy.logp.requires_grad_()
    surrogate = rule(copy).surrogate
    require(surrogate.requires_grad, "the surrogate carries no gradient")
    todo, seen, leaves = [surrogate.grad_fn], set(), []
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        todo += [before for before, _ in node.next_functions]
    require(any(x is leaf for x in leaves), "the surrogate carries no gradient of logp")
    require(all(x is leaf for x in leaves), "the surrogate carries a gradient of another tensor than logp")


def equal_inputs_give_equal_terms(rule: Objective, tokens: Tokens = EXAMPLE) -> None:
    """The rule is a pure function: called twice it says the same, bit for bit."""
    require_equal_terms(terms_of(rule, tokens), terms_of(rule, tokens), "called again")


def inputs_are_read_as_declared(rule: Objective, tokens: Tokens = EXAMPLE) -> None:
    """A rule reads no more of `Tokens` than its `needs` declare."""
    for name in sorted(NEEDS.keys() - rule.needs):
        without = replace(tokens, **{name: None})  # type: ignore[arg-type]
        require_equal_terms(terms_of(rule, without), terms_of(rule, tokens), f"without tokens.{name}")


Law = Callable[..., None]
"""Called with an objective and, if not on the example, a batch."""

LAWS: dict[str, Law] = {
    law.__name__.replace("_", " "): law
    for law in (
        padding_changes_nothing,
        padding_has_no_gradient,
        row_order_changes_nothing,
        micro_batches_add_up,
        empty_batches_are_harmless,
        empty_rows_change_nothing,
        holes_are_skipped,
        single_tokens_work,
        half_precision_is_computed_in_float32,
        extreme_ratios_stay_finite,
        equal_rewards_give_no_gradient,
        on_policy_it_is_reinforce,
        scaling_advantages_changes_no_mask,
        gates_are_shares_with_a_reason,
        inputs_are_not_modified,
        only_logp_is_differentiated,
        equal_inputs_give_equal_terms,
        inputs_are_read_as_declared,
    )
}


def check(rule: Objective) -> dict[str, str | None]:
    """Each law with None if the rule keeps it, else what went wrong; an exception of the rule breaks the law too."""
    outcome: dict[str, str | None] = {}
    for name, law in LAWS.items():
        try:
            law(rule)
        except AssertionError as error:
            outcome[name] = (str(error) or "an assertion of the rule failed").splitlines()[0]
        except Exception as error:  # a user's rule may raise anything; the report is the place for it
            outcome[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            outcome[name] = None
    return outcome
