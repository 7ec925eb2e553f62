"""Token divergences D_t between the rollout policy mu and the current policy pi, in the direction mu to pi.

All results are [B, T], carry no gradient, and are computed in float32 (float64 stays float64).
Legend: B responses, T tokens, K top-K entries of mu, V vocabulary. q = mu, p = pi.

For total variation (TV) and for the Kullback-Leibler divergence (KL) they are ordered by the data processing inequality:
binary <= top_k(replace) <= top_k(union) <= exact. Values at padded positions mean nothing; the objectives ignore them.

A suite names one of them by `divergence: {estimator: top_k, kind: tv, k: 20}`. One of your own is a function of what was
recorded, and is registered with what the rollout must keep of mu:

    @register(keeps="sampled", kinds=("tv",))
    def half(seen: Recorded, kind: str) -> Tensor: ...  # divergence: {estimator: "my_module:half"}

Source: CPPO (arXiv:2606.10968) section 2.3 and appendix D; DPPO (arXiv:2602.04879).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cppo.system.plugins import Registry

Kind = Literal["tv", "kl"]
Support = Literal["union", "replace"]

MIN_MASS = 1e-12
"""The smallest probability mass of a category, so that the logarithm of an empty "other" stays finite."""


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged if it is float64: half precision loses a tenth of a typical threshold."""
    return x if x.dtype == torch.float64 else x.float()


def _reduced(p: Tensor, q: Tensor, kind: Kind) -> Tensor:
    """TV or KL(q, p) of the categories in the last axis; the entries must already sum to one.

    Categories with q = 0 contribute nothing to the KL, so callers may zero both masses to drop a category.
    """
    if kind == "tv":
        return 0.5 * (p - q).abs().sum(-1)
    if kind == "kl":
        ratio = q.clamp(min=MIN_MASS).log() - p.clamp(min=MIN_MASS).log()
        return (q * ratio).sum(-1).clamp(min=0)  # rounding can leave -1e-8
    raise ValueError(f"kind: {kind!r} is not one of 'tv', 'kl'")


def _with_other(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Append the category "every other token" to both, with the mass that is left (at least MIN_MASS)."""
    p_other = (1 - p.sum(-1, keepdim=True)).clamp(min=MIN_MASS)
    q_other = (1 - q.sum(-1, keepdim=True)).clamp(min=MIN_MASS)
    return torch.cat([p, p_other], -1), torch.cat([q, q_other], -1)


@torch.no_grad()
def binary(logp: Tensor, rollout_logp: Tensor, kind: Kind = "tv") -> Tensor:
    """Divergence of the two-way partition {sampled token, all others}; TV is abs(pi(y_t) - mu(y_t)).

    logp, rollout_logp: [B, T] log-probabilities of the sampled token under pi and mu, in nats.
    """
    p = at_least_float32(logp).clamp(max=0).exp()  # bf16 rounding can push a log-probability above 0
    q = at_least_float32(rollout_logp).clamp(max=0).exp()
    return _reduced(torch.stack([p, 1 - p], -1), torch.stack([q, 1 - q], -1), kind)


@torch.no_grad()
def sampled(logp: Tensor, rollout_logp: Tensor, kind: Literal["k2", "k3"] = "k3") -> Tensor:
    """One-sample estimates of KL(mu, pi) for y ~ mu: k2 = (ln rho)^2 / 2, k3 = rho - 1 - ln rho (TRM, arXiv:2512.23075)."""
    log_ratio = at_least_float32(logp) - at_least_float32(rollout_logp)
    if kind == "k2":
        return log_ratio.square() / 2
    if kind == "k3":
        return torch.expm1(log_ratio) - log_ratio
    raise ValueError(f"kind: {kind!r} is not one of 'k2', 'k3'")


@torch.no_grad()
def top_k(
    logp: Tensor,
    rollout_logp: Tensor,
    topk_logp: Tensor,
    rollout_topk_logp: Tensor,
    topk_ids: Tensor,
    tokens: Tensor,
    kind: Kind = "tv",
    support: Support = "union",
) -> Tensor:
    """Divergence over {top-K tokens of mu, the sampled token, "other"}: a lower bound of `exact`, never below `binary`.

    logp, rollout_logp: [B, T] log-probabilities of the sampled token under pi and mu.
    topk_logp, rollout_topk_logp, topk_ids: [B, T, K], mu's K likeliest ids with their log-probabilities under pi and
    mu, as stored at sampling: the support comes from the rollout policy only.
    tokens: [B, T] sampled ids.
    support: "union" adds the sampled token to the K (the papers' form); "replace" overwrites the least likely of
    the K where the sampled token is missing (the released DPPO code).
    """
    if support not in ("union", "replace"):
        raise ValueError(f"support: {support!r} is not one of 'union', 'replace'")
    p = at_least_float32(topk_logp).exp()
    q = at_least_float32(rollout_topk_logp).exp()
    p_y = at_least_float32(logp).exp().unsqueeze(-1)
    q_y = at_least_float32(rollout_logp).exp().unsqueeze(-1)
    missing = ~(topk_ids == tokens.unsqueeze(-1)).any(-1, keepdim=True)
    if support == "replace":
        least = torch.zeros_like(p, dtype=torch.bool).scatter(-1, q.argmin(-1, keepdim=True), True)
        p = torch.where(missing & least, p_y, p)
        q = torch.where(missing & least, q_y, q)
    else:
        p = torch.cat([p, torch.where(missing, p_y, 0)], -1)
        q = torch.cat([q, torch.where(missing, q_y, 0)], -1)
    return _reduced(*_with_other(p, q), kind)


@torch.no_grad()
def exact(logp_all: Tensor, rollout_logp_all: Tensor, kind: Kind = "tv") -> Tensor:
    """Divergence over the whole vocabulary. logp_all, rollout_logp_all: [B, T, V] log-probabilities."""
    return _reduced(at_least_float32(logp_all).exp(), at_least_float32(rollout_logp_all).exp(), kind)


# The registry ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """What an estimator sees of pi (now) and mu (as recorded at sampling), in nats. A field is None where it was not kept."""

    tokens: Tensor
    """int64 [B, T] sampled ids."""
    logp: Tensor
    """[B, T] log pi(y_t)."""
    rollout_logp: Tensor
    """[B, T] log mu(y_t)."""
    topk_ids: Tensor | None = None
    """[B, T, K] mu's K likeliest ids."""
    topk_logp: Tensor | None = None
    """[B, T, K] their log-probabilities under pi."""
    rollout_topk_logp: Tensor | None = None
    """[B, T, K] their log-probabilities under mu."""
    logp_all: Tensor | None = None
    """[B, T, V] pi."""
    rollout_logp_all: Tensor | None = None
    """[B, T, V] mu."""


Keeps = Literal["sampled", "top_k", "full"]
"""What a rollout keeps of mu: the sampled token's log-probability, also its K likeliest tokens, or the whole distribution."""


@dataclass(frozen=True)
class Estimator:
    """A registered estimator: its function takes `Recorded`, the kind, and its further options by keyword."""

    name: str
    function: Callable[..., Tensor]
    keeps: Keeps
    kinds: tuple[str, ...]
    options: tuple[str, ...]
    """Names of further keys of a suite's `divergence` that it takes."""

    def __call__(self, seen: Recorded, kind: str, **options: Any) -> Tensor:
        """D_t [B, T]. Raises ValueError for a result of another shape."""
        result = self.function(seen, kind, **options).detach()
        if result.shape != seen.logp.shape:
            raise ValueError(
                f"divergence {self.name}: expected shape {tuple(seen.logp.shape)}, got {tuple(result.shape)}"
            )
        return result


_REGISTRY: Registry[Estimator] = Registry("divergence estimator", "@divergences.register(...)")


def register(keeps: Keeps, kinds: Iterable[str], options: Iterable[str] = ()) -> Callable[..., Callable[..., Tensor]]:
    """Register an estimator under its function's name (without a leading underscore).

    keeps: what the rollout must keep of mu. kinds: the kinds of divergence that it knows. options: further keys of a
    suite's `divergence` that it takes by keyword; `support` is the only one so far.
    """

    def decorate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        _REGISTRY.add(function, Estimator(function.__name__.lstrip("_"), function, keeps, tuple(kinds), tuple(options)))
        return function

    return decorate


def names() -> tuple[str, ...]:
    """Names of all registered estimators, sorted."""
    return _REGISTRY.names()


def estimator(name: str) -> Estimator:
    """The estimator called `name`, or the one at "module:function". Raises ValueError when there is none."""
    return _REGISTRY.find(name)


@register(keeps="sampled", kinds=("tv", "kl"))
def _binary(seen: Recorded, kind: Kind) -> Tensor:
    return binary(seen.logp, seen.rollout_logp, kind)


@register(keeps="sampled", kinds=("k2", "k3"))
def _sampled(seen: Recorded, kind: Literal["k2", "k3"]) -> Tensor:
    return sampled(seen.logp, seen.rollout_logp, kind)


@register(keeps="top_k", kinds=("tv", "kl"), options=("support",))
def _top_k(seen: Recorded, kind: Kind, support: Support = "union") -> Tensor:
    assert seen.topk_ids is not None and seen.topk_logp is not None and seen.rollout_topk_logp is not None
    return top_k(
        seen.logp,
        seen.rollout_logp,
        seen.topk_logp,
        seen.rollout_topk_logp,
        seen.topk_ids,
        seen.tokens,
        kind,
        support,
    )


@register(keeps="full", kinds=("tv", "kl"))
def _exact(seen: Recorded, kind: Kind) -> Tensor:
    assert seen.logp_all is not None and seen.rollout_logp_all is not None
    return exact(seen.logp_all, seen.rollout_logp_all, kind)
