"""What is measured of an update besides the loss, as (sum, count): entropy, drift, mismatch; and what is written of tokens.

Legend: B rows, T tokens. mu = rollout policy, pi = current policy. All without gradient.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cppo.loss import Metrics
from cppo.objectives import Reason, Terms, Tokens
from cppo.objectives.ratio import ratio


def probability_shift(tokens: Tokens) -> Tensor:
    """abs(pi(y_t) - mu(y_t)) [B, T], 0 outside the mask: the drift of the paper's Figure 2."""
    shift = (tokens.logp.detach().exp() - tokens.rollout_logp.exp()).abs()
    return torch.where(tokens.mask, shift, 0)


QUANTILES = {"q50": 0.5, "q90": 0.9, "q99": 0.99, "max": 1.0}


def mismatch_metrics(logp: Tensor, rollout_logp: Tensor, mask: Tensor) -> Metrics:
    """Quantiles over tokens of abs(log pi - log mu) and abs(pi - mu) at equal weights: the numerical mismatch between the
    inference engine and the trainer. All tensors are [B, T]. The second is in the unit of a TV threshold.

    Over several ranks these are means of the ranks' quantiles.
    """
    pi, mu = logp[mask].double(), rollout_logp[mask].double()
    errors = {"mismatch_logp": (pi - mu).abs(), "mismatch_prob": (pi.exp() - mu.exp()).abs()}
    return {
        f"{name}/{label}": (float(torch.quantile(error, q)), 1.0)
        for name, error in errors.items()
        for label, q in QUANTILES.items()
    }


def token_metrics(tokens: Tokens, entropy: Tensor) -> Metrics:
    """Means over trained tokens of one batch; `entropy` [B, T] is the policy's, in nats.

    relative_logprob_error: sum abs(log pi - log mu) / sum abs(log mu), over everything the iteration trained on.
    """
    mask = tokens.mask
    count = float(mask.sum())
    error = torch.where(mask, (tokens.logp.detach() - tokens.rollout_logp).abs(), 0)
    return {
        "entropy": (float(torch.where(mask, entropy, 0).sum()), count),
        "drift": (float(probability_shift(tokens).sum()), count),
        "relative_logprob_error": (float(error.sum()), float(torch.where(mask, tokens.rollout_logp.abs(), 0).sum())),
    }


def add(total: Metrics, part: Metrics) -> None:
    """Add `part` to `total` in place, name by name."""
    for name, (value, count) in part.items():
        old_value, old_count = total.get(name, (0.0, 0.0))
        total[name] = (old_value + value, old_count + count)


class Stopwatch:
    """Wall seconds by phase, added up until `restart`."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin a new account."""
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time of the block to a phase."""
        started = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started

    def account(self, tokens: int) -> dict[str, float]:
        """Seconds of each phase and in total, and tokens per second of the two phases that handle every token."""
        rates = {f"{p}_tokens_per_second": tokens / self.seconds[p] for p in ("rollout", "update")}
        return {"tokens": tokens, **self.seconds, "total": time.perf_counter() - self.started, **rates}


def by_position(shift: Tensor, mask: Tensor, width: int) -> list[dict[str, float]]:
    """Drift by position in bins of `width` tokens: count, sum, and the same of the largest tenth (the tail).

    shift: [B, T] of `probability_shift`; positions count trained tokens from 1.
    """
    values, position = shift[mask], mask.cumsum(-1)[mask]
    bins = (position - 1) // width
    order = torch.argsort(values, descending=True)
    values, bins = values[order], bins[order]
    binned = []
    for b in range(int(bins.max()) + 1 if len(bins) else 0):
        inside = values[bins == b]  # still in falling order
        tail = inside[: max(len(inside) // 10, 1)]
        binned.append(
            {
                "first": b * width + 1,
                "last": (b + 1) * width,
                "count": len(inside),
                "sum": float(inside.sum()),
                "tail_count": len(tail),
                "tail_sum": float(tail.sum()),
            }
        )
    return binned


def by_token(
    tokens: Tokens, terms: Terms, responses: Tensor, rows: list[int], decode: Callable[[list[int]], str], count: int
) -> list[dict[str, Any]]:
    """The `count` responses with most masked tokens, token by token with what the rule shows of each, as JSON.

    responses: [B, T] ids. rows: [B], what to call the responses. decode: the text of token ids.
    """
    columns = {"advantage": tokens.advantages, "ratio": ratio(tokens).detach(), "reason": terms.reason}
    if tokens.divergence is not None:
        columns["divergence"] = tokens.divergence
    columns |= {name: trace for name, trace in terms.traces.items() if trace.dim() == 2}
    masked = (terms.reason != int(Reason.KEPT)).sum(-1)
    dumped = []
    for i in masked.argsort(descending=True, stable=True)[:count].tolist():
        trained = tokens.mask[i]
        if not bool(trained.any()):
            continue  # stands in for a rank without rows
        texts = [decode([token]) for token in responses[i][trained].tolist()]
        values = {name: x[i][trained].tolist() for name, x in columns.items()}
        dumped.append({"row": rows[i], "token": texts, **values})
    return dumped


def most_masked(dumped: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The `count` responses with most masked tokens among those that `by_token` gave for several micro-batches."""

    def order(row: dict[str, Any]) -> tuple[int, int]:
        return -sum(reason != int(Reason.KEPT) for reason in row["reason"]), row["row"]

    return sorted(dumped, key=order)[:count]
