"""From a number back to what made it: `show` prints the whole provenance of a run, `verify` derives published tables again."""

import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from cppo.numerics import NUMERICS_VERSION
from cppo.objectives import objective
from cppo.results.columns import COLUMNS, TABLES, read_table
from cppo.results.provenance import PACKAGES
from cppo.results.run_folder import RunFolder
from cppo.results.tables import SUMS, as_csv, check
from cppo.suite.config import BaseConfig, RunConfig, parse_run
from cppo.system.files import read_json, sha256
from cppo.system.seeds import seed
from cppo.tasks.types import Axes


def show(run: str, root: Path, results: Path) -> str:
    """Everything known of the run or base model with this id: where it is, status, code, packages, seeds, configuration.

    Raises ValueError when neither `root` (run folders) nor `results` (published tables) has it.
    """
    places: list[tuple[str, dict[str, Any]]] = []  # (where it is, its provenance and status)
    config: RunConfig | BaseConfig | None = None
    for path in sorted(root.glob(f"*/*/{run}")):
        folder = RunFolder(path)
        config = folder.config()
        status = folder.status().state if folder.done else "not finished"
        places.append((str(path), folder.provenance() | {"status": status}))
    for path in sorted(results.glob("*/configs.json")):
        configs = read_json(path)
        if run in configs:
            config = parse_run(configs[run], f"{path}: {run}")
            table = read_table(path.with_name("runs.csv"), COLUMNS["runs"])
            rows = table[table["run"] == run].to_dict("records")
            if len(rows) != 1:
                raise ValueError(
                    f"{path.with_name('runs.csv')}: {len(rows)} rows of run {run}, expected 1; publish it again"
                )
            places.append((str(path.parent), {str(name): value for name, value in rows[0].items()}))
    if config is None:
        raise ValueError(f"{run}: no such run in {root}/ or {results}/; ids are in results/*/runs.csv")
    if config.id != run:
        raise ValueError(f"{places[-1][0]}: the configuration of {run} has hash {config.id}: it was edited")
    seeded = f", seed {config.seed}" if isinstance(config, RunConfig) else ""
    lines = [f"run         {run}: {config.rule_name}, setting {config.setting_name}{seeded}"]
    for where, row in places:
        lines += [
            f"in          {where}",
            f"  status    {row['status']}",
            f"  numerics  version {row['numerics']} at commit {row['commit']} (this checkout: {NUMERICS_VERSION})",
            f"  packages  Python {row['python']}, " + ", ".join(f"{name} {row[name]}" for name in PACKAGES),
            f"  machine   {row['machine']}",
        ]
    lines += ["seeds       each draw has its own seed, from its axes; the first of each kind:"]
    lines += [f"  {' '.join(map(str, axes)):<40} {seed(*axes)}" for axes in _first_seeds(config)]
    body = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=110)
    return "\n".join([*lines, "config", *(f"  {line}" for line in body.splitlines())]) + "\n"


def _first_seeds(config: RunConfig | BaseConfig) -> list[Axes]:
    """The axes of the first draw of each kind that the run's numbers depend on."""
    name, task = config.setting_name, config.setting.task
    axes = task.first_seeds(name)
    if isinstance(config, RunConfig):
        axes += [("order", name, config.seed, 0), ("rollout", name, config.seed, 0)]
        if "position" in objective(config.rule.objective, **config.rule.params).needs:
            axes += [("shuffle", name, config.seed, 1)]
    return [*axes, ("evaluate", name, config.seed, task.benchmarks[0].name, "<problem id>", 0)]


def verify(folder: Path) -> list[str]:
    """What holds of the published tables in `folder`, in one line each.

    Checked are the SHA-256 of the files, the hashes of the configurations, that every row belongs to a run of the suite and
    none is missing, that both formats of a table agree, and that the printed tables follow from the rows: they are made again
    and compared. Raises ValueError, one line that names the file, for the first thing that does not hold.
    """
    sums = _sums(folder / SUMS)
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file() or sha256(path) != expected:
            raise ValueError(f"{path}: not the file that was published ({SUMS}); publish it again or restore it")
    check(folder)
    for name in TABLES:
        table = pd.read_parquet(folder / f"{name}.parquet")
        if as_csv(table) != (folder / f"{name}.csv").read_text(encoding="utf-8"):
            raise ValueError(f"{folder / name}.csv: differs from {name}.parquet; publish it again or restore it")
    printed = _redraw(folder)
    rows = {name: len(read_table(folder / f"{name}.csv", COLUMNS[name])) for name in TABLES}
    return [
        f"{len(sums)} files have the SHA-256 of their publication",
        f"{rows['runs']} runs: every id is the hash of its resolved configuration in configs.json",
        f"numerics version {published_numerics(folder)} in every row",
        "rows: " + ", ".join(f"{count} {name}" for name, count in rows.items()) + "; none missing, none twice",
        f"CSV and Parquet agree in {len(TABLES)} tables",
        f"made again from the rows, byte for byte: {', '.join(printed)}",
    ]


def published_numerics(folder: Path) -> str:
    """The numerics version of the published tables in `folder`, which `check` has found to be the same in every row."""
    (version,) = set(read_table(folder / "runs.csv", COLUMNS["runs"])["numerics"])
    return str(version)


def _sums(path: Path) -> dict[str, str]:
    """File name -> SHA-256, from a file in the format of sha256sum."""
    if not path.is_file():
        raise ValueError(f"{path}: missing; `python -m cppo publish` writes it")
    return {name: digest for digest, name in (line.split("  ", 1) for line in path.read_text().splitlines())}


def _redraw(folder: Path) -> list[str]:
    """Names of the printed tables in `folder`/figures, after each was made again from the rows and found equal."""
    figures = folder / "figures"
    scripts = sorted({path.stem for path in figures.glob("table*.md")})
    if not scripts:
        raise ValueError(f"{figures}: no printed table; `snakemake --cores all -F paper_figures` draws them")
    names = []
    with tempfile.TemporaryDirectory() as temporary:
        for script in scripts:
            command = [sys.executable, f"paper_figures/{script}.py", str(folder), "--out", temporary]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                problem = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise ValueError(f"paper_figures/{script}.py: {problem} (run this in the repository's root)")
            for path in sorted(Path(temporary).glob(f"{script}.*")):
                published = figures / path.name
                if not published.is_file() or not filecmp.cmp(path, published, shallow=False):
                    raise ValueError(
                        f"{published}: does not follow from the rows; `snakemake --cores all -F paper_figures` draws it again"
                    )
                names.append(path.name)
    return names
