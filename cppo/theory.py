"""The paper's theory, checked exactly: every sequence of a small vocabulary and a short horizon is enumerated.

Left out on purpose: estimates. Policies are tables (one distribution a prefix), so every expectation is a finite sum in
float64 and a bound is either kept or broken. Nothing here is used by training.

Legend: N instances (pairs of policies), V vocabulary, T tokens, S = V**T sequences in lexicographic order (the first
token varies slowest), m a prefix length; t counts from 1, so entry t of a tuple or axis is at index t - 1.
Notation: rho_t = pi/mu of token t, D_t the TV between mu(.|s_t) and pi(.|s_t), u_t = E_mu[D_t], l_t >= D_t on every path,
lbar = max_t l_t, W_m and P_m the sums of w_t and w_t D_t over t <= m, |R| <= xi, lambda_t = 4 xi lbar (T - t),
r_t = lambda_t / w_t.
Source: CPPO (arXiv:2606.10968), section 3 and appendix B.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

INSIDE = 1 - 1e-12
"""Projections leave this share of a limit, so that rounding cannot step over it."""


@dataclass(frozen=True)
class Pair:
    """N pairs of tabular policies; entry t of `mu` and `pi` is [N, V^(t-1), V], one distribution a prefix."""

    mu: tuple[Tensor, ...]
    """The rollout policy mu, positive everywhere."""
    pi: tuple[Tensor, ...]
    """The target policy pi."""


def pair_from_logits(mu: Sequence[Tensor], pi: Sequence[Tensor]) -> Pair:
    """The softmax policies of these logits, each [N, V^(t-1), V]."""
    return Pair(tuple(x.softmax(-1) for x in mu), tuple(x.softmax(-1) for x in pi))


def random_pair(n: int, vocabulary: int, horizon: int, generator: torch.Generator) -> Pair:
    """Softmax policies from normal logits; how peaked mu is and how far pi is from it vary over the instances."""
    peaked = 0.2 + 3 * _uniform(generator, n)
    far = 0.02 * 100 ** _uniform(generator, n)  # 0.02 to 2, uniform in the logarithm
    mu = [peaked[:, None, None] * _normal(generator, n, vocabulary**t, vocabulary) for t in range(horizon)]
    return pair_from_logits(mu, [x + far[:, None, None] * _normal(generator, *x.shape) for x in mu])


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
    return 1 - (1 - w_min) * torch.arange(horizon, dtype=torch.float64) / max(horizon - 1, 1)


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
    return _float64(2 * xi * horizon * (horizon - 1) * lbar * delta_b)


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
    return _float64(4 * xi * lbar * (horizon - 1) ** 2 * delta_b)


# The conditions of the statements: the smallest constants with which a pair meets them, each [N].


def path_budget(paths: Paths, weights: Tensor) -> Tensor:
    """The smallest delta_b with P_m <= delta_b W_m for every path and m < T."""
    return (paths.spent(weights) / weights.cumsum(-1))[..., :-1].amax((1, 2))


def mean_slack(paths: Paths, weights: Tensor, delta_b: float | Tensor) -> Tensor:
    """The smallest eta >= 0 with sum_{t<=m} w_t u_t <= delta_b W_m + eta for every m < T."""
    allowed = _float64(delta_b).unsqueeze(-1) * weights.cumsum(-1)
    used = (weights * paths.mean_divergence).cumsum(-1)
    return (used - allowed)[:, :-1].amax(-1).clamp(min=0)


def mask_slack(paths: Paths, weights: Tensor, delta_b: float) -> Tensor:
    """max over paths and m of S_m - delta_b W_{m-1}: at most delta where CPPO's thresholds (Eq. 8) hold for every token."""
    return (paths.spent(weights) - delta_b * _before(weights)).amax((1, 2))


def terminal_budget(paths: Paths) -> Tensor:
    """The smallest delta_b with sum_{t<T} u_t <= (T-1) delta_b."""
    return paths.mean_divergence[:, :-1].mean(-1)


# Projections into the sets. TV to mu is linear in the mixing weight, so mixing pi toward mu meets a limit exactly.


def project(pair: Pair, weights: Tensor, room: Callable[[int, Tensor], Tensor]) -> Pair:
    """Mix pi toward mu, as little as needed, at every prefix whose w_t D_t exceeds its room; shorter prefixes first.

    room(t, spent) is the largest w_t D_t allowed at token t, as a number or [N, V^(t-1)]; spent = P_{t-1} [N, V^(t-1)]
    counts the mixed policies' divergence, so a path's budget is what its own prefix has left.
    """
    spent, pi = torch.zeros_like(pair.mu[0][..., 0]), []
    for t, (q, p) in enumerate(zip(pair.mu, pair.pi, strict=True), start=1):
        pi.append(_mix(q, p, room(t, spent) / weights[t - 1]))
        spent = (spent + weights[t - 1] * tv(q, pi[-1])).repeat_interleave(q.shape[-1], 1)
    return Pair(pair.mu, tuple(pi))


def project_paths(pair: Pair, weights: Tensor, caps: Tensor, delta_b: float) -> Pair:
    """Into Theorem 1's set: w_t D_t <= c_t for all t, P_m <= delta_b W_m for m < T, on every path; caps = c [T]."""
    allowed = delta_b * weights.cumsum(-1)
    last = len(weights)

    def room(t: int, spent: Tensor) -> Tensor:
        return caps[t - 1] if t == last else (allowed[t - 1] - spent).clamp(max=caps[t - 1])

    return project(pair, weights, room)


def project_mask(pair: Pair, weights: Tensor, delta: float, delta_b: float) -> Pair:
    """Into what CPPO's mask allows: w_t D_t <= min(delta, delta + delta_b W_{t-1} - S_{t-1}) (Eq. 8) on every path."""
    allowed = delta + delta_b * _before(weights)
    return project(pair, weights, lambda t, spent: (allowed[t - 1] - spent).clamp(max=delta))


def project_means(pair: Pair, weights: Tensor, caps: Tensor, delta_b: float, eta: float) -> Pair:
    """Into Proposition 8's set: w_t D_t <= c_t on every path, sum_{t<=m} w_t u_t <= delta_b W_m + eta for m < T.

    A token's D_t are first capped, then all scaled by one factor that leaves its mean what the earlier means have left.
    """
    allowed = delta_b * weights.cumsum(-1) + eta
    pair = project(pair, weights, lambda t, spent: caps[t - 1])
    prefix, used, pi = torch.ones_like(pair.mu[0][..., 0]), torch.zeros_like(pair.mu[0][:, 0, 0]), []
    for t, (q, p) in enumerate(zip(pair.mu, pair.pi, strict=True), start=1):
        mean = (prefix * tv(q, p)).sum(-1)
        left = (allowed[t - 1] - used) / weights[t - 1]
        share = _share(left, mean) if t < len(weights) else torch.ones_like(mean)
        pi.append(torch.lerp(q, p, share[:, None, None]))
        used = used + weights[t - 1] * share * mean
        prefix = (prefix.unsqueeze(-1) * q).flatten(1)
    return Pair(pair.mu, tuple(pi))


def project_terminal(pair: Pair, limit: float, delta_b: float) -> Pair:
    """Into Eq. 18's set: D_t <= limit on every path and sum_{t<T} u_t <= (T-1) delta_b (one factor for all t < T)."""
    weights = torch.ones(len(pair.mu), dtype=torch.float64)
    pair = project(pair, weights, lambda t, spent: _float64(limit))
    share = _share(_float64(delta_b), terminal_budget(enumerate_paths(pair)))[:, None, None]
    pi = [torch.lerp(q, p, share) for q, p in zip(pair.mu[:-1], pair.pi[:-1], strict=True)]
    return Pair(pair.mu, (*pi, pair.pi[-1]))


@dataclass(frozen=True)
class Claim:
    """A statement |Delta| <= bound about the pairs in a set."""

    source: str
    """Equation, proposition or theorem of arXiv:2606.10968."""
    bound: Callable[[Paths], Tensor]
    """[N], for |R| <= 1 (both sides are proportional to xi)."""
    project: Callable[[Pair], Pair] = lambda pair: pair
    """Brings any pair into the set."""


def sharp_claims(horizon: int, w_min: float = 1.0) -> dict[str, Claim]:
    """Every statement with the smallest constants that an arbitrary pair meets: no projection, the hardest test.

    Weights are Eq. 9's. Corollary 6 is Theorem 1 here (both have lbar = max D_t). Proposition 8 gets half of the mean
    budget as delta_b and the rest as slack.
    """
    w = linear_weights(horizon, w_min)

    def slack(paths: Paths) -> Tensor:
        half = 0.5 * ((w * paths.mean_divergence).cumsum(-1) / w.cumsum(-1))[:, :-1].amax(-1)
        return proposition8(horizon, _lbar(paths), half, mean_slack(paths, w, half))

    return {
        "proposition4": Claim("Proposition 4, left", lambda p: proposition4(p.mean_divergence, p.max_divergence)),
        "proposition4_coarse": Claim(
            "Proposition 4, right", lambda p: proposition4_coarse(p.mean_divergence, p.max_divergence)
        ),
        "uniform": Claim("C_uniform", lambda p: uniform(horizon, _lbar(p))),
        "theorem1": Claim("Theorem 1, Corollary 6", lambda p: theorem1(horizon, _lbar(p), path_budget(p, w))),
        "corollary7": Claim(
            "Corollary 7", lambda p: corollary7(horizon, (w * p.max_divergence).amax(-1), path_budget(p, w), w_min)
        ),
        "proposition8": Claim("Proposition 8", slack),
        "equation18": Claim("Eq. 18", lambda p: equation18(horizon, _lbar(p), terminal_budget(p))),
    }


def set_claims(horizon: int, delta: float, delta_b: float, w_min: float, eta: float | None = None) -> dict[str, Claim]:
    """The statements with given constants, each about the pairs projected into its set.

    "mask" is what the implemented rule guarantees: Proposition 8 with eta = delta and lbar = delta/w_min.
    eta: Proposition 8's slack (None = delta).
    """
    w, lbar, slack = linear_weights(horizon, w_min), delta / w_min, delta if eta is None else eta
    flat = torch.full_like(w, delta)

    def constant(value: Tensor) -> Callable[[Paths], Tensor]:
        return lambda paths: value.expand(len(paths.mu))

    return {
        "uniform": Claim(
            "C_uniform",
            constant(uniform(horizon, delta)),
            lambda p: project(p, torch.ones_like(w), lambda t, s: flat[0]),
        ),
        "corollary6": Claim(
            "Corollary 6",
            constant(corollary6(horizon, delta, delta_b)),
            lambda p: project_paths(p, w, w * delta, delta_b),
        ),
        "corollary7": Claim(
            "Corollary 7",
            constant(corollary7(horizon, delta, delta_b, w_min)),
            lambda p: project_paths(p, w, flat, delta_b),
        ),
        "proposition8": Claim(
            "Proposition 8",
            constant(proposition8(horizon, lbar, delta_b, slack)),
            lambda p: project_means(p, w, flat, delta_b, slack),
        ),
        "mask": Claim(
            "Proposition 8, Eq. 8",
            constant(proposition8(horizon, lbar, delta_b, delta)),
            lambda p: project_mask(p, w, delta, delta_b),
        ),
        "equation18": Claim(
            "Eq. 18", constant(equation18(horizon, delta, delta_b)), lambda p: project_terminal(p, delta, delta_b)
        ),
    }


@dataclass(frozen=True)
class Found:
    """The instance with the largest |Delta| / bound that a search has met; its rewards are `worst_rewards`."""

    ratio: float
    residual: float
    """|Delta| for |R| <= 1."""
    pair: Pair
    """In the claim's set, N = 1."""


def best(claim: Claim, pair: Pair) -> Found:
    """The instance of `pair`, projected into the claim's set, with the largest ratio under its worst rewards."""
    return _measure(claim, pair)[1]


def search(
    claim: Claim,
    vocabulary: int,
    horizon: int,
    generator: torch.Generator,
    *,
    restarts: int = 16,
    steps: int = 150,
    lr: float = 0.1,
    jumps: bool = True,
) -> Found:
    """Gradient ascent (Adam on all logits, the projection differentiated through) on |Delta| / bound.

    The rewards are always the worst ones. Starts: random pairs, and with `jumps` as many pairs near `jump_pair`.
    """
    start = random_pair(restarts, vocabulary, horizon, generator)
    mu, pi = ([x.log() for x in levels] for levels in (start.mu, start.pi))
    if jumps:
        drift, rare = (10 ** -(low + 2 * _uniform(generator, restarts)) for low in (1, 3))
        near = jump_pair(drift, rare, vocabulary, horizon)
        for logits, levels in ((mu, near.mu), (pi, near.pi)):
            for t, x in enumerate(levels):
                logits[t] = torch.cat([logits[t], x.log() + 0.01 * _normal(generator, *x.shape)])
    leaves = [x.detach().clone().requires_grad_() for x in (*mu, *pi)]
    optimizer = torch.optim.Adam(leaves, lr=lr)
    finds = []
    for _ in range(steps):
        ratio, found = _measure(claim, pair_from_logits(leaves[:horizon], leaves[horizon:]))
        finds.append(found)
        optimizer.zero_grad()
        ratio.log().sum().neg().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return max(finds, key=lambda found: found.ratio)


def _measure(claim: Claim, pair: Pair) -> tuple[Tensor, Found]:
    """|Delta| / bound of every instance [N], differentiable, and the best instance."""
    inside = claim.project(pair)
    paths = enumerate_paths(inside)
    residual = worst_residual(paths)
    ratio = residual / claim.bound(paths)
    i = int(ratio.argmax())
    mu, pi = (tuple(x[i : i + 1].detach() for x in levels) for levels in (inside.mu, inside.pi))
    return ratio, Found(float(ratio[i].detach()), float(residual[i].detach()), Pair(mu, pi))


def _float64(x: float | Tensor) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64)


def _lbar(paths: Paths) -> Tensor:
    """lbar = max_t l_t, [N]."""
    return paths.max_divergence.amax(-1)


def _remaining(horizon: int) -> Tensor:
    """T - t, [T]."""
    return horizon - torch.arange(1, horizon + 1, dtype=torch.float64)


def _before(weights: Tensor) -> Tensor:
    """W_{t-1}, [T]."""
    return torch.nn.functional.pad(weights.cumsum(-1)[:-1], (1, 0))


def _share(limit: Tensor, divergence: Tensor) -> Tensor:
    """The largest mixing weight in [0, 1] that keeps a divergence within its limit."""
    return (INSIDE * limit / divergence.clamp(min=1e-300)).clamp(0, 1)


def _mix(mu: Tensor, pi: Tensor, limit: Tensor) -> Tensor:
    """pi mixed toward mu so that their TV is at most `limit`."""
    return torch.lerp(mu, pi, _share(limit, tv(mu, pi)).unsqueeze(-1))


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
