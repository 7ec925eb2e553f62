"""The workflow on a copy of the checkout: what is planned, what runs, what is left alone, and both ways to a baseline."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from tiny import ROOT, copy_checkout

from cppo.suite.suite import load_suite

SNAKEMAKE = [sys.executable, "-m", "snakemake", "--cores", "2", "--config", "suite=micro"]
RULE = '''
"""A user's own objective, in a file of its own."""

from dataclasses import dataclass

from cppo.objectives import Terms, Tokens, register
from cppo.objectives.ratio import hard_gate, log_ratio


@dataclass(frozen=True)
class Halt:
    """Parameters of `halt`."""

    limit: float = 0.1
    """Largest log-ratio, in either direction."""


@register()
def halt(cfg: Halt, tokens: Tokens) -> Terms:
    """Drop tokens whose log-ratio left [-limit, limit]."""
    x = log_ratio(tokens)
    return hard_gate(tokens.advantages * x.exp(), x.abs() <= cfg.limit)
'''
BASELINE = """
use rule train as train_halt with:
    wildcard_constraints:
        label="halt",
    params:
        baseline=baseline("halt", objective="halting:halt", settings={"limit": 0.2}),
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked tree with a suite of two runs, carried as far as its tables."""
    folder = tmp_path_factory.mktemp("checkout")
    copy_checkout(folder)
    suite = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    suite["seeds"] = [0]
    suite["objectives"] = [o for o in suite["objectives"] if o["name"] in ("grpo", "cppo")]
    suite["settings"]["tiny"] |= {"iterations": 2}
    (folder / "config" / "micro.yaml").write_text(yaml.safe_dump(suite))
    (folder / "halting.py").write_text(RULE)
    done = snakemake(folder, "runs/micro/scores.csv")
    assert done.returncode == 0, done.stdout[-3000:]
    return folder


def snakemake(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = (
        [*SNAKEMAKE, "--", *arguments] if arguments and not arguments[0].startswith("-") else [*SNAKEMAKE, *arguments]
    )
    return subprocess.run(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )


def test_tables_hold_every_run(checkout: Path) -> None:
    scores = pd.read_csv(checkout / "runs/micro/scores.csv")
    assert set(scores["label"]) == {"base", "grpo", "cppo"}
    assert len(scores) == 3 * 12  # base at step 0, both rules at step 2: 4 problems of 3 benchmarks each
    assert pd.read_parquet(checkout / "runs/micro/scores.parquet").shape == scores.shape
    assert len(pd.read_csv(checkout / "runs/micro/curves.csv")) == 2 * 2


def test_a_second_run_has_nothing_to_do_even_after_a_comment(checkout: Path) -> None:
    with (checkout / "cppo" / "train.py").open("a") as out:
        out.write("# a comment\n")
    done = snakemake(checkout, "runs/micro/scores.csv")
    assert "Nothing to be done" in done.stdout, done.stdout[-2000:]


def test_redrawing_published_figures_plans_no_training(checkout: Path) -> None:
    shutil.copytree(checkout / "runs" / "micro", checkout / "results" / "micro", dirs_exist_ok=True)
    done = snakemake(checkout, "-n", "-F", "paper_figures")
    assert done.returncode == 0, done.stdout[-2000:]
    planned = {line.split()[0] for line in done.stdout.split("Job stats:")[1].splitlines()[2:] if line.split()}
    assert "figure4_results_micro" in planned
    assert not planned & {"data", "base", "train", "evaluate", "evaluate_base", "collect"}
    shutil.rmtree(checkout / "results" / "micro")


@pytest.mark.parametrize("way", ["rule file", "suite entry"])
def test_a_new_baseline(checkout: Path, way: str) -> None:
    """A file with `use rule`, or an entry with an import path: only the baseline's own jobs are new, and it is scored."""
    path = checkout / "workflow" / "rules" / "baselines" / "halt.smk"
    suite_file = checkout / "config" / "micro.yaml"
    before = suite_file.read_text()
    if way == "rule file":
        path.parent.mkdir(exist_ok=True)
        path.write_text(BASELINE)
    else:
        suite = yaml.safe_load(before)
        suite["objectives"].append({"name": "halt2", "objective": "halting:halt", "settings": {"limit": 0.3}})
        suite_file.write_text(yaml.safe_dump(suite))
    label = "halt" if way == "rule file" else "halt2"
    try:
        plan = snakemake(checkout, "-n", "runs/micro/scores.csv").stdout.split("Job stats:")[1].split("\n\n")[0]
        jobs = dict(line.split()[:2] for line in plan.splitlines()[3:] if line.split())
        trained = "train_halt" if way == "rule file" else "train"
        assert jobs == {trained: "1", "evaluate": "1", "collect": "1", "total": "3"}, plan
        done = snakemake(checkout, "runs/micro/scores.csv")
        assert done.returncode == 0, done.stdout[-3000:]
        scores = pd.read_csv(checkout / "runs/micro/scores.csv")
        assert set(scores["label"]) == {"base", "grpo", "cppo", label}
    finally:
        path.unlink(missing_ok=True)
        suite_file.write_text(before)


def test_a_bad_suite_stops_before_any_job(checkout: Path) -> None:
    bad = yaml.safe_load((checkout / "config" / "micro.yaml").read_text())
    bad["settings"]["tiny"]["rollout"]["minibatch"] = 3
    (checkout / "config" / "bad.yaml").write_text(yaml.safe_dump(bad))
    done = snakemake(checkout, "--config", "suite=bad")
    assert done.returncode != 0
    lines = [line for line in done.stdout.splitlines() if "minibatch 3 does not divide prompts 8" in line]
    assert len(lines) == 1 and "config/bad.yaml: settings.tiny.rollout: " in lines[0], done.stdout
    assert "Job stats" not in done.stdout and not (checkout / "runs" / "bad").exists()


def test_the_slurm_profile_plans_what_the_suite_asks_for(checkout: Path) -> None:
    """Without any Slurm: resources of each rule in the job list, the suite's own where it names the setting."""
    suite = yaml.safe_load((checkout / "config" / "micro.yaml").read_text())
    tiny = {"gpus": 2, "nodes": 1, "cpus": 8, "memory_gb": 10.5, "hours": 1.5, "evaluate_hours": 0.5}
    suite |= {"settings": {name: suite["settings"]["tiny"] for name in ("tiny", "other")}, "resources": {"tiny": tiny}}
    (checkout / "config" / "asking.yaml").write_text(yaml.safe_dump(suite))
    command = [sys.executable, "-m", "snakemake", "-n", "--cores", "all", "--profile", "slurm", "--forceall"]
    command += ["--config", "suite=asking"]
    done = subprocess.run(command, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    runs = {run.id: run.setting_name for run in load_suite(checkout / "config" / "asking.yaml").runs()}
    planned: dict[str, set[str]] = {}
    for block in done.stdout.split("\n\n"):
        found = re.search(
            r"^rule (data|base|train|evaluate):.*wildcards: (.*?)\n\s*resources: (.*?)$", block, re.M | re.S
        )
        if found:
            rule, wildcards, resources = found.groups()
            w = dict(pair.split("=") for pair in wildcards.split(", "))
            asked = dict(pair.split("=", 1) for pair in resources.split(", "))
            keys = ("gpu", "nodes", "cpus_per_task", "mem_mb", "runtime", "slurm_extra")
            text = " ".join(asked.get(key, "-").removeprefix("--signal=") for key in keys)
            if rule == "train":
                text += " processes " + "".join(re.findall(r"--nproc-per-node (\d+)", asked["launcher"]) or "1")
            planned.setdefault(f"{rule} {w.get('setting') or runs[w['run']]}", set()).add(text)
    assert planned == {
        "data tiny": {"- - 1 4000 60 -"},
        "data other": {"- - 1 4000 60 -"},
        "base tiny": {"- - 4 5250 90 -"},
        "base other": {"- - 1 4000 60 -"},
        "train tiny": {"2 1 8 10500 90 TERM@540 processes 2"},
        "train other": {"- 1 1 4000 60 TERM@360 processes 1"},
        "evaluate tiny": {"1 - 4 5250 30 -"},
        "evaluate other": {"- - 1 4000 60 -"},
    }


@pytest.mark.parametrize("suite", sorted(p.stem for p in (ROOT / "config").glob("*.yaml")))
def test_every_committed_suite_plans(suite: str) -> None:
    done = subprocess.run(
        [*SNAKEMAKE[:-1], f"suite={suite}", "-n", "--quiet", "rules"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
