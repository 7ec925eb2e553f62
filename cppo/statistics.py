"""Statistics of scores: Avg@k, hierarchical and paired bootstrap, probability of improvement.

Pure functions of arrays; randomness is an explicit `np.random.Generator`.
Tests of significance and ranks are left out on purpose. An interval and a probability of improvement say what a p-value
hides, and with few seeds a rank says nothing.

Legend: S seeds (runs), P problems (of all benchmarks, one after the other), R bootstrap resamples. Scores are shares in
[0, 1]. Sources: percentile bootstrap, Efron and Tibshirani (1993); probability of improvement, Agarwal et al.
(arXiv:2108.13264).
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def score(correct: npt.ArrayLike, samples: npt.ArrayLike, benchmark: npt.ArrayLike | None = None) -> Floats:
    """The score of checkpoints [...]: Avg@k averaged over a benchmark's problems, then unweighted over benchmarks.

    correct: [..., P], correct samples of each problem. samples: judged samples, an int or [..., P]; a problem with none
    is left out of its benchmark's mean. benchmark: [P] ints, which benchmark a problem belongs to (None = one for all).
    A benchmark without any judged sample makes the score NaN.

    Raises ValueError for shapes that disagree.

    >>> score([[2, 4, 0, 0]], 4, [0, 0, 0, 1]).round(3)       # benchmarks 0.5 and 0, whatever their sizes
    array([0.25])
    """
    means: Floats = by_benchmark(correct, samples, benchmark).mean(axis=-1)
    return means


def by_benchmark(correct: npt.ArrayLike, samples: npt.ArrayLike, benchmark: npt.ArrayLike | None = None) -> Floats:
    """Avg@k of each benchmark, [..., N] in ascending order of `benchmark`'s values; see `score`."""
    hits = np.asarray(correct, dtype=np.float64)
    if hits.ndim == 0 or hits.shape[-1] == 0:
        raise ValueError(f"correct: expected [..., P] with at least one problem, got shape {hits.shape}")
    try:
        judged = np.broadcast_to(np.asarray(samples, dtype=np.float64), hits.shape)
    except ValueError:
        raise ValueError(f"samples: shape {np.shape(samples)} does not fit correct's {hits.shape}") from None
    member = _members(benchmark, hits.shape[-1])
    rate = np.divide(hits, judged, out=np.zeros_like(hits), where=judged > 0)
    known = (judged > 0) @ member.T.astype(np.float64)
    averages: Floats = np.divide(rate @ member.T, known, out=np.full(known.shape, np.nan), where=known > 0)
    return averages


def hierarchical_bootstrap(
    correct: npt.ArrayLike,
    samples: npt.ArrayLike,
    rng: np.random.Generator,
    *,
    benchmark: npt.ArrayLike | None = None,
    resamples: int = 2000,
) -> Floats:
    """[R] bootstrap draws of the mean score of S seeds: resample seeds, problems and samples.

    correct: [S, P] ints; samples and benchmark as in `score`. All seeds answer the same problems, so one draw of
    problems (within each benchmark) serves all seeds of a resample; a cell's samples are redrawn as Binomial(samples,
    observed rate). The spread over problems already contains sampling noise, so redrawing samples too makes intervals
    slightly wide; the part between seeds is a factor (S - 1)/S too small, which matters below 5 seeds.

    Raises ValueError for wrong shapes, counts outside 0..samples, or resamples < 1.
    """
    hits, judged = _counts(correct, samples)
    seeds, problems = _resample(hits.shape, benchmark, rng, resamples)
    return _redraw(hits, judged, seeds, problems, benchmark, rng)


def paired_bootstrap(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    samples: npt.ArrayLike,
    rng: np.random.Generator,
    *,
    benchmark: npt.ArrayLike | None = None,
    resamples: int = 2000,
) -> Floats:
    """[R] bootstrap draws of score(a) - score(b), with the same seeds and problems in both.

    a, b: [S, P] correct samples of two rules, row s with the same seed (common random numbers) and column p the same
    problem; samples: an int or [S, P], of both. What the two share (hard problems, lucky orders) cancels; samples are
    redrawn independently.

    Raises ValueError as `hierarchical_bootstrap`, and for a and b of different shapes.
    """
    if np.shape(a) != np.shape(b):
        raise ValueError(f"a and b: the same seeds and problems are needed, got shapes {np.shape(a)} and {np.shape(b)}")
    (hits_a, judged), (hits_b, _) = _counts(a, samples), _counts(b, samples)
    seeds, problems = _resample(hits_a.shape, benchmark, rng, resamples)
    draws_a = _redraw(hits_a, judged, seeds, problems, benchmark, rng)
    return draws_a - _redraw(hits_b, judged, seeds, problems, benchmark, rng)


def seed_bootstrap(values: npt.ArrayLike, rng: np.random.Generator, *, resamples: int = 2000) -> Floats:
    """[R, ...] bootstrap means of `values` [S, ...] over seeds only, for quantities with one value per run (reward, length).

    NaN entries are left out; a resample without any other entry is NaN.
    Raises ValueError for no seeds or resamples < 1.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim == 0 or x.shape[0] == 0:
        raise ValueError(f"values: expected [S, ...] with at least one seed, got shape {x.shape}")
    _positive(resamples)
    count = x.shape[0]
    times = rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)  # [R, S]
    flat = x.reshape(count, -1)
    known = times @ np.isfinite(flat)
    total = times @ np.where(np.isfinite(flat), flat, 0)
    mean: Floats = np.divide(total, known, out=np.full(known.shape, np.nan), where=known > 0)
    return mean.reshape(resamples, *x.shape[1:])


def interval(draws: npt.ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """(low, high): the central percentile interval of bootstrap draws [R].

    Raises ValueError for no draws, a NaN among them, or a level outside (0, 1).
    """
    x = np.asarray(draws, dtype=np.float64)
    if x.ndim != 1 or x.size == 0 or np.isnan(x).any():
        raise ValueError(f"draws: expected [R] numbers without NaN, got shape {x.shape}")
    if not 0 < level < 1:
        raise ValueError(f"level: {level} must be in (0, 1)")
    low, high = np.quantile(x, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def probability_of_improvement(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """P(a run of `a` scores above a run of `b`), ties counting half: Mann-Whitney's U / (S_a S_b).

    a: [S_a], b: [S_b] scores of runs. Raises ValueError for empty input or NaN.

    >>> probability_of_improvement([1, 2, 3], [0, 2])
    0.75
    """
    x, y = _scores(a, "a"), _scores(b, "b")
    return float(_superiority(x, y))


def improvement_bootstrap(
    a: npt.ArrayLike, b: npt.ArrayLike, rng: np.random.Generator, *, resamples: int = 2000
) -> Floats:
    """[R] bootstrap draws of `probability_of_improvement`, the same seeds resampled in both.

    a, b: [S], entry s with the same seed in both (common random numbers).
    Raises ValueError for empty input, NaN, different lengths, or resamples < 1.
    """
    x, y = _scores(a, "a"), _scores(b, "b")
    if x.shape != y.shape:
        raise ValueError(f"a and b: the same seeds are needed, got {x.size} and {y.size}")
    _positive(resamples)
    seeds = rng.integers(x.size, size=(resamples, x.size))
    return _superiority(x[seeds], y[seeds])


def _superiority(x: Floats, y: Floats) -> Floats:
    """x [..., S_a], y [..., S_b] -> [...], over all pairs."""
    left, right = x[..., :, None], y[..., None, :]
    share: Floats = ((left > right) + 0.5 * (left == right)).mean(axis=(-2, -1))
    return share


def _members(benchmark: npt.ArrayLike | None, problems: int) -> npt.NDArray[np.bool_]:
    """[N, P]: whether problem p belongs to benchmark n."""
    if benchmark is None:
        return np.ones((1, problems), dtype=np.bool_)
    group = np.asarray(benchmark)
    if group.shape != (problems,):
        raise ValueError(f"benchmark: shape {group.shape}, expected ({problems},), one entry per problem")
    member: npt.NDArray[np.bool_] = np.unique(group)[:, None] == group
    return member


def _counts(correct: npt.ArrayLike, samples: npt.ArrayLike) -> tuple[Ints, Ints]:
    """Both [S, P] and checked."""
    hits = np.asarray(correct)
    if hits.ndim != 2 or 0 in hits.shape:
        raise ValueError(f"correct: expected [S, P] with at least one of each, got shape {hits.shape}")
    if np.ndim(samples) and np.shape(samples) != hits.shape:
        raise ValueError(f"samples: shape {np.shape(samples)} does not fit correct's {hits.shape}")
    judged = np.broadcast_to(np.asarray(samples), hits.shape)
    for name, x in (("correct", hits), ("samples", judged)):
        if not (np.isfinite(x).all() and (x == np.floor(x)).all()):
            raise ValueError(f"{name}: expected whole numbers")
    if (hits < 0).any() or (hits > judged).any():
        raise ValueError("correct: counts must lie between 0 and samples")
    return hits.astype(np.int64), judged.astype(np.int64)


def _resample(
    shape: tuple[int, ...], benchmark: npt.ArrayLike | None, rng: np.random.Generator, resamples: int
) -> tuple[Ints, Ints]:
    """Seeds [R, S] and, within each benchmark, problems [R, P], drawn with replacement."""
    _positive(resamples)
    seeds = rng.integers(shape[0], size=(resamples, shape[0]))
    problems = np.empty((resamples, shape[1]), dtype=np.int64)
    for member in _members(benchmark, shape[1]):
        own = np.flatnonzero(member)
        problems[:, own] = own[rng.integers(own.size, size=(resamples, own.size))]
    return seeds, problems


def _redraw(
    hits: Ints, judged: Ints, seeds: Ints, problems: Ints, benchmark: npt.ArrayLike | None, rng: np.random.Generator
) -> Floats:
    """[R] mean scores of the resampled seeds and problems with redrawn samples."""
    rate = hits / np.maximum(judged, 1)
    cells = seeds[:, :, None], problems[:, None, :]
    n = judged[cells]  # [R, S, P]
    means: Floats = score(rng.binomial(n, rate[cells]), n, benchmark).mean(axis=1)
    return means


def _scores(x: npt.ArrayLike, name: str) -> Floats:
    values = np.asarray(x, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or np.isnan(values).any():
        raise ValueError(f"{name}: expected the scores of at least one run, without NaN, got shape {values.shape}")
    return values


def _positive(resamples: int) -> None:
    if resamples < 1:
        raise ValueError(f"resamples: {resamples} must be at least 1")
