"""A suite's tables: collected from run directories, checked, and published to `results/`.

Tables (CSV and parquet): scores (a row a problem and checkpoint), curves (a row an iteration), positions (drift by token
position, pooled over the iterations that lead to a checkpoint), tokens (CPPO's thresholds on real tokens), runs (status,
provenance, speed). Beside them suite.json (the resolved suite) and configs.json (run id -> resolved configuration).
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from cppo.config import BaseConfig, RunConfig, Suite, parse

TABLES = ("scores", "curves", "positions", "tokens", "runs")
KEY = ["run", "label", "setting", "seed"]
CURVES = (
    "reward accuracy unjudged response_length truncated entropy divergence mask_share mask_share/threshold"
    " mask_share/budget mask_share/sequence gate_mean delta_b loss value_loss grad_norm relative_logprob_error drift"
    " zero_variance skipped_updates nonfinite_updates"
).split()


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
        parts["scores"].append(pd.read_csv(folder / "scores.csv"))
        parts["runs"].append(_run_row(config, folder))
        if isinstance(config, RunConfig):
            parts["curves"].append(_curves(config, folder))
            parts["positions"].append(_positions(config, folder))
            parts["tokens"].append(_tokens(config, folder))
    out.mkdir(parents=True, exist_ok=True)
    for name, frames in parts.items():
        filled = [frame for frame in frames if len(frame)]
        _write(pd.concat(filled or frames, ignore_index=True), out / name)
    (out / "suite.json").write_text(json.dumps(suite.model_dump(mode="json"), indent=1) + "\n")
    (out / "configs.json").write_text(json.dumps(configs, indent=1) + "\n")


def _write(table: pd.DataFrame, path: Path) -> None:
    table.to_csv(path.with_suffix(".csv"), index=False, float_format="%.7g", lineterminator="\n")
    table.to_parquet(path.with_suffix(".parquet"), index=False)


def _jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _keyed(config: RunConfig, rows: list[dict[str, Any]], columns: list[str]) -> pd.DataFrame:
    key = {"run": config.id, "label": config.label, "setting": config.setting, "seed": config.seed}
    return pd.DataFrame([key | row for row in rows], columns=KEY + columns)


def _run_row(config: RunConfig | BaseConfig, folder: Path) -> pd.DataFrame:
    done = json.loads((folder / "DONE").read_text())
    row: dict[str, Any] = {"run": config.id, "setting": config.setting, "status": done["status"]}
    if isinstance(config, RunConfig):
        timings = pd.DataFrame(_jsonl(folder / "timings.jsonl"))
        row |= {
            "label": config.label,
            "objective": config.objective.objective,
            "seed": config.seed,
            "iterations": done["iterations"],
            "seconds": round(timings["total"].sum(), 1),
            "rollout_tokens_per_second": round(timings["tokens"].sum() / timings["rollout"].sum()),
            "update_tokens_per_second": round(timings["tokens"].sum() / timings["update"].sum()),
        }
    else:
        row |= {"label": "base", "objective": "warm start", "seed": 0, "iterations": done["steps"]}
    columns = [
        *KEY,
        "objective",
        "status",
        "iterations",
        "seconds",
        "rollout_tokens_per_second",
        "update_tokens_per_second",
    ]
    provenance = json.loads((folder / "provenance.json").read_text())
    return pd.DataFrame([row | provenance], columns=[*columns, *provenance])


def _curves(config: RunConfig, folder: Path) -> pd.DataFrame:
    table = _keyed(config, _jsonl(folder / "metrics.jsonl"), ["iteration", *CURVES])
    return table.rename(columns=lambda name: name.replace("/", "_"))


def _positions(config: RunConfig, folder: Path) -> pd.DataFrame:
    rows = pd.DataFrame(
        _jsonl(folder / "positions.jsonl"),
        columns=["iteration", "first", "last", "count", "sum", "tail_count", "tail_sum"],
    )
    every = config.plan.checkpoint_every
    rows["step"] = -(-rows["iteration"] // every) * every
    pooled = rows.groupby(["step", "first", "last"], as_index=False)[["count", "sum", "tail_count", "tail_sum"]].sum()
    pooled["drift"] = pooled["sum"] / pooled["count"]
    pooled["tail"] = pooled["tail_sum"] / pooled["tail_count"]
    columns = ["step", "first", "last", "count", "drift", "tail"]
    found = [dict(zip(columns, row, strict=True)) for row in pooled[columns].itertuples(index=False)]
    return _keyed(config, found, columns)


def _tokens(config: RunConfig, folder: Path) -> pd.DataFrame:
    """The last dump of the run, a row a token."""
    dumps = _jsonl(folder / "tokens.jsonl")
    last = max((dump["iteration"] for dump in dumps), default=None)
    lists = ["token", "advantage", "ratio", "weighted", "prefix_threshold", "threshold", "reason"]
    rows = [
        {"step": last, "row": dump["row"], "position": t + 1, "delta": dump["delta"]} | {n: dump[n][t] for n in lists}
        for dump in dumps
        if dump["iteration"] == last
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


def check(folder: Path) -> None:
    """ValueError, one line naming the file, unless the tables in `folder` are whole and of one code version."""
    tables = {name: _read(folder / f"{name}.csv") for name in TABLES}
    suite = parse(Suite, _json(folder / "suite.json"), str(folder / "suite.json"))
    configs = _json(folder / "configs.json")
    for run, config in configs.items():
        kind: type[RunConfig] | type[BaseConfig] = RunConfig if "seed" in config else BaseConfig
        if parse(kind, config, f"{folder / 'configs.json'}: {run}").id != run:
            raise ValueError(
                f"{folder / 'configs.json'}: {run}: the configuration does not have this hash; collect again"
            )
    runs, scores = tables["runs"], tables["scores"]
    versions = sorted(runs["code_version"].unique())
    if len(versions) != 1:
        raise ValueError(
            f"{folder / 'runs.csv'}: code_version: runs come from different versions of the code ({', '.join(versions)}); "
            "delete the older run directories and run the suite again"
        )
    if sorted(runs["run"]) != sorted(configs):
        raise ValueError(f"{folder / 'runs.csv'}: run: not the runs of configs.json; collect again")
    expected = sum(len(suite.seeds) * len(suite.objectives) + 1 for _ in suite.settings)
    if len(configs) != expected:
        raise ValueError(f"{folder / 'configs.json'}: {len(configs)} runs, the suite has {expected}; collect again")
    if not scores["correct"].between(0, scores["samples"]).all():
        raise ValueError(f"{folder / 'scores.csv'}: correct: outside 0..samples; evaluate again")
    for row in runs.to_dict("records"):
        plan = suite.settings[row["setting"]]
        mine = scores[scores["run"] == row["run"]]
        every = plan.checkpoint_every
        steps = [0] if row["label"] == "base" else [*range(every, int(row["iterations"]) + 1, every)]
        for benchmark in plan.task.benchmarks:
            for step in steps:
                found = len(mine[(mine["step"] == step) & (mine["benchmark"] == benchmark.name)])
                if found != benchmark.problems:
                    raise ValueError(
                        f"{folder / 'scores.csv'}: run {row['run']} step {step} {benchmark.name}: {found} problems, "
                        f"expected {benchmark.problems}; evaluate it again"
                    )


def _read(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise ValueError(f"{path}: missing; run the suite (`snakemake`) or `python -m cppo collect` first")
    return pd.read_csv(path, dtype={"run": str, "code_version": str})


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"{path}: missing or not JSON; run `python -m cppo collect` first") from None
