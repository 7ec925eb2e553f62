"""Rules on a token divergence D_t (from `cppo.divergences`): DPPO and CPPO.

Both keep every update that moves the ratio toward one, A_t (rho_t - 1) <= 0, and test the others.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cppo.objectives.ratio import hard_gate, positive, ratio, weighted_logp
from cppo.objectives.registry import register
from cppo.objectives.types import Reason, Terms, Tokens


def toward_one(tokens: Tokens) -> Tensor:
    """bool [B, T]: whether a gradient step moves the ratio toward one, or not at all; such updates are always kept."""
    return tokens.advantages.sign() * (ratio(tokens).detach() - 1) <= 0


def divergence_of(tokens: Tokens) -> Tensor:
    """D_t [B, T], 0 outside the mask; `Objective` has already refused a missing one."""
    assert tokens.divergence is not None
    return tokens.divergence


@dataclass(frozen=True)
class DPPO:
    """Parameters of `dppo`."""

    delta: float = 0.15
    """Largest divergence of a token whose update moves its ratio away from one."""
    cap: float | None = 20.0
    """Largest importance weight; null = the differentiable, uncapped ratio."""

    def __post_init__(self) -> None:
        positive(delta=self.delta, cap=self.cap)


@register(needs=("divergence",))
def dppo(cfg: DPPO, tokens: Tokens) -> Terms:
    """One divergence threshold for every token: keep iff D_t <= delta.

    Difference from PPO: the test is on the divergence from mu, not on the sampled ratio.
    Source: CPPO (arXiv:2606.10968) Eq. 3; DPPO (arXiv:2602.04879).
    """
    keep = toward_one(tokens) | (divergence_of(tokens) <= cfg.delta)
    return hard_gate(weighted_logp(tokens, cfg.cap), keep)


@dataclass(frozen=True)
class CPPO:
    """Parameters of `cppo`; the defaults are the paper's for a dense Base model (Table 3)."""

    delta: float = 0.15
    """Largest weighted divergence w_t D_t of one token."""
    w_min: float = 0.8
    """Weight of the last token; the first has weight 1 and the schedule is linear. 1 = no position weight."""
    delta_b: float | None = 0.02
    """Average divergence per token that a prefix may use (the floor when `adaptive`); null = no prefix budget."""
    adaptive: bool = True
    """Per response, raise delta_b to the `quantile` of its divergences, clamped to [delta_b, clamp_factor * delta_b]."""
    quantile: float = 0.9
    """Which quantile of D_1..D_T the adaptive budget takes (linear interpolation)."""
    clamp_factor: float = 2.0
    """Upper limit of the adaptive budget in units of delta_b (the paper: 2; a later verl pull request: 5)."""
    span: int | None = None
    """Length over which the weights fall to w_min, where they stay; null = the response's own length, a number = a padded
    horizon."""
    shuffle: bool = False
    """Ablation: take each token's weight from `Tokens.position` instead of its own position."""
    soft: bool = False
    """Ablation: scale a violating token by min(1, 1/x_t) instead of dropping it (Eq. 19-20)."""
    cap: float | None = 20.0
    """Largest importance weight; null = the differentiable, uncapped ratio."""

    def __post_init__(self) -> None:
        positive(delta=self.delta, delta_b=self.delta_b, cap=self.cap, span=self.span)
        for name in ("w_min", "quantile"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be in (0, 1]")
        if not self.clamp_factor >= 1:
            raise ValueError(f"clamp_factor: {self.clamp_factor} must be at least 1")


@register(
    needs=lambda cfg: ("divergence", "position") if cfg.shuffle else ("divergence",),
    traces=("weighted", "prefix_threshold", "threshold", "delta_b"),
)
def cppo(cfg: CPPO, tokens: Tokens) -> Terms:
    """Position-weighted threshold plus a cumulative prefix budget: keep iff w_t D_t <= c_t.

    c_t = min(delta, delta + delta_b W_{t-1} - S_{t-1}) with exclusive prefix sums over all trained tokens, masked ones
    included.
    Differences from DPPO: 1. D_t is weighted by w_t, which falls from 1 to w_min. 2. the threshold shrinks when the
    prefix has drifted by more than delta_b per token on average.
    Source: CPPO (arXiv:2606.10968) Eq. 8-11, 19-20, 22, Algorithm 1.
    """
    sums = prefix_sums(cfg, tokens)
    within, affordable = sums.weighted <= cfg.delta, sums.weighted <= sums.threshold
    toward = toward_one(tokens)
    keep = toward | affordable
    reason = torch.where(within, int(Reason.BUDGET), int(Reason.THRESHOLD))
    traces = {
        "weighted": sums.weighted,
        "prefix_threshold": cfg.delta + sums.allowed - sums.used,
        "threshold": sums.threshold,
    }
    if cfg.delta_b is not None:
        traces["delta_b"] = sums.delta_b
    terms = replace(hard_gate(weighted_logp(tokens, cfg.cap), keep, reason), traces=traces)
    if not cfg.soft:
        return terms
    excess = sums.weighted / cfg.delta
    if cfg.delta_b is not None:
        excess = torch.maximum(excess, (sums.used + sums.weighted) / (cfg.delta + sums.allowed))
    below_one = 1 - torch.finfo(excess.dtype).eps  # rounding can give x_t = 1 where w_t D_t is a hair above c_t
    return replace(terms, gate=torch.where(keep, 1, (1 / excess.clamp(min=1)).clamp(max=below_one)))


def position_weight(position: Tensor, span: Tensor | int, w_min: float) -> Tensor:
    """w_t (Eq. 9): 1 at position 1, from there linear down to `w_min` at position `span`, and `w_min` beyond it.

    position: floating point, counted from 1. span: a number, or whole numbers of a shape that broadcasts; 1 gives weight 1
    to position 1.
    """
    fraction = (position - 1) / (torch.as_tensor(span) - 1).clamp(min=1)
    return 1 - (1 - w_min) * fraction.clamp(max=1)


def exclusive_cumsum(x: Tensor) -> Tensor:
    """Sum over the entries before t in the last axis; 0 at the first."""
    return torch.nn.functional.pad(x.cumsum(-1)[..., :-1], (1, 0))


@dataclass(frozen=True)
class PrefixSums:
    """CPPO's running quantities, each [B, T], 0 outside the mask."""

    weighted: Tensor
    """w_t D_t."""
    used: Tensor
    """S_{t-1}, the weighted divergence of the tokens before t."""
    allowed: Tensor
    """delta_b W_{t-1}, what those tokens were allowed; infinity without a budget."""
    threshold: Tensor
    """c_t, which w_t D_t must not exceed (Eq. 8)."""
    delta_b: Tensor
    """[B], the effective budget per token; infinity without a budget."""


def prefix_sums(cfg: CPPO, tokens: Tokens) -> PrefixSums:
    """Weights, exclusive prefix sums and thresholds of CPPO (Eq. 8-10, 22), in at least float32."""
    mask, divergence = tokens.mask, divergence_of(tokens)
    length = mask.sum(-1, keepdim=True)
    position = mask.cumsum(-1)
    if cfg.shuffle:
        assert tokens.position is not None  # declared as a need
        position = tokens.position
    span = length if cfg.span is None else cfg.span
    # In the divergence's precision: two integers would divide in float32.
    weight = torch.where(mask, position_weight(position.to(divergence.dtype), span, cfg.w_min), 0)
    weighted = weight * divergence
    if cfg.delta_b is None:
        delta_b = torch.full_like(divergence[:, 0], torch.inf)
    elif cfg.adaptive and len(mask):  # nanquantile refuses a batch without rows
        valid = torch.where(mask, divergence, torch.nan)
        delta_b = valid.nanquantile(cfg.quantile, dim=-1).nan_to_num(nan=cfg.delta_b)
        delta_b = delta_b.clamp(cfg.delta_b, cfg.clamp_factor * cfg.delta_b)
    else:
        delta_b = torch.full_like(divergence[:, 0], cfg.delta_b)
    used = exclusive_cumsum(weighted)
    earlier = exclusive_cumsum(weight)
    allowed = torch.full_like(used, torch.inf)
    if cfg.delta_b is not None:
        allowed = torch.where(earlier > 0, delta_b.unsqueeze(-1) * earlier, 0)  # 0, not NaN, for delta_b = infinity
    threshold = (cfg.delta + allowed - used).clamp(max=cfg.delta)
    return PrefixSums(weighted, used, allowed, threshold, delta_b)
