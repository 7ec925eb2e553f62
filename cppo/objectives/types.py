"""What goes into an objective and what comes out.

Legend: B responses, T response tokens, right-padded, column 0 = first response token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor


class Reason(IntEnum):
    """Why a token's gradient is reduced. Padding is KEPT."""

    KEPT = 0
    THRESHOLD = 1
    """The token itself moved too far (a ratio outside the clip range, or a divergence above its threshold)."""
    BUDGET = 2
    """The token alone would pass, but its prefix has used up the divergence budget (CPPO)."""
    SEQUENCE = 3
    """The whole response was rejected (TRM)."""


@dataclass(frozen=True)
class Tokens:
    """One batch of sampled tokens, each field [B, T]. Only `logp` carries a gradient.

    >>> logp = torch.tensor([[-0.1, -2.0, -0.7]], requires_grad=True)
    >>> tokens = Tokens(logp, rollout_logp=torch.tensor([[-0.2, -1.5, 0.0]]), advantages=torch.tensor([[1.0, 1.0, 0.0]]),
    ...                 mask=torch.tensor([[True, True, False]]))
    """

    logp: Tensor
    """Log-probability of the sampled token under the current policy pi, in nats."""
    rollout_logp: Tensor
    """The same under the anchor: the rollout policy mu, or the recomputed old policy."""
    advantages: Tensor
    """A_t; 0 = no signal."""
    mask: Tensor
    """bool: tokens that are trained. May have holes (tool tokens); positions and prefix sums skip them."""
    divergence: Tensor | None = None
    """D_t from `cppo.divergences`; needed by the divergence rules."""
    position: Tensor | None = None
    """int64, 1..T_i over the trained tokens of row i: the position whose weight a token takes. None = its own order."""


@dataclass(frozen=True)
class Terms:
    """What an objective says about each token, each field [B, T]."""

    surrogate: Tensor
    """What to maximise; differentiable in `logp`."""
    gate: Tensor
    """Share of the token's gradient to keep, in [0, 1]; no gradient of its own."""
    reason: Tensor
    """int64, a `Reason`; KEPT exactly where gate = 1."""
    traces: Mapping[str, Tensor] = field(default_factory=dict)
    """What the rule wants shown, without gradient: name -> [B, T] (a threshold, a weighted divergence, ...), which token
    dumps hold, or [B] (a budget, ...), whose mean over responses becomes a metric of that name."""


def padded_like(tokens: Tokens) -> Tokens:
    """`tokens` with neutral values outside the mask and at least float32 inside, after a check of the shapes.

    Padding may hold anything, also NaN: multiplying it by 0 later would poison sums and gradients, so it is replaced
    before any arithmetic.

    Raises ValueError for a field whose shape differs from the mask's, or a mask that is not bool.
    """
    mask = tokens.mask
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(f"tokens.mask: expected bool [B, T], got {mask.dtype} {tuple(mask.shape)}")

    def clean(name: str) -> Tensor | None:
        value: Tensor | None = getattr(tokens, name)
        if value is None:
            return None
        if value.shape != mask.shape:
            raise ValueError(f"tokens.{name}: shape {tuple(value.shape)} differs from the mask's {tuple(mask.shape)}")
        if value.is_floating_point() and value.dtype != torch.float64:
            value = value.float()
        return torch.where(mask, value, torch.zeros_like(value))

    logp, rollout_logp, advantages = clean("logp"), clean("rollout_logp"), clean("advantages")
    assert logp is not None and rollout_logp is not None and advantages is not None
    return Tokens(logp, rollout_logp, advantages, mask, clean("divergence"), clean("position"))
