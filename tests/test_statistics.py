"""Statistics against slow loops, coverage on simulated data, determinism and errors."""

import doctest
from typing import Any

import numpy as np
import pytest

import cppo.statistics as st
from cppo.statistics import (
    by_benchmark,
    hierarchical_bootstrap,
    improvement_bootstrap,
    interval,
    paired_bootstrap,
    probability_of_improvement,
    score,
    seed_bootstrap,
)

BENCHMARK = np.array([0] * 5 + [1] * 3 + [2] * 7)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def data(seeds: int = 4, k: int = 16, seed: int = 3) -> np.ndarray:
    """[S, P] counts whose rates differ between seeds, problems and benchmarks."""
    g = rng(seed)
    rate = np.clip(g.beta(2, 2, BENCHMARK.size) + g.normal(0, 0.1, (seeds, 1)) + 0.1 * BENCHMARK - 0.1, 0, 1)
    return g.binomial(k, rate)


def test_doctests() -> None:
    assert doctest.testmod(st).failed == 0


def test_score_is_the_unweighted_mean_of_benchmarks() -> None:
    correct, judged = data(), rng(1).integers(0, 17, (4, BENCHMARK.size))
    correct = np.minimum(correct, judged)
    judged[:, 5] = 0  # a problem that nobody judged is left out
    correct[:, 5] = 0
    for s in range(4):
        parts = []
        for name in range(3):
            rates = [c / n for c, n, b in zip(correct[s], judged[s], BENCHMARK, strict=True) if b == name and n > 0]
            parts.append(sum(rates) / len(rates))
        np.testing.assert_allclose(by_benchmark(correct, judged, BENCHMARK)[s], parts, rtol=1e-12)
        np.testing.assert_allclose(score(correct, judged, BENCHMARK)[s], sum(parts) / 3, rtol=1e-12)
    assert np.isnan(score([1, 0], [2, 0], [0, 1]))
    assert score(correct[None], judged[None], BENCHMARK).shape == (1, 4)


def slow_bootstrap(correct: np.ndarray, k: int, g: np.random.Generator, resamples: int) -> np.ndarray:
    """One resample at a time, one cell at a time."""
    seeds, problems = correct.shape
    draws = np.empty(resamples)
    for r in range(resamples):
        rows = g.integers(seeds, size=seeds)
        columns = [g.choice(np.flatnonzero(BENCHMARK[p] == BENCHMARK)) for p in range(problems)]
        parts: dict[int, list[float]] = {0: [], 1: [], 2: []}
        for row in correct[rows]:
            for p in columns:
                parts[int(BENCHMARK[p])].append(g.binomial(k, row[p] / k) / k)
        draws[r] = np.mean([np.mean(part) for part in parts.values()])
    return draws


def test_hierarchical_bootstrap_has_the_distribution_of_the_slow_one() -> None:
    correct = data()
    fast = hierarchical_bootstrap(correct, 16, rng(), benchmark=BENCHMARK, resamples=20000)
    slow = slow_bootstrap(correct, 16, rng(1), 1500)
    assert fast.shape == (20000,)
    error = slow.std() / np.sqrt(slow.size)
    assert abs(fast.mean() - slow.mean()) < 4 * error
    assert abs(fast.mean() - score(correct, 16, BENCHMARK).mean()) < 5 * fast.std() / np.sqrt(fast.size)
    assert fast.std() == pytest.approx(slow.std(), rel=0.08)
    for level in (0.5, 0.9):
        np.testing.assert_allclose(interval(fast, level), interval(slow, level), atol=0.2 * slow.std())


@pytest.mark.parametrize("level_left_out", ["seeds", "problems", "samples"])
def test_each_level_contributes(level_left_out: str) -> None:
    """The variance drops to the two other levels' when one level does not vary; expected from the counts themselves."""
    g = rng(5)
    rate = np.full((6, 30), 0.5)
    if level_left_out != "seeds":
        rate = rate + np.linspace(-0.2, 0.2, 6)[:, None]
    if level_left_out != "problems":
        rate = rate + np.linspace(-0.25, 0.25, 30)
    k = 20 if level_left_out != "samples" else 10**7
    correct = np.rint(rate * k).astype(int)
    draws = hierarchical_bootstrap(correct, k, g, resamples=20000)
    exact = correct / k
    per_seed = exact.mean(axis=1).var() / 6
    per_problem = exact.mean(axis=0).var() / 30
    per_sample = (exact * (1 - exact)).mean() / k / 180
    assert draws.var() == pytest.approx(per_seed + per_problem + per_sample, rel=0.06)


def test_bootstrap_with_judged_samples_per_cell() -> None:
    correct = data()
    judged = np.full(correct.shape, 16)
    same = hierarchical_bootstrap(correct, judged, rng(), benchmark=BENCHMARK, resamples=50)
    np.testing.assert_array_equal(same, hierarchical_bootstrap(correct, 16, rng(), benchmark=BENCHMARK, resamples=50))
    judged, correct = judged.copy(), correct.copy()
    judged[:, 0] = correct[:, 0] = 0
    assert np.isfinite(hierarchical_bootstrap(correct, judged, rng(), benchmark=BENCHMARK, resamples=50)).all()


def test_intervals_cover_the_truth() -> None:
    """200 simulated studies of 6 new seeds and 40 new problems: a 95% interval holds the true mean in 92-99.5%."""
    g, covered = rng(11), 0
    for _ in range(200):
        rate = 0.5 + g.normal(0, 0.05, (6, 1)) + g.uniform(-0.3, 0.3, 40)
        low, high = interval(hierarchical_bootstrap(g.binomial(8, np.clip(rate, 0, 1)), 8, g, resamples=300))
        covered += low <= 0.5 <= high
    assert 0.92 <= covered / 200 <= 0.995


def test_paired_bootstrap_cancels_what_is_shared() -> None:
    g = rng(2)
    shared = np.clip(g.beta(1, 1, 60) + g.normal(0, 0.1, (6, 1)), 0, 1)
    b = np.rint(shared * 1000).astype(int)
    a = np.minimum(b + 20, 1000)
    paired = paired_bootstrap(a, b, 1000, rng(), resamples=4000)
    apart = hierarchical_bootstrap(a, 1000, rng(1), resamples=4000) - hierarchical_bootstrap(
        b, 1000, rng(2), resamples=4000
    )
    assert paired.mean() == pytest.approx((a - b).mean() / 1000, abs=2e-3)
    assert paired.std() < 0.1 * apart.std()
    low, high = interval(paired)
    assert 0 < low < high


def test_seed_bootstrap_against_a_loop() -> None:
    values = rng(4).normal(size=(5, 3))
    values[1, 2] = np.nan
    draws = seed_bootstrap(values, rng(), resamples=20000)
    g = rng(1)
    rows = [g.integers(5, size=5) for _ in range(4000)]
    slow = np.array([np.nanmean(values[row], axis=0) for row in rows if (row != 1).any()])
    np.testing.assert_allclose(np.nanmean(draws, axis=0), slow.mean(axis=0), atol=0.03)
    np.testing.assert_allclose(np.nanstd(draws, axis=0), slow.std(axis=0), rtol=0.06)
    assert np.isnan(seed_bootstrap([[np.nan], [np.nan]], rng(), resamples=3)).all()


def test_interval_is_central() -> None:
    assert interval(np.arange(101), 0.9) == pytest.approx((5, 95))
    low, high = interval(rng().normal(size=200_000))
    assert (low, high) == pytest.approx((-1.96, 1.96), abs=0.03)


def test_probability_of_improvement_against_pairs() -> None:
    a, b = rng(1).integers(0, 5, 7) / 4, rng(2).integers(0, 5, 7) / 4
    pairs = [1.0 if x > y else 0.5 if x == y else 0.0 for x in a for y in b]
    assert probability_of_improvement(a, b) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert probability_of_improvement(a, b) + probability_of_improvement(b, a) == pytest.approx(1)
    assert probability_of_improvement(a, a) == 0.5
    assert probability_of_improvement([2, 3], [1]) == 1.0


def test_improvement_bootstrap_resamples_the_same_seeds() -> None:
    a, b = rng(1).normal(size=6), rng(2).normal(size=6)
    draws = improvement_bootstrap(a, b, rng(), resamples=500)
    g = rng()
    rows = g.integers(6, size=(500, 6))
    slow = [probability_of_improvement(a[row], b[row]) for row in rows]
    np.testing.assert_allclose(draws, slow, atol=1e-12)
    assert (improvement_bootstrap(a, a, rng()) == 0.5).all()


def test_same_generator_same_draws_and_inputs_untouched() -> None:
    correct = data()
    before = correct.copy()
    for function, arguments in (
        (hierarchical_bootstrap, (correct, 16)),
        (paired_bootstrap, (correct, correct[::-1], 16)),
        (seed_bootstrap, (correct,)),
        (improvement_bootstrap, (correct[:, 0], correct[:, 1])),
    ):
        call: Any = function
        first, again = call(*arguments, rng(7), resamples=40), call(*arguments, rng(7), resamples=40)
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, call(*arguments, rng(8), resamples=40))
    np.testing.assert_array_equal(correct, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hierarchical_bootstrap([1, 2], 4, rng()), "correct: expected"),
        (lambda: hierarchical_bootstrap(np.zeros((0, 3)), 4, rng()), "correct: expected"),
        (lambda: hierarchical_bootstrap([[5, 2]], 4, rng()), "between 0 and samples"),
        (lambda: hierarchical_bootstrap([[-1, 2]], 4, rng()), "between 0 and samples"),
        (lambda: hierarchical_bootstrap([[0.5, 2]], 4, rng()), "correct: expected whole"),
        (lambda: hierarchical_bootstrap([[1, 2]], [4, 4], rng()), "samples: shape"),
        (lambda: hierarchical_bootstrap([[1, 2]], 4, rng(), benchmark=[0]), "benchmark: shape"),
        (lambda: hierarchical_bootstrap([[1, 2]], 4, rng(), resamples=0), "resamples: 0"),
        (lambda: paired_bootstrap([[1, 2]], [[1, 2], [1, 2]], 4, rng()), "same seeds and problems"),
        (lambda: seed_bootstrap([], rng()), "values: expected"),
        (lambda: interval([]), "draws: expected"),
        (lambda: interval([0.1, np.nan]), "draws: expected"),
        (lambda: interval([0.1], 1.0), "level: 1.0"),
        (lambda: probability_of_improvement([], [1]), "a: expected"),
        (lambda: probability_of_improvement([1], [np.nan]), "b: expected"),
        (lambda: improvement_bootstrap([1, 2], [1], rng()), "same seeds"),
        (lambda: score([[1, 2]], [[1, 2, 3]]), "samples: shape"),
        (lambda: score([], 1), "correct: expected"),
    ],
)
def test_errors_name_the_argument(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
