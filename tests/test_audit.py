"""From a published number back to what made it."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from tiny import ROOT

from cppo.__main__ import main
from cppo.numerics import NUMERICS_VERSION
from cppo.results.columns import COLUMNS, read_table
from cppo.results.provenance import PACKAGES
from cppo.results.tables import SUMS, as_csv
from cppo.system.seeds import seed

PUBLISHED = sorted(path.parent.name for path in (ROOT / "results").glob("*/suite.json"))


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def numerics(name: str) -> str:
    """The numerics version of a published suite."""
    (version,) = set(read_table(ROOT / "results" / name / "runs.csv", COLUMNS["runs"])["numerics"])
    return str(version)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_results_verify(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", f"results/{name}"]) == 0
    out = capsys.readouterr().out
    assert out.count("holds  ") == 6 and "table1.md" in out
    verdict = out.splitlines()[-1]
    if numerics(name) == str(NUMERICS_VERSION):
        assert verdict == f"results/{name}: verified"
    else:
        assert "WARNING" in verdict and "verified" not in out


def test_rows_of_another_numerics_version_are_not_called_verified(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They follow from their rows, and still the code of today gives other numbers: exit code 0, and a warning."""
    monkeypatch.setattr("cppo.results.audit._redraw", lambda folder: [])  # the test above lets it draw
    monkeypatch.setattr("cppo.numerics.NUMERICS_VERSION", 99)
    assert main(["verify", "mini"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"results/mini: the tables follow from their rows, but WARNING: the rows are of numerics version {numerics('mini')}, "
        "this code has version 99: running the suite again gives other numbers"
    )
    monkeypatch.setattr("cppo.numerics.NUMERICS_VERSION", int(numerics("mini")))
    assert main(["verify", "mini"]) == 0
    assert capsys.readouterr().out.endswith("results/mini: verified\n")


def resum(folder: Path) -> None:
    """What a careful forger does after an edit."""
    lines = []
    for line in (folder / SUMS).read_text().splitlines():
        name = line.split("  ", 1)[1]
        lines.append(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n")
    (folder / SUMS).write_text("".join(lines))


def better_score(folder: Path) -> None:
    table = read_table(folder / "scores.csv", COLUMNS["scores"])
    row = table.index[(table["rule"] == "cppo") & (table["correct"] < table["samples"])][-1]
    table.loc[row, "correct"] += 1
    (folder / "scores.csv").write_text(as_csv(table))


def better_score_everywhere(folder: Path) -> None:
    better_score(folder)
    pd.read_csv(folder / "scores.csv", dtype=dict(pd.read_parquet(folder / "scores.parquet").dtypes)).to_parquet(
        folder / "scores.parquet", index=False
    )
    resum(folder)


def other_seed(folder: Path) -> None:
    path = folder / "configs.json"
    path.write_text(path.read_text().replace('"seed": 1,', '"seed": 2,', 1))
    resum(folder)


FORGERIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a score": (better_score, "scores.csv: not the file that was published"),
    "a score with new sums": (lambda f: (better_score(f), resum(f))[1], "scores.csv: differs from scores.parquet"),
    "a score in both formats with new sums": (better_score_everywhere, "does not follow from the rows"),
    "a configuration": (other_seed, "the configuration does not have this hash"),
    "the printed table": (
        lambda f: (f / "figures" / "table1.md").write_text("CPPO 100.0\n") and None,
        "table1.md: does not follow from the rows",
    ),
    "no sums": (lambda f: (f / SUMS).unlink(), f"{SUMS}: missing"),
    "no printed tables": (lambda f: shutil.rmtree(f / "figures"), "no printed table"),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_forgery_is_named(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forge, message = FORGERIES[what]
    folder = tmp_path / "mini"
    shutil.copytree(ROOT / "results" / "mini", folder)
    forge(folder)
    assert main(["verify", str(folder)]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_show_prints_the_whole_provenance(capsys: pytest.CaptureFixture[str]) -> None:
    runs = read_table(ROOT / "results" / "mini" / "runs.csv", COLUMNS["runs"])
    row = runs[(runs["rule"] == "cppo") & (runs["seed"] == 1)].iloc[0]
    assert main(["show", row["run"]]) == 0
    out = capsys.readouterr().out
    for part in (
        f"run         {row['run']}: cppo, setting base, seed 1",
        "results/mini",
        f"version {row['numerics']} at commit",
        row["commit"],
    ):
        assert part in out
    for name in PACKAGES:
        assert f"{name} {row[name]}" in out
    assert f"{seed('rollout', 'base', 1, 0)}" in out and "delta_b: 0.02" in out


def test_show_of_an_unknown_run_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "0123456789"]) == 2
    assert capsys.readouterr().err == (
        "cppo: error: 0123456789: no such run in runs/ or results/; ids are in results/*/runs.csv\n"
    )
