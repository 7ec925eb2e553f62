"""Rules that shrink a token's gradient smoothly instead of cutting it: SAPO, DRPO and its SPO form.

Their terms are differentiable in the ratio, so the shrinking is part of the surrogate and no token counts as masked.
"""

from dataclasses import dataclass

import torch

from cppo.objectives.ratio import hard_gate, positive, ratio
from cppo.objectives.registry import register
from cppo.objectives.types import Terms, Tokens


@dataclass(frozen=True)
class SAPO:
    """Parameters of `sapo`."""

    tau_pos: float = 1.0
    """Sharpness of the gate for A > 0."""
    tau_neg: float = 1.05
    """Sharpness of the gate for A <= 0."""

    def __post_init__(self) -> None:
        positive(tau_pos=self.tau_pos, tau_neg=self.tau_neg)


@register()
def sapo(cfg: SAPO, tokens: Tokens) -> Terms:
    """A (4 / tau) sigmoid(tau (rho - 1)): gradient weight rho sech^2(tau (rho - 1) / 2), largest at rho = 1.

    Difference from PPO: a smooth gate with a temperature for each sign of A instead of a clip.
    Source: SAPO (arXiv:2511.20347).
    """
    # `where` of two numbers would give float32, also for float64 tokens.
    tau = torch.full_like(tokens.advantages, cfg.tau_neg).masked_fill(tokens.advantages > 0, cfg.tau_pos)
    surrogate = tokens.advantages * 4 / tau * torch.sigmoid(tau * (ratio(tokens) - 1))
    return hard_gate(surrogate, torch.ones_like(tokens.mask))


@dataclass(frozen=True)
class DRPO:
    """Parameters of `drpo`."""

    delta: float = 12.5
    """Where the penalty's slope cancels the gain's; the release's 12.5 is nearly inert, 0.15 matches DPPO's threshold."""
    weight_by_mu: bool = True
    """Weight the penalty by mu(y_t), which makes it quadratic in probabilities; false = SPO, quadratic in the ratio."""

    def __post_init__(self) -> None:
        positive(delta=self.delta)


@register()
def drpo(cfg: DRPO, tokens: Tokens) -> Terms:
    """A rho minus the penalty |A| mu (rho - 1)^2 / (2 delta): weight 1 - sign(A) (pi - mu) / delta.

    Difference from DPPO: the weight falls linearly with the probability shift and reverses beyond delta, no mask.
    Source: DRPO (arXiv:2606.09821), as released; SPO is its form without mu.
    """
    rho = ratio(tokens)
    scale = tokens.rollout_logp.exp() if cfg.weight_by_mu else 1.0
    penalty = tokens.advantages.abs() * scale * (rho - 1).square() / (2 * cfg.delta)
    return hard_gate(tokens.advantages * rho - penalty, torch.ones_like(tokens.mask))
