"""Scores of checkpoints as arrays: which is best, which is last, and how sure the mean over seeds is.

Legend: S seeds, C checkpoints (the first is iteration 0, the base model that all runs share), P problems, N benchmarks.
Scores are shares in [0, 1]; the score of a checkpoint is the unweighted mean of its benchmarks' Avg@k.
"""

import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from common import DataError, Results

from cppo import statistics

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
COLUMNS = ("run", "rule", "setting", "seed", "iteration", "benchmark", "problem", "correct", "samples", "unjudged")


@dataclass(frozen=True)
class Summary:
    """Mean over seeds with min and max over seeds, or the 95% bootstrap interval when there are seeds enough."""

    mean: float
    low: float
    high: float
    seeds: int


@dataclass(frozen=True)
class Curve:
    """All scored checkpoints of one rule in one setting."""

    rule: str
    setting: str
    seeds: tuple[int, ...]
    collapsed: tuple[int | None, ...]
    """[S], the iteration at which a run collapsed; None = it finished."""
    iterations: Ints
    """[C]."""
    correct: Ints
    """[S, C, P]."""
    judged: Ints
    """[S, C, P], samples that could be judged right or wrong."""
    scored: npt.NDArray[np.bool_]
    """[S, C]; False after a collapse."""
    benchmark: Ints
    """[P], index of the problem's benchmark."""
    bootstrap: bool
    """Whether summaries are bootstrap intervals (else min and max)."""

    @cached_property
    def by_benchmark(self) -> Floats:
        """[S, C, N], NaN where not scored."""
        return np.where(
            self.scored[:, :, None], statistics.by_benchmark(self.correct, self.judged, self.benchmark), np.nan
        )

    @cached_property
    def score(self) -> Floats:
        """[S, C], NaN where not scored."""
        means: Floats = self.by_benchmark.mean(axis=-1)
        return means

    @property
    def best(self) -> Ints:
        """[S], each run's checkpoint with the highest score in [0, T_stop], the earliest of equals."""
        return np.array([np.nanargmax(row) for row in self.score], dtype=np.int64)

    @property
    def final(self) -> Ints:
        """[S], each run's last scored checkpoint: T_stop unless it collapsed."""
        return np.array([np.flatnonzero(row)[-1] for row in self.scored], dtype=np.int64)

    def at(self, index: Ints) -> Floats:
        """[S], each run's score at its own checkpoint."""
        values: Floats = self.score[np.arange(len(self.seeds)), index]
        return values

    def summary(self, index: Ints, benchmark: int | None = None, resamples: int = 2000) -> Summary:
        """The mean over seeds at each run's own checkpoint, of the score or of one benchmark."""
        rows = np.arange(len(self.seeds))
        values = self.at(index) if benchmark is None else self.by_benchmark[rows, index, benchmark]
        if not self.bootstrap:
            return Summary(float(values.mean()), float(values.min()), float(values.max()), len(rows))
        own = slice(None) if benchmark is None else self.benchmark == benchmark
        draws = statistics.hierarchical_bootstrap(
            self.correct[rows, index][:, own],
            self.judged[rows, index][:, own],
            stream(self.setting, self.rule, *index, benchmark),
            benchmark=self.benchmark[own],
            resamples=resamples,
        )
        low, high = statistics.interval(draws)
        return Summary(float(values.mean()), low, high, len(rows))

    def band(self, benchmark: int | None = None) -> tuple[Floats, Floats]:
        """Lower and upper edge [C] around the mean over seeds; NaN after a run's collapse."""
        edges = np.full((2, len(self.iterations)), np.nan)
        for c in np.flatnonzero(self.scored.all(axis=0)):
            at = self.summary(np.full(len(self.seeds), c), benchmark, resamples=400)
            edges[:, c] = at.low, at.high
        return edges[0], edges[1]


def stream(*axes: object) -> np.random.Generator:
    """A generator named by its axes: the same numbers whichever script asks, in whatever order."""
    return np.random.default_rng([zlib.crc32(str(axis).encode()) for axis in axes])


def benchmarks(results: Results, setting: str) -> list[str]:
    """Names of a setting's benchmarks in the suite's order."""
    return [b["name"] for b in results.suite["settings"][setting]["task"]["benchmarks"]]


def curves(results: Results, setting: str) -> dict[str, Curve]:
    """Curves by rule in the order of the suite's rows, base (its one checkpoint) first.

    Raises DataError naming the file and what is missing, given twice or inconsistent with suite.json.
    """
    table = results.table("scores", COLUMNS)
    table = table[table["setting"] == setting]
    where = f"{results.folder}/scores.csv"
    judged = table["samples"] - table["unjudged"]
    bad = table[~(table["correct"].between(0, judged) & (judged <= table["samples"]))]  # NaN is bad too
    if len(bad):
        row = bad.iloc[0]
        raise DataError(
            f"{where}: run {row['run']} problem {row['problem']}: 0 <= correct <= samples - unjudged is violated"
        )
    base = table[(table["rule"] == "base") & (table["iteration"] == 0)]
    if base.empty:
        raise DataError(f"{where}: no row of rule 'base' at iteration 0 in setting {setting!r}")
    names = benchmarks(results, setting)
    unknown = set(base["benchmark"]) - set(names)
    if unknown or set(names) - set(base["benchmark"]):
        raise DataError(f"{where}: base has benchmarks {sorted(set(base['benchmark']))}, suite.json {names}")
    problems = pd.MultiIndex.from_frame(base[["benchmark", "problem"]]).unique()
    problems = problems[
        np.lexsort((problems.get_level_values(1), pd.Index(names).get_indexer(problems.get_level_values(0))))
    ]
    start = _arrays(base, [int(base["seed"].iloc[0])], [0], problems, where)
    benchmark = pd.Index(names).get_indexer(problems.get_level_values(0)).astype(np.int64)
    common: dict[str, Any] = {"setting": setting, "benchmark": benchmark, "bootstrap": results.ranked}
    by_rule = {"base": Curve("base", seeds=(0,), collapsed=(None,), iterations=np.array([0]), **start, **common)}
    for rule in results.rules:
        seeds, collapsed = runs(results, setting, rule)
        own = table[(table["rule"] == rule) & (table["iteration"] > 0)]
        iterations = sorted({int(iteration) for iteration in own["iteration"]})
        arrays = _arrays(own, list(seeds), iterations, problems, where)
        arrays = {key: np.concatenate([np.repeat(start[key], len(seeds), 0), arrays[key]], axis=1) for key in start}
        stop = results.suite["settings"][setting]["iterations"]
        for seed, lost, scored in zip(seeds, collapsed, arrays["scored"], strict=True):
            if lost is None and not (scored.all() and [0, *iterations][-1] == stop):
                raise DataError(f"{where}: {rule} in {setting!r}, seed {seed}, finished but lacks a scored checkpoint")
        by_rule[rule] = Curve(
            rule, seeds=seeds, collapsed=collapsed, iterations=np.array([0, *iterations]), **arrays, **common
        )
    return by_rule


def _arrays(
    rows: pd.DataFrame, seeds: list[int], iterations: list[int], problems: pd.MultiIndex, where: str
) -> dict[str, Any]:
    """correct and judged [S, C, P] and scored [S, C] of rows of one rule."""
    shape = len(seeds), len(iterations), len(problems)
    keys = pd.MultiIndex.from_frame(rows[["benchmark", "problem"]]) if len(rows) else problems[:0]
    cells = (
        pd.Index(seeds).get_indexer(pd.Index(rows["seed"])),
        pd.Index(iterations).get_indexer(pd.Index(rows["iteration"])),
        problems.get_indexer(keys),
    )
    for name, index in zip(("seed", "iteration", "problem"), cells, strict=True):
        if (index < 0).any():
            row = rows.iloc[int(np.argmin(index))]
            raise DataError(f"{where}: run {row['run']}: {name} {row[name]} is not in the suite or has no base row")
    times = np.zeros(shape, dtype=np.int64)
    np.add.at(times, cells, 1)
    correct, judged = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    correct[cells], judged[cells] = rows["correct"], rows["samples"] - rows["unjudged"]
    some = times.any(axis=-1)
    for s, c in zip(*np.nonzero(some & ~(times == 1).all(axis=-1)), strict=True):
        run = rows["run"].iloc[int(np.argmax((cells[0] == s) & (cells[1] == c)))]
        counted = (
            f"{int((times[s, c] > 0).sum())} of {shape[2]} problems, {int((times[s, c] > 1).sum())} more than once"
        )
        raise DataError(f"{where}: run {run} iteration {iterations[c]}: {counted}")
    return {"correct": correct, "judged": judged, "scored": some}


def runs(results: Results, setting: str, rule: str) -> tuple[tuple[int, ...], tuple[int | None, ...]]:
    """The suite's seeds and where each run of the rule collapsed, from runs.csv."""
    table = results.table("runs", ("run", "rule", "setting", "seed", "status", "collapsed_at"))
    table = table[(table["setting"] == setting) & (table["rule"] == rule)]
    seeds = tuple(int(seed) for seed in results.suite["seeds"])
    collapsed: list[int | None] = []
    for seed in seeds:
        rows = table[table["seed"] == seed]
        if len(rows) != 1:
            raise DataError(
                f"{results.folder}/runs.csv: {len(rows)} runs of {rule} in {setting!r} with seed {seed}, expected 1"
            )
        status, at = rows[["status", "collapsed_at"]].iloc[0]
        if status not in ("finished", "collapsed") or np.isfinite(at) != (status == "collapsed"):
            raise DataError(
                f"{results.folder}/runs.csv: column 'status': {status!r} is neither finished nor collapsed at an iteration"
            )
        collapsed.append(int(at) if status == "collapsed" else None)
    return seeds, tuple(collapsed)
