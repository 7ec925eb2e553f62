"""Pairs of policies inside the sets of the paper's statements, and the search for those that come closest to a bound.

Legend and notation: `cppo.theory`. Source: CPPO (arXiv:2606.10968), section 3 and appendix B.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cppo.theory import (
    Pair,
    Paths,
    corollary6,
    corollary7,
    draw_normal,
    draw_uniform,
    earlier,
    enumerate_paths,
    equation18,
    float64,
    jump_pair,
    linear_weights,
    mean_slack,
    pair_from_logits,
    path_budget,
    proposition4,
    proposition4_coarse,
    proposition8,
    random_pair,
    terminal_budget,
    theorem1,
    tv,
    uniform,
    worst_residual,
)

INSIDE = 1 - 1e-12
"""Projections leave this share of a limit, so that rounding cannot step over it."""


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
    allowed = delta + delta_b * earlier(weights)
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
    pair = project(pair, weights, lambda t, spent: float64(limit))
    share = _share(float64(delta_b), terminal_budget(enumerate_paths(pair)))[:, None, None]
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
        drift, rare = (10 ** -(low + 2 * draw_uniform(generator, restarts)) for low in (1, 3))
        near = jump_pair(drift, rare, vocabulary, horizon)
        for logits, levels in ((mu, near.mu), (pi, near.pi)):
            for t, x in enumerate(levels):
                logits[t] = torch.cat([logits[t], x.log() + 0.01 * draw_normal(generator, *x.shape)])
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


def _lbar(paths: Paths) -> Tensor:
    """lbar = max_t l_t, [N]."""
    return paths.max_divergence.amax(-1)


def _share(limit: Tensor, divergence: Tensor) -> Tensor:
    """The largest mixing weight in [0, 1] that keeps a divergence within its limit."""
    return (INSIDE * limit / divergence.clamp(min=1e-300)).clamp(0, 1)


def _mix(mu: Tensor, pi: Tensor, limit: Tensor) -> Tensor:
    """pi mixed toward mu so that their TV is at most `limit`."""
    return torch.lerp(mu, pi, _share(limit, tv(mu, pi)).unsqueeze(-1))
