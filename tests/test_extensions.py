"""The examples of CONTRIBUTING.md, followed word for word in a copy of the checkout, and what they cost."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from tiny import ROOT, copy_checkout

GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
CORE = ("cppo/", "paper_figures/", "workflow/", "config/")
"""Where files of the checkout are."""


def blocks(language: str, section: str) -> list[str]:
    """Code blocks of a section of the guide."""
    (text,) = re.findall(rf"^### {re.escape(section)}\n(.*?)(?=^##)", GUIDE, re.MULTILINE | re.DOTALL)
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def follow(folder: Path, section: str) -> tuple[int, int]:
    """Do what a section's example says; (files edited, new files)."""
    new = 0
    for block in blocks("python", section):
        name = block.removeprefix("# ").splitlines()[0]
        assert not (folder / name).exists()
        (folder / name).write_text(block.partition("\n")[2])
        new += 1
    edits = blocks("diff", section)
    for edit in edits:
        done = subprocess.run(["git", "apply", "-"], input=edit, text=True, cwd=folder, capture_output=True)
        assert done.returncode == 0, done.stderr
    return len(edits), new


def entries(section: str) -> list[dict[str, object]]:
    """The suite's lines that a section shows."""
    return [entry for block in blocks("yaml", section) for entry in yaml.safe_load(block)]


COSTS = dict(re.findall(r"^\| \[(.*?)\]\(.*?\) \| (\d \| \d)", GUIDE, re.MULTILINE))
SECTIONS = {
    "a rule of your own": "A rule of your own",
    "a rule with thresholds to show": "A rule of your own",
    "an advantage": "An advantage of your own",
    "a divergence": "A divergence of your own",
    "a benchmark": "A benchmark",
    "a task family": "A task family",
    "a rollout engine": "A rollout engine",
    "a figure": "A figure",
}


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, int]]]:
    """A copy of the checkout with every example, and each one's cost."""
    folder = tmp_path_factory.mktemp("extended")
    copy_checkout(folder)
    costs = {section: follow(folder, section) for section in dict.fromkeys(SECTIONS.values())}
    smoke = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    setting = smoke["settings"]["tiny"]
    setting["task"] = {
        "family": "parity",
        "sizes": [4, 5],
        "problems": 16,
        "slip": 0.3,
        "benchmarks": [{"name": "parity4", "size": 4, "problems": 4}, *entries("A benchmark")],
    }
    setting |= {"iterations": 2, "checkpoint_every": 2, "scale": {"engine": "rounded", "engine_tolerance": 0.5}}
    setting["warm_start"] |= {"target_accuracy": 0.0, "check_every": 20, "max_steps": 20}
    rules = [
        entry for section in ("A rule", "An advantage", "A divergence") for entry in entries(f"{section} of your own")
    ]
    suite = smoke | {"seeds": [0], "rules": rules}
    (folder / "config" / "extended.yaml").write_text(yaml.safe_dump(suite))
    return folder, costs


def cppo(folder: Path, *arguments: str) -> str:
    """What a command of the copy's package prints."""
    done = run(folder, [sys.executable, "-m", "cppo", *arguments])
    return done.stdout


def run(folder: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.parametrize("kind", SECTIONS)
def test_the_table_of_costs_is_true(kind: str, followed: tuple[Path, dict[str, tuple[int, int]]]) -> None:
    edited, new = followed[1][SECTIONS[kind]]
    assert COSTS[kind] == f"{edited} | {new}"


def test_every_kind_of_extension_has_its_row() -> None:
    assert COSTS.keys() == SECTIONS.keys()


def test_the_examples_are_trained_scored_and_drawn(followed: tuple[Path, dict[str, tuple[int, int]]]) -> None:
    """Own rule, thresholds, advantage, divergence, task family, benchmark, engine and figure in one small suite."""
    folder, _ = followed
    cppo(folder, "data", "--suite", "extended", "--setting", "tiny")
    cppo(folder, "base", "--suite", "extended", "--setting", "tiny")
    runs = [line.split() for line in cppo(folder, "runs", "--suite", "extended").splitlines()]
    assert [words[2] for words in runs] == ["tight", "grpo_signs", "dppo_hellinger"]
    for words in runs:
        cppo(folder, "train", "--suite", "extended", "--run", words[0])
    for path in (*folder.glob("runs/base/*/*"), *folder.glob("runs/train/*/*")):
        cppo(folder, "evaluate", str(path))
    cppo(folder, "collect", "--suite", "extended")
    tables = folder / "runs" / "extended"
    curves = pd.read_csv(tables / "curves.csv")
    assert set(curves["rule"]) == {"tight", "grpo_signs", "dppo_hellinger"}
    assert curves["mismatch_logp_q50"].gt(1e-5).all()  # the engine's rounding, measured
    assert curves.groupby("rule")["divergence"].max()[["tight", "dppo_hellinger"]].gt(0).all()
    tokens = pd.read_csv(tables / "tokens.csv")
    assert set(tokens["rule"]) == {"tight"} and tokens["threshold"].between(0.02 - 1e-6, 0.1 + 1e-6).all()
    assert set(pd.read_csv(tables / "scores.csv")["benchmark"]) == {"parity4", "parity6"}
    for figure in ("figure3", "figure12"):
        run(folder, [sys.executable, f"paper_figures/{figure}.py", str(tables)])
        assert (tables / "figures" / f"{figure}.png").stat().st_size > 10_000


def test_the_example_of_a_rule_keeps_the_laws(followed: tuple[Path, dict[str, tuple[int, int]]]) -> None:
    said = cppo(followed[0], "check", "tightening:tightening", "--set", "first=0.1")
    assert said.splitlines()[-1] == "tightening:tightening keeps every law"
