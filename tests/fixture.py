"""Batches for tests of numerics: the fixture behind `data/fixture_vectors.json`, and random ragged batches.

Legend: B responses, T tokens, V vocabulary, K top-K entries of mu.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cppo import divergences
from cppo.loss import Aggregation, Metrics, policy_loss
from cppo.objectives import Objective, Tokens

AGGREGATIONS: tuple[Aggregation, ...] = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "token-sum",
)
K = 3
HORIZON = 6


@dataclass(frozen=True)
class Fixture:
    """Four responses of 6, 5, 3 and 1 tokens over a vocabulary of 8, in float64."""

    logp_all: Tensor
    """[B, T, V] log pi."""
    rollout_logp_all: Tensor
    """[B, T, V] log mu."""
    y: Tensor
    """[B, T] sampled ids; padding has some too, which the mask must keep out."""
    rewards: Tensor
    """[B]; all four responses are one group."""
    mask: Tensor
    """[B, T]."""

    @property
    def logp(self) -> Tensor:
        return self.logp_all.gather(-1, self.y.unsqueeze(-1)).squeeze(-1)

    @property
    def rollout_logp(self) -> Tensor:
        return self.rollout_logp_all.gather(-1, self.y.unsqueeze(-1)).squeeze(-1)

    def advantages(self, std: bool = False) -> Tensor:
        """[B, T] rewards minus the group's mean, if `std` divided by its (unbiased) deviation + 1e-6."""
        centred = self.rewards - self.rewards.mean()
        if std:
            centred = centred / (self.rewards.std() + 1e-6)
        return centred.unsqueeze(-1).expand_as(self.mask)

    def divergence(self, estimator: str, kind: divergences.Kind) -> Tensor:
        """[B, T] for estimator "binary", "top_k_union", "top_k_replace", "exact" or "k3" (which has no kind)."""
        if estimator == "binary":
            return divergences.binary(self.logp, self.rollout_logp, kind)
        if estimator == "k3":
            return divergences.sampled(self.logp, self.rollout_logp, "k3")
        if estimator == "exact":
            return divergences.exact(self.logp_all, self.rollout_logp_all, kind)
        support: divergences.Support = "union" if estimator == "top_k_union" else "replace"
        rollout_topk_logp, ids = self.rollout_logp_all.topk(K, dim=-1)
        topk_logp = self.logp_all.gather(-1, ids)
        return divergences.top_k(
            self.logp, self.rollout_logp, topk_logp, rollout_topk_logp, ids, self.y, kind=kind, support=support
        )

    def tokens(self, divergence: Tensor | None = None, position: Tensor | None = None, std: bool = False) -> Tokens:
        return Tokens(self.logp, self.rollout_logp, self.advantages(std), self.mask, divergence, position)

    def rotated(self, by: int) -> Tensor:
        """[B, T] a permutation of 1..T_i: token p (from 0) takes position (p + by) mod T_i."""
        lengths = self.mask.sum(-1, keepdim=True)
        return (torch.arange(self.mask.shape[1]) + by) % lengths + 1


def spec_fixture() -> Fixture:
    """The fixture of the objective specification: logits are sines of the response, token and vocabulary index."""
    b = torch.arange(4, dtype=torch.float64).view(4, 1, 1)
    t = torch.arange(6, dtype=torch.float64).view(1, 6, 1)
    v = torch.arange(8, dtype=torch.float64).view(1, 1, 8)
    z_mu = 2 * torch.sin(1.3 * b + 0.7 * t + 1.1 * v + 0.4)
    z_pi = z_mu + 0.9 * torch.cos(0.9 * b - 0.8 * t + 1.7 * v + 0.2)
    y = (3 * torch.arange(4).view(4, 1) + 5 * torch.arange(6).view(1, 6) + 2) % 8
    lengths = torch.tensor([6, 5, 3, 1])
    return Fixture(
        logp_all=z_pi.log_softmax(-1),
        rollout_logp_all=z_mu.log_softmax(-1),
        y=y,
        rewards=torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64),
        mask=torch.arange(6) < lengths.unsqueeze(-1),
    )


def ragged_mask(batch: int, width: int, generator: torch.Generator) -> Tensor:
    """bool [B, T]: right-padded rows of random length (0 included), with some holes inside."""
    lengths = torch.randint(0, width + 1, (batch, 1), generator=generator)
    holes = torch.rand(batch, width, generator=generator) < 0.2
    return (torch.arange(width) < lengths) & ~holes


def random_tokens(seed: int, batch: int = 6, width: int = 9, mask: Tensor | None = None) -> Tokens:
    """A ragged float64 batch with holes, whose rows drift by very different amounts.

    The divergence is drawn, not computed from the log-probabilities: the rules must not care where it comes from. Its
    scale differs by row, so that with the settings used here thresholds and budgets both bind, and adaptive budgets
    end at their floor, between the limits, and at their ceiling. Advantages are 0 in one response of five and differ by
    token in three of ten.
    """
    g = torch.Generator().manual_seed(seed)
    mask = ragged_mask(batch, width, g) if mask is None else mask
    rollout_logp = -3 * torch.rand(batch, width, generator=g, dtype=torch.float64)
    logp = rollout_logp + 0.5 * torch.randn(batch, width, generator=g, dtype=torch.float64)
    size = torch.rand(batch, 1, generator=g, dtype=torch.float64) + 0.2
    sign = torch.randint(0, 2, (batch, 1), generator=g) * 2 - 1
    by_token = torch.randn(batch, width, generator=g, dtype=torch.float64)  # as GAE gives them
    kind = torch.rand(batch, 1, generator=g)
    advantages = torch.where(kind < 0.3, by_token, torch.where(kind < 0.5, 0, sign * size))
    scale = torch.tensor([0.005, 0.012, 0.025, 0.06], dtype=torch.float64)[torch.randint(0, 4, (batch, 1), generator=g)]
    divergence = scale * -torch.rand(batch, width, generator=g, dtype=torch.float64).log()
    # Position 0 outside the mask; inside, a permutation of 1..T_i: the rank of a random number.
    order = torch.where(mask, torch.rand(batch, width, generator=g), 2.0)
    position = torch.where(mask, order.argsort(-1).argsort(-1) + 1, 0)
    return Tokens(logp, rollout_logp, advantages, mask, divergence, position)


def loss_and_grad(
    objective: Objective, tokens: Tokens, aggregation: Aggregation = "token-sum", denominator: float | None = None
) -> tuple[Tensor, Tensor, Metrics]:
    """(loss, d loss / d logp, metrics) with a fresh leaf in place of `tokens.logp`."""
    leaf = tokens.logp.detach().clone().requires_grad_()
    horizon = HORIZON if aggregation == "seq-mean-token-sum-norm" else None
    loss, metrics = policy_loss(objective, replace(tokens, logp=leaf), aggregation, horizon, denominator)
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad, metrics


def rows(tokens: Tokens, index: list[int] | slice) -> Tokens:
    """The batch of some rows."""
    fields = {name: value[index] for name, value in vars(tokens).items() if value is not None}
    return Tokens(**fields)
