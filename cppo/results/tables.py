"""A suite's tables: collected from run directories, checked, and published to `results/`.

Tables (CSV and parquet): scores (a row a problem and checkpoint), curves (a row an iteration), positions (drift by token
position, pooled over the iterations that lead to a checkpoint), tokens (CPPO's thresholds on real tokens), runs (status,
provenance, speed). Beside them suite.json (the resolved suite) and configs.json (run id -> resolved configuration).
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from cppo.results.provenance import PACKAGES
from cppo.suite.config import BaseConfig, RunConfig, parse_run
from cppo.suite.schema import parse
from cppo.suite.suite import Suite
from cppo.system.files import partial_of, read_json, sha256, write_whole, writing

TABLES = ("scores", "curves", "positions", "tokens", "runs")
SUMS = "SHA256SUMS"
"""What `publish` writes beside the tables, in the format of sha256sum."""
TOKEN_ROWS = 3
"""Responses of a dump that enter the tokens table: it is committed, and the figure shows one."""
TIMES = ["total", "tokens", "rollout", "update"]
KEY = ["run", "label", "setting", "seed"]
CURVES = (
    "reward accuracy unjudged response_length truncated entropy divergence mask_share mask_share/threshold"
    " mask_share/budget mask_share/sequence gate_mean delta_b loss value_loss grad_norm relative_logprob_error drift"
    " zero_variance skipped_updates nonfinite_updates"
).split()

COLUMNS = {
    "scores": [*KEY, *"step benchmark problem correct samples unjudged mean_length truncated".split()],
    "curves": [*KEY, "iteration", *(name.replace("/", "_") for name in CURVES)],
    "positions": [*KEY, *"step first last count drift tail".split()],
    "tokens": [
        *KEY,
        *"step row position delta token advantage ratio weighted prefix_threshold threshold reason".split(),
    ],
    "runs": [
        *KEY,
        *"objective status iterations seconds rollout_tokens_per_second update_tokens_per_second".split(),
        *"code_version commit python machine".split(),
        *PACKAGES,
    ],
}
"""Columns of each table; runs has those of provenance.json too."""
TEXT = dict.fromkeys("run label setting benchmark problem objective status code_version commit token".split(), str)
"""Columns that stay text when read: ten hex digits may look like a number, a label like a missing value."""
WORDS = {*TEXT, "python", "machine", *PACKAGES}
"""Columns that need not be numbers."""


def collect(suite: Suite, root: Path, out: Path) -> None:
    """Write the suite's tables from the run directories under `root`.

    Raises ValueError for a run that is missing or not scored, naming it.
    """
    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in TABLES}
    configs: dict[str, Any] = {}
    everything: list[RunConfig | BaseConfig] = [*suite.bases(), *suite.runs()]
    for config in everything:
        folder = root / config.folder
        for needed in ("DONE", "scores.csv"):
            if not (folder / needed).is_file():
                raise ValueError(f"{folder}: {needed} is missing; train and evaluate run {config.id} first")
        configs[config.id] = config.model_dump(mode="json")
        parts["scores"].append(read_table(folder / "scores.csv", "scores"))
        parts["runs"].append(_run_row(config, folder))
        if isinstance(config, RunConfig):
            parts["curves"].append(_curves(config, folder))
            parts["positions"].append(_positions(config, folder))
            parts["tokens"].append(_tokens(config, folder))
    for name, frames in parts.items():
        filled = [frame for frame in frames if len(frame)]
        _write(pd.concat(filled or frames, ignore_index=True), out / name)
    write_whole(out / "suite.json", json.dumps(suite.model_dump(mode="json"), indent=1) + "\n")
    write_whole(out / "configs.json", json.dumps(configs, indent=1) + "\n")


def as_csv(table: pd.DataFrame) -> str:
    """The table's text: seven significant digits, which float32 does not exceed."""
    text: str = table.to_csv(index=False, float_format="%.7g", lineterminator="\n")
    return text


def _write(table: pd.DataFrame, path: Path) -> None:
    write_whole(path.with_suffix(".csv"), as_csv(table))
    whole = path.with_suffix(".parquet")
    with writing(whole):
        table.to_parquet(partial_of(whole), index=False)
        os.replace(partial_of(whole), whole)


def _jsonl(path: Path, numbers: Sequence[str], lists: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows of a stream, each with these numbers and lists. Raises ValueError naming file, line and key."""
    remedy = f"delete {path.parent} and run it again"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise ValueError(f"{path}: missing or not JSON lines; {remedy}") from None
    rows = []
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: not a JSON object; {remedy}")
        for name in lists:
            values = row.get(name)
            if not isinstance(values, list) or len(values) != len(row[lists[0]]):
                raise ValueError(f"{path}:{number}: {name}: not a list as long as {lists[0]}; {remedy}")
            if not all(isinstance(value, str) if name == "token" else _is_number(value) for value in values):
                what = "texts" if name == "token" else "numbers"
                raise ValueError(f"{path}:{number}: {name}: expected a list of {what}; {remedy}")
        for name in dict.fromkeys([*numbers, *(name for name in row if name not in lists)]):
            value = row.get(name)
            if not _is_number(value) and (name in numbers or value is not None):
                raise ValueError(f"{path}:{number}: {name!r:.60}: expected a number, got {value!r:.60}; {remedy}")
        rows.append(row)
    return rows


def _is_number(value: object) -> bool:
    """A JSON number that a table can hold; true and false are none."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _value(path: Path, name: str, kind: type) -> Any:
    """One entry of the JSON object in a file. Raises ValueError naming file and key."""
    value = read_json(path).get(name)
    if type(value) is not kind:
        raise ValueError(f"{path}: {name}: expected {kind.__name__}, got {value!r:.60}; delete it and run it again")
    return value


def _key(config: RunConfig | BaseConfig) -> dict[str, Any]:
    return {"run": config.id, "label": config.label, "setting": config.setting, "seed": config.seed}


def _keyed(config: RunConfig, rows: list[dict[str, Any]], columns: list[str]) -> pd.DataFrame:
    return pd.DataFrame([_key(config) | row for row in rows], columns=KEY + columns)


def _run_row(config: RunConfig | BaseConfig, folder: Path) -> pd.DataFrame:
    done = folder / "DONE"
    row: dict[str, Any] = _key(config) | {"status": _value(done, "status", str)}
    if isinstance(config, RunConfig):
        timings = pd.DataFrame(_jsonl(folder / "timings.jsonl", TIMES), columns=TIMES)
        row |= {
            "objective": config.objective.objective,
            "iterations": _value(done, "iterations", int),
            "seconds": round(timings["total"].sum(), 1),
            "rollout_tokens_per_second": round(timings["tokens"].sum() / timings["rollout"].sum()),
            "update_tokens_per_second": round(timings["tokens"].sum() / timings["update"].sum()),
        }
    else:
        made = "warm start" if config.plan.warm_start else "published"
        row |= {"objective": made, "iterations": _value(done, "steps", int)}
    provenance = read_json(folder / "provenance.json")
    columns = dict.fromkeys([*COLUMNS["runs"], *provenance])
    return pd.DataFrame([row | provenance], columns=list(columns))


def _curves(config: RunConfig, folder: Path) -> pd.DataFrame:
    table = _keyed(config, _jsonl(folder / "metrics.jsonl", ["iteration"]), ["iteration", *CURVES])
    return table.rename(columns=lambda name: name.replace("/", "_"))


def _positions(config: RunConfig, folder: Path) -> pd.DataFrame:
    names = ["iteration", "first", "last", "count", "sum", "tail_count", "tail_sum"]
    rows = pd.DataFrame(_jsonl(folder / "positions.jsonl", names), columns=names)
    every = config.plan.checkpoint_every
    rows["step"] = -(-rows["iteration"] // every) * every
    pooled = rows.groupby(["step", "first", "last"], as_index=False)[["count", "sum", "tail_count", "tail_sum"]].sum()
    pooled["drift"] = pooled["sum"] / pooled["count"]
    pooled["tail"] = pooled["tail_sum"] / pooled["tail_count"]
    columns = ["step", "first", "last", "count", "drift", "tail"]
    found = [dict(zip(columns, row, strict=True)) for row in pooled[columns].itertuples(index=False)]
    return _keyed(config, found, columns)


def _by_iteration(rows: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["iteration"], []).append(row)
    return found


def _tokens(config: RunConfig, folder: Path) -> pd.DataFrame:
    """The first rows of each checkpoint's dump (those with most masked tokens), a row a token."""
    lists = ["token", "advantage", "ratio", "weighted", "prefix_threshold", "threshold", "reason"]
    rows = [
        {"step": dump["iteration"], "row": dump["row"], "position": t + 1, "delta": dump["delta"]}
        | {name: dump[name][t] for name in lists}
        for dumps in _by_iteration(_jsonl(folder / "tokens.jsonl", ["iteration", "row", "delta"], lists)).values()
        for dump in dumps[:TOKEN_ROWS]
        for t in range(len(dump["token"]))
    ]
    return _keyed(config, rows, ["step", "row", "position", "delta", *lists])


def publish(source: Path, target: Path) -> None:
    """Check the tables in `source` and copy them to `target`, which is committed.

    Raises ValueError when a table is missing or incomplete, or rows come from different versions of the code.
    """
    check(source)
    target.mkdir(parents=True, exist_ok=True)
    for name in TABLES:
        shutil.copyfile(source / f"{name}.csv", target / f"{name}.csv")
        shutil.copyfile(source / f"{name}.parquet", target / f"{name}.parquet")
    for name in ("suite.json", "configs.json"):
        shutil.copyfile(source / name, target / name)
    sums = {p.name: sha256(p) for p in sorted(source.iterdir()) if p.is_file()}
    write_whole(target / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sums.items()))


def check(folder: Path) -> None:
    """ValueError, one line naming the file, unless the tables in `folder` are whole and of one code version."""
    tables = {name: read_table(folder / f"{name}.csv", name) for name in TABLES}
    for name in TABLES:
        if not (folder / f"{name}.parquet").is_file():
            raise ValueError(f"{folder / name}.parquet: missing; run `python -m cppo collect` first")
    suite = parse(Suite, _json(folder / "suite.json"), str(folder / "suite.json"))
    configs = _json(folder / "configs.json")
    _check_runs(folder, suite, configs, tables["runs"])
    _check_scores(folder, suite, tables["scores"])
    counts = tables["scores"].groupby(["run", "step", "benchmark"]).size().to_dict()
    iterations = tables["curves"].groupby("run").size().to_dict()
    for row in tables["runs"].to_dict("records"):
        run, plan, total = row["run"], suite.settings[row["setting"]], int(row["iterations"])
        if row["label"] == "base":
            steps = [0]
        else:
            # A run that collapses at a checkpoint's iteration ends before that checkpoint is saved.
            last = total + (row["status"] == "finished")
            steps = list(range(plan.checkpoint_every, last, plan.checkpoint_every))
            if iterations.get(run, 0) != total:
                found = iterations.get(run, 0)
                raise ValueError(
                    f"{folder / 'curves.csv'}: run {run}: {found} iterations, expected {total}; collect again"
                )
        for benchmark in plan.task.benchmarks:
            for step in steps:
                found = counts.get((run, step, benchmark.name), 0)
                if found != benchmark.problems:
                    raise ValueError(
                        f"{folder / 'scores.csv'}: run {run} step {step} {benchmark.name}: {found} problems, "
                        f"expected {benchmark.problems}; evaluate it again"
                    )


def _check_runs(folder: Path, suite: Suite, configs: Any, runs: pd.DataFrame) -> None:
    """configs.json holds the suite's runs under their hashes, runs.csv the same ones, from one code version."""
    where = folder / "configs.json"
    if not isinstance(configs, dict):
        raise ValueError(f"{where}: not an object of configurations; collect again")
    for run, config in configs.items():
        if parse_run(config, f"{where}: {run}").id != run:
            raise ValueError(f"{where}: {run}: the configuration does not have this hash; collect again")
    expected = len(suite.settings) * (len(suite.seeds) * len(suite.objectives) + 1)
    if len(configs) != expected:
        raise ValueError(f"{where}: {len(configs)} runs, the suite has {expected}; collect again")
    if sorted(runs["run"].astype(str)) != sorted(configs) or not runs["setting"].isin(list(suite.settings)).all():
        raise ValueError(f"{folder / 'runs.csv'}: run: not the runs of configs.json; collect again")
    versions = sorted(runs["code_version"].astype(str).unique())
    if len(versions) != 1:
        raise ValueError(
            f"{folder / 'runs.csv'}: code_version: runs come from different versions of the code ({', '.join(versions)}); "
            "delete the older run directories and run the suite again"
        )


def _check_scores(folder: Path, suite: Suite, scores: pd.DataFrame) -> None:
    """Every row is one problem's whole Avg@k."""
    where = folder / "scores.csv"
    if not (scores["samples"] == suite.evaluation.samples).all():
        raise ValueError(f"{where}: samples: not {suite.evaluation.samples} in every row; evaluate again")
    if not (scores["correct"].ge(0) & (scores["correct"] + scores["unjudged"]).le(scores["samples"])).all():
        raise ValueError(f"{where}: correct: outside 0..samples - unjudged; evaluate again")
    if scores.duplicated(["run", "step", "benchmark", "problem"]).any():
        raise ValueError(f"{where}: problem: one occurs twice in a checkpoint; evaluate again")


def read_table(path: Path, table: str) -> pd.DataFrame:
    """A table with at least its columns; text stays text."""
    if not path.is_file():
        raise ValueError(f"{path}: missing; run the suite (`snakemake`) or `python -m cppo collect` first")
    try:
        found = pd.read_csv(path, dtype=TEXT, keep_default_na=False, na_values=[""])
    except (ValueError, OverflowError):
        raise ValueError(f"{path}: not a CSV table; delete it and make it again") from None
    for column in COLUMNS[table]:
        if column not in found:
            raise ValueError(f"{path}: column {column} is missing; delete it and make it again")
        numbers = found[column] if column in WORDS else pd.to_numeric(found[column], errors="coerce")
        wrong = found.index[numbers.isna() & found[column].notna()]
        if len(wrong):
            value, line = found.loc[wrong[0], column], wrong[0] + 2
            raise ValueError(f"{path}:{line}: {column}: {value!r:.60} is not a number; delete it and make it again")
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise ValueError(f"{path}: missing or not JSON; run `python -m cppo collect` first") from None
