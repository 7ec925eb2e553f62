"""The paper's statements on enumerated policies: random instances, instances found by ascent, and the tests' own teeth.

Every random test runs over `CASES` draws of settings with `N` instances each: 600 instances a statement.
"""

import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cppo import theory as th
from cppo import theory_search as ts
from cppo.objectives import Tokens, objective
from cppo.objectives.divergence import CPPO, prefix_sums

ATOL = 1e-10
N = 15
CASES = range(40)
SHAPES = ((2, 2), (2, 3), (2, 4), (2, 7), (3, 2), (3, 3), (3, 5), (4, 2), (4, 3), (4, 4))
"""(V, T)."""


@dataclass(frozen=True)
class Case:
    """N random pairs with random rewards and settings."""

    generator: torch.Generator
    horizon: int
    pair: th.Pair
    delta: float
    delta_b: float
    w_min: float
    xi: float

    @property
    def weights(self) -> Tensor:
        return th.linear_weights(self.horizon, self.w_min)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def rewards(self, paths: th.Paths) -> list[Tensor]:
        """Some inside [-xi, xi], some at its ends, and the worst."""
        inside = self.uniform(-self.xi, self.xi, *paths.probability.shape)
        return [inside, self.xi * inside.sign(), th.worst_rewards(paths, self.xi)]


def case(seed: int) -> Case:
    g = torch.Generator().manual_seed(seed)
    vocabulary, horizon = SHAPES[seed % len(SHAPES)]
    pair = th.random_pair(N, vocabulary, horizon, g)
    delta, share, w_min, xi = torch.rand(4, generator=g, dtype=torch.float64).tolist()
    delta = 0.02 * 20**delta  # 0.02 to 0.4
    return Case(g, horizon, pair, delta, (0.05 + 0.95 * share) * delta, 0.3 + 0.7 * w_min, 0.1 + 3 * xi)


def kept(residual: Tensor, bound: Tensor, scale: float = 1.0) -> bool:
    """|Delta| <= bound in every instance; tests of the tests shrink the bound by `scale`."""
    return bool((residual.abs() <= scale * bound + ATOL).all())


def check(one: Case, paths: th.Paths, bound: Tensor) -> None:
    """A bound for |R| <= 1 holds for every kind of rewards; with Eq. 1, so does the lower bound on J(pi) - J(mu)."""
    for rewards in one.rewards(paths):
        v = th.values(paths, rewards)
        assert kept(v.residual, one.xi * bound)
        assert (v.target - v.rollout >= v.surrogate - one.xi * bound - ATOL).all()


def falling_weights(one: Case) -> Tensor:
    """[T] random weights, w_1 not 1, rising and falling as far as a non-increasing r_t allows."""
    left = torch.arange(one.horizon, 0, -1, dtype=torch.float64) - 1  # T - t
    least = (left[1:] / left[:-1]).clamp(min=0.3)  # w_{t+1}/w_t; w_T is free
    factor = least + one.uniform(0, 1, one.horizon - 1) * (1.3 - least)
    weights = torch.cat([one.uniform(0.5, 2, 1), factor]).cumprod(0)
    assert (th.rates(weights).diff() <= 1e-12).all()
    return weights


# Enumeration against slow, obvious versions.

Table = dict[tuple[int, ...], list[float]]


def tables(levels: tuple[Tensor, ...]) -> Table:
    """Prefix -> distribution, of the first instance."""
    out: Table = {}
    for t, level in enumerate(levels):
        for i, row in enumerate(level[0].tolist()):
            digits = [i // len(row) ** (t - 1 - k) % len(row) for k in range(t)]
            out[tuple(digits)] = row
    return out


def value(policy: Table, rewards: dict[tuple[int, ...], float], prefix: tuple[int, ...] = ()) -> float:
    """Expected reward after a prefix, by backward recursion."""
    if prefix in rewards:
        return rewards[prefix]
    return sum(p * value(policy, rewards, (*prefix, token)) for token, p in enumerate(policy[prefix]))


def walk(mu: Table, pi: Table, prefix: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], list[list[float]]]]:
    """(sequence, [mu, pi, D] of each token) in lexicographic order."""
    if prefix not in mu:
        yield prefix, []
        return
    divergence = sum(abs(p - q) for p, q in zip(pi[prefix], mu[prefix], strict=True)) / 2
    for token, (q, p) in enumerate(zip(mu[prefix], pi[prefix], strict=True)):
        for sequence, rest in walk(mu, pi, (*prefix, token)):
            yield sequence, [[q, p, divergence], *rest]


@pytest.mark.parametrize(("vocabulary", "horizon"), [(2, 2), (2, 5), (3, 3), (4, 4)])
def test_enumeration_is_the_slow_recursion(vocabulary: int, horizon: int) -> None:
    g = torch.Generator().manual_seed(5)
    pair = th.random_pair(1, vocabulary, horizon, g)
    paths = th.enumerate_paths(pair)
    rewards = 2 * torch.rand(1, vocabulary**horizon, generator=g, dtype=torch.float64) - 1
    weights = th.linear_weights(horizon, 0.6)
    mu, pi, w = tables(pair.mu), tables(pair.pi), [1 - 0.4 * t / (horizon - 1) for t in range(horizon)]
    reward: dict[tuple[int, ...], float] = {}
    surrogate = residual = worst = budget = slack = 0.0
    u, limits = [0.0] * horizon, [0.0] * horizon
    leaves = list(walk(mu, pi))
    for (sequence, steps), r in zip(leaves, rewards[0].tolist(), strict=True):
        reward[sequence] = r
        probability, rho = math.prod(q for q, _, _ in steps), [p / q for q, p, _ in steps]
        kernel = sum((rho[t] - 1) * (1 - math.prod(rho[t + 1 :])) for t in range(horizon))
        surrogate += probability * r * sum(x - 1 for x in rho)
        residual += probability * r * kernel
        worst += probability * abs(kernel)
        for t, (_, _, d) in enumerate(steps):
            u[t] += probability * d
            limits[t] = max(limits[t], d)
        for m in range(1, horizon + 1):
            used = sum(w[t] * steps[t][2] for t in range(m))
            slack = max(slack, used - 0.01 * sum(w[: m - 1]))
            if m < horizon:
                budget = max(budget, used / sum(w[:m]))
    mean_slack = max(max(0.0, sum(w[t] * u[t] for t in range(m)) - 0.01 * sum(w[:m])) for m in range(1, horizon))
    fine = 4 * sum(u[t] * sum(limits[t + 1 :]) for t in range(horizon - 1))
    coarse = sum(4 * max(limits) * (horizon - 1 - t) * u[t] for t in range(horizon))
    v = th.values(paths, rewards)
    found = {
        "J(pi)": (v.target, value(pi, reward)),
        "J(mu)": (v.rollout, value(mu, reward)),
        "L'": (v.surrogate, surrogate),
        "Delta": (v.residual, residual),
        "worst": (th.worst_residual(paths), worst),
        "u": (paths.mean_divergence[0], u),
        "l": (paths.max_divergence[0], limits),
        "delta_b": (th.path_budget(paths, weights), budget),
        "eta": (th.mean_slack(paths, weights, 0.01), mean_slack),
        "mask slack": (th.mask_slack(paths, weights, 0.01), slack),
        "terminal": (th.terminal_budget(paths), sum(u[:-1]) / (horizon - 1)),
        "Prop. 4 left": (th.proposition4(paths.mean_divergence, paths.max_divergence), fine),
        "Prop. 4 right": (th.proposition4_coarse(paths.mean_divergence, paths.max_divergence), coarse),
    }
    for name, (ours, slow) in found.items():
        np.testing.assert_allclose(ours.numpy(), slow, rtol=1e-10, atol=1e-13, err_msg=name)


def test_enumeration_agrees_with_monte_carlo() -> None:
    vocabulary, horizon, samples = 3, 4, 200_000
    g = torch.Generator().manual_seed(11)
    mu = [torch.randn(1, vocabulary**t, vocabulary, generator=g, dtype=torch.float64) for t in range(horizon)]
    pair = th.pair_from_logits(mu, [x + 0.7 * torch.randn(x.shape, generator=g, dtype=torch.float64) for x in mu])
    paths = th.enumerate_paths(pair)
    assert 0.05 < float(paths.divergence.mean()) < 0.6
    rewards = torch.rand(1, vocabulary**horizon, generator=g, dtype=torch.float64)
    rng = np.random.default_rng(0)
    prefix = np.zeros(samples, dtype=np.int64)
    rho, divergence = np.empty((horizon, samples)), np.empty((horizon, samples))
    for t in range(horizon):
        q, p = pair.mu[t][0].numpy()[prefix], pair.pi[t][0].numpy()[prefix]
        token = np.minimum((rng.random((samples, 1)) > q.cumsum(1)).sum(1), vocabulary - 1)
        rho[t] = p[np.arange(samples), token] / q[np.arange(samples), token]
        divergence[t] = np.abs(p - q).sum(1) / 2
        prefix = prefix * vocabulary + token
    r = rewards[0].numpy()[prefix]
    kernel = sum((rho[t] - 1) * (1 - rho[t + 1 :].prod(0)) for t in range(horizon))
    v = th.values(paths, rewards)
    pairs = [(v.rollout, r), (v.target, r * rho.prod(0)), (v.surrogate, r * (rho - 1).sum(0)), (v.residual, r * kernel)]
    pairs += [(paths.mean_divergence[:, t], divergence[t]) for t in range(1, horizon)]
    for exact, draws in pairs:
        assert abs(float(exact) - draws.mean()) < 5 * draws.std() / math.sqrt(samples)
        assert draws.std() > 0


# The statements on random instances.


@pytest.mark.parametrize("seed", CASES)
def test_performance_difference_identity(seed: int) -> None:
    one = case(seed)
    paths = th.enumerate_paths(one.pair)
    for rewards in one.rewards(paths):
        v = th.values(paths, rewards)
        torch.testing.assert_close(v.target - v.rollout, v.surrogate - v.residual, rtol=ATOL, atol=ATOL)
        assert kept(v.residual, th.worst_residual(paths, one.xi))
    torch.testing.assert_close(v.residual, th.worst_residual(paths, one.xi), rtol=1e-12, atol=0)


@pytest.mark.parametrize("seed", CASES)
def test_proposition_4(seed: int) -> None:
    one = case(seed)
    paths = th.enumerate_paths(one.pair)
    u = paths.mean_divergence
    for limits in (paths.max_divergence, paths.max_divergence + one.uniform(0, 0.3, *u.shape)):
        fine, coarse = th.proposition4(u, limits), th.proposition4_coarse(u, limits)
        check(one, paths, fine)
        assert kept(fine, coarse)


@pytest.mark.parametrize("seed", CASES)
def test_theorem_1_with_any_weights_and_caps_it_allows(seed: int) -> None:
    one = case(seed)
    weights, caps = falling_weights(one), one.delta * one.uniform(0.2, 2, one.horizon)
    pair = ts.project_paths(one.pair, weights, caps, one.delta_b)
    paths = th.enumerate_paths(pair)
    assert (weights * paths.divergence <= caps).all()
    assert (paths.spent(weights) <= one.delta_b * weights.cumsum(0) * (1 + 1e-12))[..., :-1].all()
    check(one, paths, th.theorem1(one.horizon, (caps / weights).max(), one.delta_b))


@pytest.mark.parametrize("seed", CASES)
def test_proposition_8_with_any_weights_and_caps_it_allows(seed: int) -> None:
    one = case(seed)
    weights, caps = falling_weights(one), one.delta * one.uniform(0.2, 2, one.horizon)
    eta = float(one.uniform(0, 2, 1)) * one.delta
    paths = th.enumerate_paths(ts.project_means(one.pair, weights, caps, one.delta_b, eta))
    assert (weights * paths.divergence <= caps).all()
    assert (th.mean_slack(paths, weights, one.delta_b) <= eta * (1 + 1e-12)).all()
    check(one, paths, th.proposition8(one.horizon, (caps / weights).max(), one.delta_b, eta, weights[0]))


@pytest.mark.parametrize("seed", CASES)
def test_corollaries_and_equation_18(seed: int) -> None:
    """Each on pairs projected into its set; membership is read from the paths, not from the projection."""
    one = case(seed)
    w, delta, delta_b = one.weights, one.delta * (1 + 1e-12), one.delta_b * (1 + 1e-12)
    claims = ts.set_claims(one.horizon, one.delta, one.delta_b, one.w_min)
    paths = {name: th.enumerate_paths(claim.project(one.pair)) for name, claim in claims.items()}
    assert (paths["uniform"].divergence <= delta).all()
    assert (paths["corollary6"].divergence <= delta).all()
    for name in ("corollary7", "proposition8", "mask"):
        assert (w * paths[name].divergence <= delta).all()
    for name in ("corollary6", "corollary7"):
        assert (th.path_budget(paths[name], w) <= delta_b).all()
    assert (th.mean_slack(paths["proposition8"], w, one.delta_b) <= delta).all()
    assert (th.mask_slack(paths["mask"], w, one.delta_b) <= delta).all()
    assert (paths["equation18"].divergence <= delta).all() and (
        th.terminal_budget(paths["equation18"]) <= delta_b
    ).all()
    for name, claim in claims.items():
        check(one, paths[name], claim.bound(paths[name]))


@pytest.mark.parametrize("seed", CASES)
def test_every_statement_with_the_smallest_constants_of_a_pair(seed: int) -> None:
    one = case(seed)
    paths = th.enumerate_paths(one.pair)
    for claim in ts.sharp_claims(one.horizon, one.w_min).values():
        check(one, paths, claim.bound(paths))


@pytest.mark.parametrize("name", ["uniform", "corollary6", "corollary7", "proposition8", "mask", "equation18"])
def test_projections_change_only_what_they_must(name: str) -> None:
    """A pair inside stays as it is; a distribution that moves ends on its own limit (mean budgets: its instance does)."""
    claim = ts.set_claims(4, 0.1, 0.04, 0.7)[name]
    pair = th.random_pair(200, 2, 4, torch.Generator().manual_seed(1))
    once = claim.project(pair)
    for a, b in zip(once.pi, claim.project(once).pi, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    paths, w = th.enumerate_paths(once), th.linear_weights(4, 0.7)
    moved = (paths.pi - th.enumerate_paths(pair).pi).abs() > 0  # [N, S, T]
    token, weighted = paths.divergence / 0.1, w * paths.divergence / 0.1
    prefix = (w * paths.divergence).cumsum(-1) / (0.04 * w.cumsum(0))
    prefix[..., -1] = 0  # the budget is for m < T
    implemented = (w * paths.divergence).cumsum(-1) / (0.1 + 0.04 * (w.cumsum(0) - w))
    means = (w * paths.mean_divergence).cumsum(-1) / (0.1 + 0.04 * w.cumsum(0))
    border = {
        "uniform": token,
        "corollary6": torch.maximum(token, prefix),
        "corollary7": torch.maximum(weighted, prefix),
        "mask": torch.maximum(weighted, implemented),
        "proposition8": torch.maximum(weighted.amax(1)[:, :-1], means[:, :-1]).amax(-1),
        "equation18": torch.maximum(token.amax((1, 2)), paths.mean_divergence[:, :-1].sum(-1) / 0.12),
    }[name]
    if border.dim() == 1:
        moved = moved[..., :-1].any(-1).any(-1)
    assert 0.1 < float(moved.double().mean()) < 0.98
    assert (border <= 1 + 1e-12).all()
    assert (border[moved] > 1 - 1e-9).all()


# The statements' constants: closed forms, and instances on which they cannot be smaller.


def test_proposition_5_the_linear_schedule_is_allowed() -> None:
    for horizon in range(2, 12):
        for w_min in (0.05, 0.6, 0.8, 1.0):
            w = th.linear_weights(horizon, w_min)
            assert (float(w[0]), float(w[-1])) == (1.0, pytest.approx(w_min, abs=1e-15))
            drop = -th.rates(w).diff()
            torch.testing.assert_close(drop, w_min / (w[:-1] * w[1:]), rtol=1e-12, atol=0)
    assert th.linear_weights(1, 0.8).tolist() == [1.0]


def test_constants_are_those_of_the_paper() -> None:
    """Against the sums behind them: Theorem 1 is sum_t lambda_t delta_b, Eq. 18 is (2 - 2/T) times it."""
    delta, delta_b, w_min, eta, xi = 0.15, 0.02, 0.8, 0.07, 1.7
    for horizon in range(2, 9):
        total = sum(4 * xi * (horizon - t) for t in range(1, horizon + 1))  # sum_t lambda_t / lbar
        lambdas = th.lambdas(horizon, torch.tensor([delta], dtype=torch.float64), xi)
        assert float(lambdas.sum()) == pytest.approx(total * delta)
        assert float(th.uniform(horizon, delta, xi)) == pytest.approx(total * delta**2)
        assert float(th.corollary6(horizon, delta, delta_b, xi)) == pytest.approx(total * delta * delta_b)
        assert float(th.corollary7(horizon, delta, delta_b, w_min, xi)) == pytest.approx(
            total * delta / w_min * delta_b
        )
        slack = 4 * xi * delta * (horizon - 1) * eta / 0.5
        expected = total * delta * delta_b + slack
        assert float(th.proposition8(horizon, delta, delta_b, eta, 0.5, xi)) == pytest.approx(expected)
        expected = (2 - 2 / horizon) * total * delta * delta_b
        assert float(th.equation18(horizon, delta, delta_b, xi)) == pytest.approx(expected)


def test_with_two_tokens_every_bound_is_attained() -> None:
    """T = 2 with D_1 = a and D_2 = b at every prefix: the worst |Delta| is 4 xi a b exactly, whatever the weights."""
    a, b, first = 0.03, 0.2, torch.tensor([0.4, 0.9], dtype=torch.float64)
    q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    move = torch.tensor([1.0, -0.4, -0.6], dtype=torch.float64)
    mu = (q.expand(1, 1, 3), q.expand(1, 3, 3))
    paths = th.enumerate_paths(th.Pair(mu, (mu[0] + a * move, mu[1] - b * move)))
    exact = 4 * a * b
    assert float(th.worst_residual(paths)) == pytest.approx(exact, rel=1e-12)
    assert float(th.proposition4(paths.mean_divergence, paths.max_divergence)) == pytest.approx(exact, rel=1e-12)
    assert float(th.theorem1(2, b, th.path_budget(paths, first))) == pytest.approx(exact, rel=1e-12)
    assert float(th.equation18(2, b, th.terminal_budget(paths))) == pytest.approx(exact, rel=1e-12)
    for delta_b in (0.01, 0.02):
        eta = th.mean_slack(paths, first, delta_b)
        assert float(eta) == pytest.approx(0.4 * (a - delta_b))
        assert float(th.proposition8(2, b, delta_b, eta, first[0])) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("horizon", [2, 3, 5, 7])
def test_rare_jumps_make_the_uniform_bound_tight(horizon: int) -> None:
    drift = torch.tensor([0.15, 0.01, 1e-4], dtype=torch.float64)
    worst = th.worst_residual(th.enumerate_paths(th.jump_pair(drift, torch.full_like(drift, 1e-9), 2, horizon)))
    limit = 2 * horizon * drift * (1 - (1 - drift) ** (horizon - 1))
    torch.testing.assert_close(worst, limit, rtol=1e-3, atol=0)
    assert float(worst[2] / th.uniform(horizon, 1e-4)) > 0.999


FLOORS = {
    "proposition4": (0.999, 0.995, 0.99),
    "proposition4_coarse": (0.999, 0.995, 0.98),
    "uniform": (0.998, 0.96, 0.94),
    "theorem1": (0.998, 0.96, 0.94),
    "corollary7": (0.998, 0.90, 0.85),
    "proposition8": (0.998, 0.85, 0.78),
    "equation18": (0.998, 0.73, 0.62),
}
"""For T = 2, 3, 4: what the search must reach of each bound. Were a constant larger, it would not."""


@pytest.mark.parametrize("horizon", [2, 3, 4])
@pytest.mark.parametrize("name", FLOORS)
def test_adversarial_instances_stay_within_the_bounds_and_reach_them(name: str, horizon: int) -> None:
    claim = ts.sharp_claims(horizon, 0.8)[name]
    g = torch.Generator().manual_seed(horizon)
    found = ts.search(claim, 2, horizon, g, restarts=8, steps=80)
    sampled = ts.best(claim, th.random_pair(500, 2, horizon, g))
    largest = max((found, sampled), key=lambda f: f.ratio)
    assert FLOORS[name][horizon - 2] < largest.ratio <= 1 + ATOL
    paths = th.enumerate_paths(largest.pair)
    residual, bound = th.values(paths, th.worst_rewards(paths)).residual, claim.bound(paths)
    assert float(residual) == pytest.approx(largest.residual, rel=1e-9)
    assert kept(residual, bound)
    assert not kept(residual, bound, 0.99 * largest.ratio)  # the check sees a constant that is too small


@pytest.mark.parametrize(
    ("name", "floor"), {"uniform": 0.92, "corollary6": 0.69, "corollary7": 0.69, "mask": 0.2}.items()
)
def test_adversarial_instances_of_the_sets_with_the_papers_settings(name: str, floor: float) -> None:
    claim = ts.set_claims(3, 0.15, 0.02, 0.8)[name]
    found = ts.search(claim, 2, 3, torch.Generator().manual_seed(0), restarts=8, steps=80)
    paths = th.enumerate_paths(found.pair)
    residual, bound = th.worst_residual(paths), claim.bound(paths)
    assert floor < found.ratio <= 1 + ATOL
    assert kept(residual, bound) and not kept(residual, bound, 0.99 * found.ratio)


def test_wrong_constants_are_seen() -> None:
    """Plausible mistakes in Theorem 1 and its corollaries are broken by what the search finds."""
    horizon, w_min = 3, 0.8
    g = torch.Generator().manual_seed(0)
    w = th.linear_weights(horizon, w_min)
    sharp = ts.sharp_claims(horizon, w_min)
    paths = th.enumerate_paths(ts.search(sharp["theorem1"], 2, horizon, g, restarts=8, steps=80).pair)
    residual, lbar, delta_b = th.worst_residual(paths), paths.max_divergence.amax(-1), th.path_budget(paths, w)
    assert kept(residual, th.theorem1(horizon, lbar, delta_b))
    for wrong in (
        th.theorem1(horizon, lbar, delta_b) / 2,  # |R| <= xi read as a range of xi
        2 * lbar * delta_b * (horizon - 1) ** 2,
        2 * lbar * delta_b * horizon * (horizon - 2),
        th.theorem1(horizon, lbar, 0.9 * delta_b),
    ):
        assert not kept(residual, wrong)
    claim = ts.set_claims(2, 0.15, 0.02, 0.8)["corollary7"]
    paths = th.enumerate_paths(ts.search(claim, 2, 2, g, restarts=8, steps=80).pair)
    assert kept(th.worst_residual(paths), claim.bound(paths))
    assert not kept(th.worst_residual(paths), th.corollary6(2, 0.15, 0.02))  # delta instead of delta/w_min


def test_theorem_1_needs_its_condition_on_the_weights() -> None:
    """With r_t rising (a tiny w_2) a pair within the budget exceeds the bound: the condition is not decoration."""
    lbar, delta_b = 0.2, 0.02
    weights = torch.tensor([1.0, 0.01, 0.01], dtype=torch.float64)
    assert (th.rates(weights).diff() > 0).any()
    drift = torch.tensor([lbar], dtype=torch.float64)
    pair = th.jump_pair(drift, torch.full_like(drift, 1e-6), 2, 3)
    paths = th.enumerate_paths(th.Pair(pair.mu, (pair.mu[0], *pair.pi[1:])))  # D_1 = 0, so token 2 has all the budget
    assert (th.path_budget(paths, weights) <= delta_b * (1 + 1e-12)).all()
    assert not kept(th.worst_residual(paths), th.theorem1(3, lbar, delta_b))


# The mask that is implemented.


def tokens_of(paths: th.Paths) -> Tokens:
    """Every sequence of every instance as a row; each advantage moves its token's ratio away from one."""
    logp, rollout_logp, divergence = (x.flatten(0, 1) for x in (paths.pi.log(), paths.mu.log(), paths.divergence))
    mask = torch.ones_like(logp, dtype=torch.bool)
    return Tokens(logp, rollout_logp, (logp - rollout_logp).sign(), mask, divergence)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_the_masks_slack_is_at_most_delta(seed: int, adaptive: bool) -> None:
    """S_m <= delta + delta_b W_{m-1} on every row whose tokens all pass; Proposition 8 then holds with eta = delta.

    The adaptive budget (Eq. 22) uses a response's later tokens too, so only its upper clamp is a constant of the theory.
    """
    one = case(seed)
    cfg = {"delta": one.delta, "delta_b": one.delta_b, "w_min": one.w_min, "adaptive": adaptive}
    largest = 2 * one.delta_b if adaptive else one.delta_b
    w = one.weights
    earlier = w.cumsum(0) - w
    for pair in (one.pair, ts.project_mask(one.pair, w, one.delta, one.delta_b)):
        paths = th.enumerate_paths(pair)
        tokens = tokens_of(paths)
        sums = prefix_sums(CPPO(**cfg), tokens)
        passes = (sums.weighted <= sums.threshold).all(-1)
        gate = objective("cppo", **cfg)(tokens).gate
        assert torch.equal((gate == 1).all(-1), passes)
        spent = paths.spent(w).flatten(0, 1)
        torch.testing.assert_close(sums.used + sums.weighted, spent, rtol=1e-12, atol=1e-15)
        within = (spent <= one.delta + largest * earlier + 1e-12).all(-1)
        assert within[passes].all()
        if not adaptive:
            assert ((w * paths.divergence).flatten(0, 1) > one.delta).any(-1)[within & ~passes].all()
        everywhere = passes.unflatten(0, (N, -1)).all(-1)  # instances with every token of every sequence kept
        assert (th.mask_slack(paths, w, largest)[everywhere] <= one.delta + 1e-12).all()
        assert (th.mean_slack(paths, w, largest)[everywhere] <= one.delta).all()
        bound = th.proposition8(one.horizon, one.delta / one.w_min, largest, one.delta)
        assert kept(th.worst_residual(paths)[everywhere], bound)
    assert everywhere.all()


def test_kept_tokens_that_move_toward_one_have_no_limit() -> None:
    """The slack is about the threshold, not about the gate: A_t (rho_t - 1) <= 0 is kept whatever D_t."""
    pair = th.random_pair(50, 3, 3, torch.Generator().manual_seed(2))
    paths = th.enumerate_paths(pair)
    away = tokens_of(paths)
    toward = Tokens(away.logp, away.rollout_logp, -away.advantages, away.mask, away.divergence)
    rule = objective("cppo", delta=0.15, delta_b=0.02, adaptive=False)
    assert (rule(toward).gate == 1).all() and not (rule(away).gate == 1).all()
    assert (th.mask_slack(paths, th.linear_weights(3, 0.8), 0.02) > 0.15).any()


def test_the_figures_numbers_and_files(tmp_path: Path) -> None:
    figure = importlib.import_module("theory")
    rows = figure.measure(horizons=(2, 3), steps=3, samples=20)
    statements = [*ts.set_claims(2, 0.1, 0.01, 0.8), *(f"{name}_free" for name in ts.sharp_claims(2))]
    assert [(row["T"], row["set"]) for row in rows] == [(t, s) for t in (2, 3) for s in statements]
    for row in rows:
        assert 0 < row["largest_residual"] <= row["bound"] * (1 + ATOL)
        assert row["ratio"] == pytest.approx(row["largest_residual"] / row["bound"])
        assert 0 < row["random_ratio"] <= row["ratio"]
    assert rows[: len(statements)] == figure.measure(horizons=(2,), steps=3, samples=20)
    figure.draw(rows, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theory.csv", "theory.pdf", "theory.png"]
