"""Rules on the importance ratio rho_t = pi(y_t) / mu(y_t): GPG, PG, PPO, GRPO, CISPO.

The clip rules are written as a mask. The published loss of a clipped token is a constant; here it is 0. The gradient is the
same, and the same tokens count as masked.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cppo.objectives.registry import register
from cppo.objectives.types import Reason, Terms, Tokens

MAX_LOG_RATIO = 20.0
"""Every release clamps the log-ratio at this value, so that a broken log-probability cannot overflow the exponential."""


def log_ratio(tokens: Tokens) -> Tensor:
    """log rho_t [B, T], clamped, differentiable in `logp`."""
    return (tokens.logp - tokens.rollout_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def ratio(tokens: Tokens) -> Tensor:
    """rho_t [B, T], differentiable in `logp`."""
    return log_ratio(tokens).exp()


def clipped(rho: Tensor, advantages: Tensor, clip_low: float | None, clip_high: float | None) -> Tensor:
    """bool: the ratio left [1 - clip_low, 1 + clip_high] in its advantage's direction; None = that side is open."""
    low = torch.inf if clip_low is None else clip_low
    high = torch.inf if clip_high is None else clip_high
    return ((advantages > 0) & (rho > 1 + high)) | ((advantages < 0) & (rho < 1 - low))


def weighted_logp(tokens: Tokens, cap: float | None) -> Tensor:
    """A_t sg[min(rho_t, cap)] log pi(y_t); for cap None the differentiable A_t rho_t. Below the cap the gradients agree."""
    rho = ratio(tokens)
    if cap is None:
        return tokens.advantages * rho
    return tokens.advantages * rho.detach().clamp(max=cap) * tokens.logp


def hard_gate(surrogate: Tensor, keep: Tensor, reason: Tensor | int = Reason.THRESHOLD) -> Terms:
    """Terms that keep a token wholly or drop it for `reason`."""
    reasons = torch.where(keep, int(Reason.KEPT), reason if isinstance(reason, Tensor) else int(reason))
    return Terms(surrogate, keep.to(surrogate.dtype), reasons)


def positive(**values: float | None) -> None:
    """Raise ValueError for a parameter that is given and not above 0."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name}: {value} must be above 0 (or null for none)")


@dataclass(frozen=True)
class GPG:
    """Parameters of `gpg`: none."""


@register()
def gpg(cfg: GPG, tokens: Tokens) -> Terms:
    """A log pi(y_t) without an importance ratio: plain REINFORCE, exact on the first update of a rollout only.

    It is used with `gpg` advantages. Source: GPG (arXiv:2504.02546), as in verl.
    """
    return hard_gate(tokens.advantages * tokens.logp, torch.ones_like(tokens.mask))


@dataclass(frozen=True)
class PG:
    """Parameters of `pg`."""

    cap: float | None = 20.0
    """Largest importance weight; null = the differentiable, uncapped ratio."""

    def __post_init__(self) -> None:
        positive(cap=self.cap)


@register()
def pg(cfg: PG, tokens: Tokens) -> Terms:
    """Importance-weighted policy gradient without any trust region: every token keeps its gradient.

    Source: the unmasked objective of CPPO (arXiv:2606.10968) Eq. 11 with M = 1.
    """
    surrogate = weighted_logp(tokens, cfg.cap)
    return hard_gate(surrogate, torch.ones_like(tokens.mask))


@dataclass(frozen=True)
class PPO:
    """Parameters of `ppo`."""

    clip_low: float | None = 0.2
    """Clip below 1 - clip_low; null = no lower clip."""
    clip_high: float | None = 0.2
    """Clip above 1 + clip_high; null = no upper clip."""
    dual_clip: float | None = None
    """For A < 0, also drop tokens whose ratio exceeds this (verl's default is 3); null = off."""

    def __post_init__(self) -> None:
        positive(clip_low=self.clip_low, clip_high=self.clip_high)
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip: {self.dual_clip} must be above 1 (or null for none)")


@register()
def ppo(cfg: PPO, tokens: Tokens) -> Terms:
    """Clipped surrogate min(A rho, A clip(rho)): drops tokens that left the clip range in their advantage's direction.

    It is used with advantages from a critic (`gae`), which is what makes it PPO; the critic is not part of the objective.
    Source: CPPO (arXiv:2606.10968) Eq. 2; Schulman et al. (arXiv:1707.06347).
    """
    rho = ratio(tokens)
    outside = clipped(rho, tokens.advantages, cfg.clip_low, cfg.clip_high)
    if cfg.dual_clip is not None:
        outside = outside | ((tokens.advantages < 0) & (rho > cfg.dual_clip))
    return hard_gate(tokens.advantages * rho, ~outside)


@dataclass(frozen=True)
class GRPO(PPO):
    """Parameters of `grpo`."""

    clip_high: float | None = 0.28
    """Clip above 1 + clip_high (Clip-Higher); null = no upper clip."""


@register()
def grpo(cfg: GRPO, tokens: Tokens) -> Terms:
    """PPO's clip with group-relative advantages and Clip-Higher.

    Differences from PPO: 1. clip_high is 0.28 instead of 0.2. 2. advantages come from the group, not from a critic.
    Source: CPPO (arXiv:2606.10968) section 4.1; DeepSeekMath (arXiv:2402.03300); DAPO (arXiv:2503.14476).
    """
    return ppo(cfg, tokens)


@dataclass(frozen=True)
class CISPO:
    """Parameters of `cispo`."""

    clip_low: float | None = None
    """Raise weights below 1 - clip_low to it; null = no floor."""
    clip_high: float | None = 4.0
    """Lower weights above 1 + clip_high to it (4 = the absolute cap of 5 of TRL and ScaleRL); null = no cap."""

    def __post_init__(self) -> None:
        positive(clip_low=self.clip_low, clip_high=self.clip_high)


@register()
def cispo(cfg: CISPO, tokens: Tokens) -> Terms:
    """Clips the detached importance weight, not the token: every token keeps a gradient.

    Difference from PG: the weight is clipped to [1 - clip_low, 1 + clip_high] instead of capped at 20.
    Source: MiniMax-M1 (arXiv:2506.13585); the cap follows ScaleRL, since CPPO gives no number.
    """
    weight = clip_weight(ratio(tokens), cfg.clip_low, cfg.clip_high)
    return hard_gate(tokens.advantages * weight * tokens.logp, torch.ones_like(tokens.mask))


def clip_weight(rho: Tensor, clip_low: float | None, clip_high: float | None) -> Tensor:
    """Detached rho clipped to [1 - clip_low, 1 + clip_high]; None = that side is open."""
    low = 0.0 if clip_low is None else 1 - clip_low
    high = torch.inf if clip_high is None else 1 + clip_high
    return rho.detach().clamp(low, high)
