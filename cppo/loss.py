"""The only reduction: from an objective's terms per token to one loss, over the denominator of the whole optimiser step.

Metrics are name -> (sum, count), so that micro-batches and ranks add up; they are divided once, at the very end.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from cppo.divergences import at_least_float32
from cppo.objectives import Objective, Reason, Terms, Tokens

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-sum"]
Metrics = dict[str, tuple[float, float]]


def policy_loss(
    objective: Objective,
    tokens: Tokens,
    aggregation: Aggregation = "token-mean",
    horizon: int | None = None,
    denominator: float | None = None,
) -> tuple[Tensor, Metrics]:
    """The loss to minimise (a scalar) and its metrics.

    aggregation: with n_i trained tokens in row i, N = sum n_i and B+ rows that have any,
        token-mean                sum L / N
        seq-mean-token-mean       sum_i (sum_t L / n_i) / B+
        seq-mean-token-sum        sum_i sum_t L / B+
        seq-mean-token-sum-norm   sum_i sum_t L / (horizon B+)
        token-sum                 sum L
    horizon: the run's maximum response length, for the -norm mode only.
    denominator: N (token modes) or B+ (seq modes) of the whole optimiser step, when this batch is a part of it;
        None = this batch is the whole step.

    Raises ValueError for an unknown aggregation, a missing, needless or non-positive horizon, or a
    non-positive denominator.
    """
    check_aggregation(aggregation, horizon)
    if denominator is not None and not denominator > 0:
        raise ValueError(f"denominator: {denominator} must be above 0")
    terms = objective(tokens)
    return reduce_terms(terms, tokens.mask, aggregation, horizon, denominator), loss_metrics(tokens, terms)


def reduce_terms(
    terms: Terms, mask: Tensor, aggregation: Aggregation, horizon: int | None, denominator: float | None
) -> Tensor:
    """One component of a loss: -gate x surrogate of its trained tokens, over its own denominator; see `policy_loss`.

    A loss of several components (a policy loss, a distillation term) is the sum of what this gives for each one, with its
    own mask [B, T] and denominator.
    """
    per_token = torch.where(mask, -terms.gate * terms.surrogate, 0)  # [B, T]
    length = mask.sum(-1)  # [B]
    if aggregation == "seq-mean-token-mean":
        total = (per_token.sum(-1) / length.clamp(min=1)).sum()
    else:
        total = per_token.sum()
    if denominator is None:
        denominator = max(batch_denominator(mask, aggregation), 1.0)  # an empty batch has loss 0, not NaN
    if aggregation == "seq-mean-token-sum-norm":
        assert horizon is not None
        denominator = denominator * horizon
    return total if aggregation == "token-sum" else total / denominator


def check_aggregation(aggregation: str, horizon: int | None) -> None:
    """Raise ValueError unless the mode is known and has a positive horizon exactly when it needs one."""
    if aggregation not in get_args(Aggregation):
        raise ValueError(f"aggregation: {aggregation!r} is not one of {', '.join(get_args(Aggregation))}")
    if (aggregation == "seq-mean-token-sum-norm") != (horizon is not None):
        need = "needs a horizon" if horizon is None else "takes no horizon"
        raise ValueError(f"horizon: aggregation {aggregation} {need} (the run's maximum response length)")
    if horizon is not None and not horizon > 0:
        raise ValueError(f"horizon: {horizon} must be above 0")


def batch_denominator(mask: Tensor, aggregation: Aggregation) -> float:
    """This mask's share of the step's denominator: N for token modes, B+ for seq modes. Shares add up over parts."""
    length = mask.sum(-1)
    return float((length > 0).sum() if aggregation.startswith("seq-") else length.sum())


def loss_metrics(tokens: Tokens, terms: Terms) -> Metrics:
    """Mask shares by cause, mean gate, mean divergence and the rule's own quantities by response, as (sum, count).

    mask_share: tokens with gate < 1 among trained tokens with a non-zero advantage; the parts by cause share that
    denominator. divergence: over all trained tokens. Traces [B]: over responses with trained tokens.
    """
    counted = tokens.mask & (tokens.advantages != 0)
    count = float(counted.sum())
    metrics: Metrics = {"mask_share": (float((counted & (terms.gate < 1)).sum()), count)}
    for reason in (Reason.THRESHOLD, Reason.BUDGET, Reason.SEQUENCE):
        share = float((counted & (terms.reason == reason)).sum())
        metrics[f"mask_share/{reason.name.lower()}"] = (share, count)
    metrics["gate_mean"] = (float(torch.where(counted, terms.gate, 0).sum()), count)
    if tokens.divergence is not None:
        divergence = torch.where(tokens.mask, at_least_float32(tokens.divergence), 0)
        metrics["divergence"] = (float(divergence.sum()), float(tokens.mask.sum()))
    rows = float(tokens.mask.any(-1).sum())
    metrics |= {name: (float(trace.sum()), rows) for name, trace in terms.traces.items() if trace.dim() == 1}
    return metrics
