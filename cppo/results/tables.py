"""A suite's tables: collected from run folders, checked, and published to `results/`.

The tables (each as CSV and as Parquet, columns in `cppo.results.columns`) are scores (one row per problem and checkpoint),
curves (one row per iteration), positions (drift by token position, pooled over the iterations that lead to a checkpoint),
tokens (what a rule shows of real tokens), and runs (status, provenance, speed). Beside them are suite.json (the suite) and
configs.json (run id -> resolved configuration). results/README.md says what each column means.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from cppo.results.columns import COLUMNS, CURVES, KEY, TABLES, read_table
from cppo.results.run_folder import DONE, SCORES, RunFolder
from cppo.suite.config import BaseConfig, RunConfig, parse_run
from cppo.suite.schema import parse
from cppo.suite.suite import Suite
from cppo.system.files import atomic_folder, partial_path, read_json, sha256, write_atomic, writing

FILES = (*(f"{name}.{kind}" for name in TABLES for kind in ("csv", "parquet")), "suite.json", "configs.json")
"""Names of the files that `collect` writes."""
SUMS = "SHA256SUMS"
"""What `publish` writes beside them, in the format of sha256sum."""
TOKEN_ROWS = 3
"""Responses of a dump that enter the tokens table: it is committed, and the figure shows one."""
TOKEN_LISTS = ("token", "advantage", "ratio", "reason")
"""Lists that every row of a token dump has. A rule may add others, which are as long."""
TIMES = ("total", "tokens", "rollout", "update")
"""What a row of the stream of timings has: seconds, and the number of sampled tokens."""


def collect(suite: Suite, root: Path, out: Path) -> None:
    """Write the suite's tables to `out`, from the run folders under `root`.

    Raises ValueError for a run that is missing, not scored, or of another numerics version, naming it.
    """
    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in TABLES}
    configs: dict[str, Any] = {}
    everything: list[RunConfig | BaseConfig] = [*suite.bases(), *suite.runs()]
    for config in everything:
        folder = RunFolder(root / config.folder)
        if not (folder.done and folder.scores.is_file()):
            missing = SCORES if folder.done else DONE
            raise ValueError(f"{folder.path}: {missing} is missing; train and evaluate run {config.id} first")
        folder.check_numerics()
        configs[config.id] = config.model_dump(mode="json")
        parts["scores"].append(read_table(folder.scores, COLUMNS["scores"]))
        parts["runs"].append(_run_row(config, folder))
        if isinstance(config, RunConfig):
            parts["curves"].append(_curves(config, folder))
            parts["positions"].append(_positions(config, folder))
            parts["tokens"].append(_tokens(config, folder))
    for name, frames in parts.items():
        filled = [frame for frame in frames if len(frame)]
        _write(pd.concat(filled or frames, ignore_index=True), out / name)
    write_atomic(out / "suite.json", json.dumps(suite.published(), indent=1) + "\n")
    write_atomic(out / "configs.json", json.dumps(configs, indent=1) + "\n")


def as_csv(table: pd.DataFrame) -> str:
    """The table's text: seven significant digits, which float32 does not exceed."""
    text: str = table.to_csv(index=False, float_format="%.7g", lineterminator="\n")
    return text


def _write(table: pd.DataFrame, path: Path) -> None:
    write_atomic(path.with_suffix(".csv"), as_csv(table))
    whole = path.with_suffix(".parquet")
    with writing(whole):
        table.to_parquet(partial_path(whole), index=False)
        os.replace(partial_path(whole), whole)


def _jsonl(path: Path, numbers: Sequence[str], lists: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows of a stream, each with at least these numbers and lists. Raises ValueError naming file, line and key."""
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
        # A dump may hold further lists: what its rule shows of each token.
        own_lists = [*lists, *(name for name, x in row.items() if lists and isinstance(x, list) and name not in lists)]
        for name in own_lists:
            values = row.get(name)
            if not isinstance(values, list) or len(values) != len(row[lists[0]]):
                raise ValueError(f"{path}:{number}: {name}: not a list as long as {lists[0]}; {remedy}")
            if not all(isinstance(value, str) if name == "token" else _is_number(value) for value in values):
                what = "texts" if name == "token" else "numbers"
                raise ValueError(f"{path}:{number}: {name}: expected a list of {what}; {remedy}")
        for name in dict.fromkeys([*numbers, *(name for name in row if name not in own_lists)]):
            value = row.get(name)
            if not _is_number(value) and (name in numbers or value is not None):
                raise ValueError(f"{path}:{number}: {name!r:.60}: expected a number, got {value!r:.60}; {remedy}")
        rows.append(row)
    return rows


def _is_number(value: object) -> bool:
    """Whether this is a JSON number that a table can hold; true and false are not numbers."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _key(config: RunConfig | BaseConfig) -> dict[str, Any]:
    return {"run": config.id, "rule": config.rule_name, "setting": config.setting_name, "seed": config.seed}


def _keyed(config: RunConfig, rows: list[dict[Any, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """The rows of a run with its key. They have at least these columns, in this order, then any others."""
    names = dict.fromkeys([*KEY, *columns, *(name for row in rows for name in row)])
    return pd.DataFrame([_key(config) | row for row in rows], columns=list(names))


def _run_row(config: RunConfig | BaseConfig, folder: RunFolder) -> pd.DataFrame:
    status = folder.status()
    row: dict[str, Any] = _key(config) | {
        "status": status.state,
        "iterations": status.iterations,
        "collapsed_at": status.collapsed_at,
    }
    if isinstance(config, RunConfig):
        timings = pd.DataFrame(_jsonl(folder.stream("timings"), TIMES), columns=list(TIMES))
        row |= {
            "objective": config.rule.objective,
            "seconds": round(timings["total"].sum(), 1),
            "rollout_tokens_per_second": round(timings["tokens"].sum() / timings["rollout"].sum()),
            "update_tokens_per_second": round(timings["tokens"].sum() / timings["update"].sum()),
        }
    else:
        row |= {"objective": "warm start" if config.setting.warm_start else "published"}
    provenance = folder.provenance()
    columns = dict.fromkeys([*COLUMNS["runs"], *provenance])
    return pd.DataFrame([row | provenance], columns=list(columns))


def _curves(config: RunConfig, folder: RunFolder) -> pd.DataFrame:
    table = _keyed(config, _jsonl(folder.stream("metrics"), ["iteration"]), ["iteration", *CURVES])
    return table.rename(columns=lambda name: name.replace("/", "_"))


def _positions(config: RunConfig, folder: RunFolder) -> pd.DataFrame:
    names = ["iteration", "first", "last", "count", "sum", "tail_count", "tail_sum"]
    rows = pd.DataFrame(_jsonl(folder.stream("positions"), names), columns=names)
    every = config.setting.checkpoint_every
    rows["iteration"] = -(-rows["iteration"] // every) * every
    pooled = rows.groupby(["iteration", "first", "last"], as_index=False)[names[3:]].sum()
    pooled["drift"] = pooled["sum"] / pooled["count"]
    pooled["tail"] = pooled["tail_sum"] / pooled["tail_count"]
    columns = COLUMNS["positions"][len(KEY) :]
    return _keyed(config, pooled[list(columns)].to_dict("records"), columns)


def _tokens(config: RunConfig, folder: RunFolder) -> pd.DataFrame:
    """The first responses of each checkpoint's dump (those with most masked tokens), one row per token."""
    numbers = ("iteration", "row")
    dumps: dict[int, list[dict[str, Any]]] = {}
    for response in _jsonl(folder.stream("tokens"), numbers, TOKEN_LISTS):
        dumps.setdefault(response["iteration"], []).append(response)
    rows = [
        {"iteration": iteration, "row": response["row"], "position": t + 1}
        | {name: values[t] for name, values in response.items() if name not in numbers}
        for iteration, responses in dumps.items()
        for response in responses[:TOKEN_ROWS]
        for t in range(len(response["token"]))
    ]
    return _keyed(config, rows, COLUMNS["tokens"][len(KEY) :])


def publish(source: Path, target: Path) -> list[str]:
    """Check the tables in `source` and copy them to `target`, which is committed. Returns the names of the files in `target`.

    Figures and printed tables are copied too when the workflow has drawn them. Raises ValueError when a table is missing or
    incomplete, or when its rows come from different numerics versions.
    """
    check(source)
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        with writing(target / name):
            shutil.copyfile(source / name, target / name)
    write_atomic(target / SUMS, "".join(f"{sha256(source / name)}  {name}\n" for name in sorted(FILES)))
    figures = sorted(path.name for path in (source / "figures").glob("*") if path.is_file())
    if figures:
        with atomic_folder(target / "figures") as folder:
            for name in figures:
                shutil.copyfile(source / "figures" / name, folder / name)
    return [*FILES, SUMS, *(f"figures/{name}" for name in figures)]


def check(folder: Path) -> None:
    """Raises ValueError, one line that names the file, unless the tables in `folder` are whole and of one numerics version."""
    tables = {name: read_table(folder / f"{name}.csv", COLUMNS[name]) for name in TABLES}
    for name in TABLES:
        if not (folder / f"{name}.parquet").is_file():
            raise ValueError(f"{folder / name}.parquet: missing; run `python -m cppo collect` first")
    suite = published_suite(folder)
    configs = read_json(folder / "configs.json")
    _check_runs(folder, suite, configs, tables["runs"])
    _check_scores(folder, suite, tables["scores"])
    counts = tables["scores"].groupby(["run", "iteration", "benchmark"]).size().to_dict()
    iterations = tables["curves"].groupby("run").size().to_dict()
    for row in tables["runs"].to_dict("records"):
        run, setting, total = row["run"], suite.settings[row["setting"]], int(row["iterations"])
        if row["rule"] == BaseConfig.rule_name:
            scored = [0]
        else:
            # A run that collapses at a checkpoint's iteration ends before that checkpoint is saved.
            last = total + (row["status"] == "finished")
            scored = list(range(setting.checkpoint_every, last, setting.checkpoint_every))
            rows = iterations.get(run, 0)
            if rows != total:
                raise ValueError(
                    f"{folder / 'curves.csv'}: run {run}: {rows} iterations, expected {total}; collect again"
                )
        for benchmark in setting.task.benchmarks:
            for iteration in scored:
                problems = counts.get((run, iteration, benchmark.name), 0)
                if problems != benchmark.problems:
                    raise ValueError(
                        f"{folder / 'scores.csv'}: run {run} iteration {iteration} {benchmark.name}: {problems} problems, "
                        f"expected {benchmark.problems}; evaluate it again"
                    )


def _check_runs(folder: Path, suite: Suite, configs: Any, runs: pd.DataFrame) -> None:
    """Checks that configs.json holds the suite's runs under their hashes, and runs.csv the same runs of one version."""
    where = folder / "configs.json"
    for run, config in configs.items():
        if parse_run(config, f"{where}: {run}").id != run:
            raise ValueError(f"{where}: {run}: the configuration does not have this hash; collect again")
    expected = len(suite.settings) * (len(suite.seeds) * len(suite.rules) + 1)
    if len(configs) != expected:
        raise ValueError(f"{where}: {len(configs)} runs, the suite has {expected}; collect again")
    if sorted(runs["run"]) != sorted(configs) or not runs["setting"].isin(list(suite.settings)).all():
        raise ValueError(f"{folder / 'runs.csv'}: run: not the runs of configs.json; collect again")
    versions = sorted(runs["numerics"].unique())
    if len(versions) != 1:
        raise ValueError(
            f"{folder / 'runs.csv'}: numerics: runs come from different numerics versions ({', '.join(versions)}); run the "
            "suite again, which makes those of other versions anew"
        )


def _check_scores(folder: Path, suite: Suite, scores: pd.DataFrame) -> None:
    """Checks that every row is the whole Avg@k of one problem."""
    where = folder / "scores.csv"
    if not (scores["samples"] == suite.evaluation.samples).all():
        raise ValueError(f"{where}: samples: not {suite.evaluation.samples} in every row; evaluate again")
    if not (scores["correct"].ge(0) & (scores["correct"] + scores["unjudged"]).le(scores["samples"])).all():
        raise ValueError(f"{where}: correct: outside 0..samples - unjudged; evaluate again")
    if scores.duplicated(["run", "iteration", "benchmark", "problem"]).any():
        raise ValueError(f"{where}: problem: one occurs twice in a checkpoint; evaluate again")


def published_suite(folder: Path) -> Suite:
    """The suite of a folder of tables: suite.json without the `traces` that `Suite.published` adds to each rule.

    Raises ValueError, one line that names the file, when it is missing or damaged.
    """
    path = folder / "suite.json"
    raw = read_json(path)
    rules = raw.get("rules")
    for rule in rules if isinstance(rules, list) else ():
        if isinstance(rule, dict):
            rule.pop("traces", None)
    return parse(Suite, raw, str(path))
