"""Rules whose importance weight depends on the tokens before: MinPRO."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cppo.objectives.ratio import clip_weight, hard_gate, log_ratio, positive
from cppo.objectives.registry import register
from cppo.objectives.types import Terms, Tokens


@dataclass(frozen=True)
class MinPRO:
    """Parameters of `minpro`."""

    clip_low: float | None = None
    """Raise weights below 1 - clip_low to it; null = no floor (a floor undoes the suppression by the prefix)."""
    clip_high: float | None = 0.28
    """Lower weights above 1 + clip_high to it; null = no cap."""
    cap_prefix_at_1: bool = False
    """Use min(1, prefix factor): the literal definition exceeds 1 when all earlier ratios do."""

    def __post_init__(self) -> None:
        positive(clip_low=self.clip_low, clip_high=self.clip_high)


@register()
def minpro(cfg: MinPRO, tokens: Tokens) -> Terms:
    """CISPO's detached weight times the smallest ratio of the prefix.

    Difference from CISPO: the weight is clip(rho_min_t rho_t) with rho_min_t = min over i < t of rho_i, 1 at the first
    token; one token that became unlikely suppresses everything after it.
    Source: MinPRO (arXiv:2601.22718); its clip range could not be verified, the defaults keep the prefix effect.
    """
    prefix = exclusive_minimum(log_ratio(tokens).detach(), tokens.mask)
    if cfg.cap_prefix_at_1:
        prefix = prefix.clamp(max=0)
    weight = clip_weight((prefix + log_ratio(tokens)).exp(), cfg.clip_low, cfg.clip_high)
    return hard_gate(tokens.advantages * weight * tokens.logp, torch.ones_like(tokens.mask))


def exclusive_minimum(x: Tensor, mask: Tensor) -> Tensor:
    """[B, T]: the minimum of x over the trained tokens before t; 0 where there is none."""
    running = torch.where(mask, x, torch.inf).cummin(-1).values
    before = torch.nn.functional.pad(running[:, :-1], (1, 0), value=torch.inf)
    return torch.where(before.isinf(), 0, before)
