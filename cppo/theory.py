"""The paper's theory, checked exactly: every sequence of a small vocabulary and a short horizon is enumerated.

This module holds the policies, both sides of the statements, and the conditions under which they hold;
`cppo.theory_search` looks for the pairs of policies that come closest to a bound. Estimates are left out on purpose:
policies are tables with one distribution per prefix, so every expectation is a finite sum in float64, and a bound is
either kept or broken. Training uses nothing of this.

Legend: N instances (pairs of policies), V vocabulary, T tokens, S = V**T sequences in lexicographic order (the first
token varies slowest), m a prefix length; t counts from 1, so entry t of a tuple or axis is at index t - 1.
Notation: rho_t = pi/mu of token t, D_t the total variation (TV) between mu(.|s_t) and pi(.|s_t), u_t = E_mu[D_t],
l_t >= D_t on every path, lbar = max_t l_t, W_m and P_m the sums of w_t and w_t D_t over t <= m, |R| <= xi,
lambda_t = 4 xi lbar (T - t), r_t = lambda_t / w_t.
Source: CPPO (arXiv:2606.10968), section 3 and appendix B.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cppo.objectives.divergence import position_weight


@dataclass(frozen=True)
class Pair:
    """N pairs of tabular policies; entry t of `mu` and `pi` is [N, V^(t-1), V], one distribution per prefix."""

    mu: tuple[Tensor, ...]
    """The rollout policy mu, positive everywhere."""
    pi: tuple[Tensor, ...]
    """The target policy pi."""


def pair_from_logits(mu: Sequence[Tensor], pi: Sequence[Tensor]) -> Pair:
    """The softmax policies of these logits, each [N, V^(t-1), V]."""
    return Pair(tuple(x.softmax(-1) for x in mu), tuple(x.softmax(-1) for x in pi))


def random_pair(n: int, vocabulary: int, horizon: int, generator: torch.Generator) -> Pair:
    """Softmax policies from normal logits; how peaked mu is and how far pi is from it vary over the instances."""
    peaked = 0.2 + 3 * draw_uniform(generator, n)
    far = 0.02 * 100 ** draw_uniform(generator, n)  # 0.02 to 2, uniform in the logarithm
    mu = [peaked[:, None, None] * draw_normal(generator, n, vocabulary**t, vocabulary) for t in range(horizon)]
    return pair_from_logits(mu, [x + far[:, None, None] * draw_normal(generator, *x.shape) for x in mu])


def jump_pair(drift: Tensor, rare: Tensor, vocabulary: int, horizon: int) -> Pair:
    """The pair that makes the uniform bound tight: mu hardly ever takes the last token, pi gives it `drift` more mass.

    drift, rare: [N], D_t of every prefix and mu's probability of the last token. For rare -> 0 the worst reward has
    |Delta| = 2 xi T d (1 - (1 - d)^(T-1)) with d = drift, which is the bound 2 xi T(T-1) d^2 in leading order.
    """

    def table(last: Tensor, t: int) -> Tensor:
        others = ((1 - last) / (vocabulary - 1)).unsqueeze(-1).expand(-1, vocabulary - 1)
        return torch.cat([others, last.unsqueeze(-1)], -1).unsqueeze(1).expand(-1, vocabulary**t, -1)

    return Pair(*(tuple(table(last, t) for t in range(horizon)) for last in (rare, rare + drift)))


@dataclass(frozen=True)
class Paths:
    """A `Pair` along every sequence: fields [N, S, T]."""

    mu: Tensor
    """mu(y_t | s_t)."""
    pi: Tensor
    """pi(y_t | s_t)."""
    divergence: Tensor
    """D_t."""

    @property
    def horizon(self) -> int:
        """T."""
        return self.mu.shape[-1]

    @cached_property
    def probability(self) -> Tensor:
        """mu(y) [N, S]."""
        return self.mu.prod(-1)

    @cached_property
    def ratio(self) -> Tensor:
        """rho_t [N, S, T]."""
        return self.pi / self.mu

    @cached_property
    def mean_divergence(self) -> Tensor:
        """u_t = E_mu[D_t], [N, T]."""
        return (self.probability.unsqueeze(-1) * self.divergence).sum(1)

    @cached_property
    def max_divergence(self) -> Tensor:
        """The smallest l_t with D_t <= l_t on every path, [N, T]."""
        return self.divergence.amax(1)

    def spent(self, weights: Tensor) -> Tensor:
        """P_m = sum of w_t D_t over t <= m, [N, S, T]; weights: [T]."""
        return (weights * self.divergence).cumsum(-1)


def enumerate_paths(pair: Pair) -> Paths:
    """Every sequence of every instance."""
    sequences = pair.mu[0].shape[-1] ** len(pair.mu)

    def along(levels: Sequence[Tensor]) -> Tensor:
        flat = [x.flatten(1) for x in levels]
        return torch.stack([x.repeat_interleave(sequences // x.shape[1], 1) for x in flat], -1)

    return Paths(along(pair.mu), along(pair.pi), along([tv(*both) for both in zip(pair.mu, pair.pi, strict=True)]))


def tv(mu: Tensor, pi: Tensor) -> Tensor:
    """Total variation over the last axis."""
    return 0.5 * (mu - pi).abs().sum(-1)


@dataclass(frozen=True)
class Values:
    """The terms of the performance-difference identity J(pi) - J(mu) = L' - Delta (Eq. 1, Lemma 2), each [N]."""

    target: Tensor
    """J(pi) = E_pi[R]."""
    rollout: Tensor
    """J(mu) = E_mu[R]."""
    surrogate: Tensor
    """L' = E_mu[R sum_t (rho_t - 1)]."""
    residual: Tensor
    """Delta = E_mu[R sum_t (rho_t - 1)(1 - rho_{t+1:T})]."""


def values(paths: Paths, rewards: Tensor) -> Values:
    """All four terms, each from its own definition; rewards: [N, S]."""
    return Values(
        target=(paths.pi.prod(-1) * rewards).sum(-1),
        rollout=(paths.probability * rewards).sum(-1),
        surrogate=(paths.probability * rewards * (paths.ratio - 1).sum(-1)).sum(-1),
        residual=(residual_measure(paths) * rewards).sum(-1),
    )


def residual_measure(paths: Paths) -> Tensor:
    """mu(y) sum_t (rho_t - 1)(1 - rho_{t+1:T}) [N, S]: Delta is its product with the rewards."""
    rest = paths.ratio.flip(-1).cumprod(-1).flip(-1)  # rho_{t:T}
    after = torch.cat([rest[..., 1:], torch.ones_like(rest[..., :1])], -1)  # rho_{t+1:T}; empty product = 1
    return paths.probability * ((paths.ratio - 1) * (1 - after)).sum(-1)


def worst_rewards(paths: Paths, xi: float = 1.0) -> Tensor:
    """The rewards in [-xi, xi] with the largest Delta, [N, S]: Delta is linear in them, so they sit at the ends."""
    return xi * residual_measure(paths).sign()


def worst_residual(paths: Paths, xi: float = 1.0) -> Tensor:
    """max over |R| <= xi of |Delta|, [N]."""
    return xi * residual_measure(paths).abs().sum(-1)


# The constants of the statements. Arguments may be numbers or [N]; each returns what Delta must not exceed.


def linear_weights(horizon: int, w_min: float) -> Tensor:
    """w_t = 1 - (1 - w_min)(t - 1)/(T - 1), [T] (Eq. 9). By Proposition 5, (T - t)/w_t falls with t."""
    return position_weight(torch.arange(1, horizon + 1, dtype=torch.float64), horizon, w_min)


def rates(weights: Tensor) -> Tensor:
    """g_t = (T - t)/w_t, [T]: r_t = 4 xi lbar g_t, which Theorem 1 and Proposition 8 need non-increasing."""
    return _remaining(len(weights)) / weights


def lambdas(horizon: int, lbar: Tensor, xi: float = 1.0) -> Tensor:
    """lambda_t = 4 xi lbar (T - t), [N, T]."""
    return 4 * xi * lbar.unsqueeze(-1) * _remaining(horizon)


def proposition4(u: Tensor, limits: Tensor, xi: float = 1.0) -> Tensor:
    """4 xi sum_{t<T} u_t sum_{j>t} l_j (Proposition 4, left); u, limits: [N, T]."""
    later = limits.sum(-1, keepdim=True) - limits.cumsum(-1)
    return 4 * xi * (u * later)[..., :-1].sum(-1)


def proposition4_coarse(u: Tensor, limits: Tensor, xi: float = 1.0) -> Tensor:
    """sum_{t<T} lambda_t u_t (Proposition 4, right); u, limits: [N, T]."""
    return (lambdas(u.shape[-1], limits.amax(-1), xi) * u).sum(-1)  # lambda_T = 0


def theorem1(horizon: int, lbar: float | Tensor, delta_b: float | Tensor, xi: float = 1.0) -> Tensor:
    """2 xi T(T-1) lbar delta_b (Theorem 1), if w_t D_t <= c_t = w_t l_t, P_m <= delta_b W_m for m < T, r_t non-increasing."""
    return float64(2 * xi * horizon * (horizon - 1) * lbar * delta_b)


def uniform(horizon: int, delta: float | Tensor, xi: float = 1.0) -> Tensor:
    """C_uniform = 2 xi T(T-1) delta^2, if D_t <= delta (DPPO's rule)."""
    return theorem1(horizon, delta, delta, xi)


def corollary6(horizon: int, delta: float | Tensor, delta_b: float | Tensor, xi: float = 1.0) -> Tensor:
    """2 xi T(T-1) delta delta_b (Corollary 6): Theorem 1 with c_t = w_t delta."""
    return theorem1(horizon, delta, delta_b, xi)


def corollary7(
    horizon: int, delta: float | Tensor, delta_b: float | Tensor, w_min: float | Tensor, xi: float = 1.0
) -> Tensor:
    """2 xi T(T-1) (delta/w_min) delta_b (Corollary 7): Theorem 1 with w_t D_t <= delta."""
    return theorem1(horizon, delta / w_min, delta_b, xi)


def proposition8(
    horizon: int,
    lbar: float | Tensor,
    delta_b: float | Tensor,
    eta: float | Tensor,
    first_weight: float | Tensor = 1.0,
    xi: float = 1.0,
) -> Tensor:
    """2 xi T(T-1) lbar delta_b + 4 eta xi lbar (T-1)/w_1 (Proposition 8), if sum_{t<=m} w_t u_t <= delta_b W_m + eta, m < T."""
    return theorem1(horizon, lbar, delta_b, xi) + 4 * eta * xi * lbar * (horizon - 1) / first_weight


def equation18(horizon: int, lbar: float | Tensor, delta_b: float | Tensor, xi: float = 1.0) -> Tensor:
    """4 xi lbar (T-1)^2 delta_b (Eq. 18), if sum_{t<T} u_t <= (T-1) delta_b and nothing else: (2 - 2/T) times Theorem 1's."""
    return float64(4 * xi * lbar * (horizon - 1) ** 2 * delta_b)


# The conditions of the statements: the smallest constants with which a pair meets them, each [N].


def path_budget(paths: Paths, weights: Tensor) -> Tensor:
    """The smallest delta_b with P_m <= delta_b W_m for every path and m < T."""
    return (paths.spent(weights) / weights.cumsum(-1))[..., :-1].amax((1, 2))


def mean_slack(paths: Paths, weights: Tensor, delta_b: float | Tensor) -> Tensor:
    """The smallest eta >= 0 with sum_{t<=m} w_t u_t <= delta_b W_m + eta for every m < T."""
    allowed = float64(delta_b).unsqueeze(-1) * weights.cumsum(-1)
    used = (weights * paths.mean_divergence).cumsum(-1)
    return (used - allowed)[:, :-1].amax(-1).clamp(min=0)


def mask_slack(paths: Paths, weights: Tensor, delta_b: float) -> Tensor:
    """max over paths and m of S_m - delta_b W_{m-1}: at most delta where CPPO's thresholds (Eq. 8) hold for every token."""
    return (paths.spent(weights) - delta_b * earlier(weights)).amax((1, 2))


def terminal_budget(paths: Paths) -> Tensor:
    """The smallest delta_b with sum_{t<T} u_t <= (T-1) delta_b."""
    return paths.mean_divergence[:, :-1].mean(-1)


# Helpers that `cppo.theory_search` uses too.


def float64(x: float | Tensor) -> Tensor:
    """`x` as a float64 tensor."""
    return torch.as_tensor(x, dtype=torch.float64)


def _remaining(horizon: int) -> Tensor:
    """T - t, [T]."""
    return horizon - torch.arange(1, horizon + 1, dtype=torch.float64)


def earlier(weights: Tensor) -> Tensor:
    """W_{t-1}, [T]."""
    return torch.nn.functional.pad(weights.cumsum(-1)[:-1], (1, 0))


def draw_uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """Float64 numbers of this shape, uniform in [0, 1)."""
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def draw_normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Float64 numbers of this shape, standard normal."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
