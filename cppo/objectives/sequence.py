"""Rules on a whole response: GSPO, GMPO, TRM.

GSPO and GMPO weight every token of a response by its mean ratio and are meant for seq-mean-token-mean: the mean over the
tokens is then the sequence's term.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cppo.objectives.divergence import divergence_of
from cppo.objectives.ratio import clipped, hard_gate, log_ratio, positive, weighted_logp
from cppo.objectives.registry import register
from cppo.objectives.types import Reason, Terms, Tokens

MAX_SEQUENCE_LOG_RATIO = 10.0
"""verl's limit of GSPO's mean log-ratio."""


def mean_over(x: Tensor, mask: Tensor) -> Tensor:
    """[B, 1]: mean of x over the trained tokens of a row; 0 for an empty row."""
    return torch.where(mask, x, 0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class GSPO:
    """Parameters of `gspo`."""

    clip_low: float | None = 3e-4
    """Clip below 1 - clip_low; null = no lower clip. About a thousandth of PPO's: sequence ratios are means."""
    clip_high: float | None = 4e-4
    """Clip above 1 + clip_high; null = no upper clip."""

    def __post_init__(self) -> None:
        positive(clip_low=self.clip_low, clip_high=self.clip_high)


@register()
def gspo(cfg: GSPO, tokens: Tokens) -> Terms:
    """PPO's clip on the response's geometric-mean ratio s_i = exp(mean log rho).

    Difference from PPO: there is one ratio per response, so a clipped response is dropped whole.
    Source: GSPO (arXiv:2507.18071); the token form with the same gradient follows verl.
    """
    sequence = mean_over(log_ratio(tokens).detach(), tokens.mask).clamp(max=MAX_SEQUENCE_LOG_RATIO).exp()
    ratio = sequence * (tokens.logp - tokens.logp.detach()).exp()
    outside = clipped(sequence.expand_as(ratio), tokens.advantages, cfg.clip_low, cfg.clip_high)
    return hard_gate(tokens.advantages * ratio, ~outside, Reason.SEQUENCE)


@dataclass(frozen=True)
class GMPO:
    """Parameters of `gmpo`."""

    clip_low: float = 0.4
    """For A < 0, drop tokens with log rho below -clip_low."""
    clip_high: float = 0.4
    """For A > 0, drop tokens with log rho above clip_high."""

    def __post_init__(self) -> None:
        positive(clip_low=self.clip_low, clip_high=self.clip_high)


@register()
def gmpo(cfg: GMPO, tokens: Tokens) -> Terms:
    """The geometric mean of one-sidedly clipped token ratios weights the response.

    Differences from GSPO: 1. the clip is on tokens, in log space. 2. a clipped token still enters the mean.
    Source: GMPO (arXiv:2507.20673), as in verl.
    """
    x = log_ratio(tokens)
    limited = torch.where(tokens.advantages > 0, x.clamp(max=cfg.clip_high), x.clamp(min=-cfg.clip_low))
    sequence = mean_over(limited.detach(), tokens.mask).exp()
    surrogate = tokens.advantages * sequence * (x - x.detach()).exp()
    return hard_gate(surrogate, limited.detach() == x.detach())


@dataclass(frozen=True)
class TRM:
    """Parameters of `trm`."""

    delta_max: float | None = 0.05
    """Largest token divergence of a kept response (TRM-Max); null = it is not tested."""
    delta_mean: float | None = None
    """Largest mean divergence of a kept response (TRM-Avg); null = it is not tested. If both are given, both must hold."""
    cap: float | None = 20.0
    """Largest importance weight; null = the differentiable, uncapped ratio."""

    def __post_init__(self) -> None:
        positive(delta_max=self.delta_max, delta_mean=self.delta_mean, cap=self.cap)
        if self.delta_max is None and self.delta_mean is None:
            raise ValueError("delta_max: one of delta_max and delta_mean is needed")


@register(needs=("divergence",))
def trm(cfg: TRM, tokens: Tokens) -> Terms:
    """Drops the whole response when its largest (or mean) token divergence is too large, in either direction.

    Difference from DPPO: there is one decision per response instead of one per token; rejected rows stay in the denominator.
    Source: TRM (arXiv:2512.23075), on KL(mu, pi); the two criteria are compared singly in CPPO (arXiv:2606.10968).
    """
    divergence, mask = divergence_of(tokens), tokens.mask
    keep = torch.ones_like(mask)
    if cfg.delta_max is not None:
        keep = keep & (divergence.amax(-1, keepdim=True) <= cfg.delta_max)
    if cfg.delta_mean is not None:
        keep = keep & (mean_over(divergence, mask) <= cfg.delta_mean)
    return hard_gate(weighted_logp(tokens, cfg.cap), keep, Reason.SEQUENCE)
