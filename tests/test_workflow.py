"""The workflow on a copy of the checkout: what is planned, what runs, what is left alone, and both ways to add a rule."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import yaml
from tiny import ROOT, copy_checkout

from cppo.numerics import NUMERICS_VERSION
from cppo.suite.suite import load_suite

SNAKEMAKE = [sys.executable, "-m", "snakemake", "--cores", "2", "--config", "suite=micro"]
RULE = '''
"""A user's own rule, in a file of its own."""

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
        rule="halt",
    params:
        added=add_rule("halt", objective="halting:halt", params={"limit": 0.2}),
"""
OF_EVERY_RUN = {"data": 1, "base": 1, "evaluate_base": 1, "train": 2, "evaluate": 2, "collect": 1}
"""What the micro suite's base model and two runs take."""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked tree with a suite of two runs, carried as far as its tables."""
    folder = tmp_path_factory.mktemp("checkout")
    copy_checkout(folder)
    suite = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    suite["seeds"] = [0]
    suite["rules"] = [rule for rule in suite["rules"] if rule["name"] in ("grpo", "cppo")]
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


def planned(folder: Path, *arguments: str) -> dict[str, int]:
    """Job -> how often it is planned, by a dry run; nothing is planned where Snakemake says so."""
    done = snakemake(folder, "-n", *arguments)
    assert done.returncode == 0, done.stdout[-3000:]
    if "Nothing to be done" in done.stdout:
        return {}
    table = done.stdout.split("Job stats:")[1].split("\n\n")[0].splitlines()[3:]
    jobs = {name: int(count) for name, count in (line.split()[:2] for line in table if line.split())}
    assert jobs.pop("total") == sum(jobs.values())
    return jobs


@contextmanager
def edited(path: Path, old: str, new: str) -> Iterator[None]:
    """The file with `old` replaced by `new`; as it was before in the end."""
    before = path.read_text()
    assert before.count(old) == 1, f"{old!r} in {path}"
    path.write_text(before.replace(old, new))
    try:
        yield
    finally:
        path.write_text(before)


def cppo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cppo", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_tables_hold_every_run(checkout: Path) -> None:
    scores = pd.read_csv(checkout / "runs/micro/scores.csv")
    assert set(scores["rule"]) == {"base", "grpo", "cppo"}
    assert len(scores) == 3 * 12  # base at iteration 0, both rules at iteration 2: 4 problems of 3 benchmarks each
    assert pd.read_parquet(checkout / "runs/micro/scores.parquet").shape == scores.shape
    assert len(pd.read_csv(checkout / "runs/micro/curves.csv")) == 2 * 2


@pytest.mark.parametrize("module", ["loss.py", "training/train.py", "objectives/prefix.py"])
def test_a_second_run_has_nothing_to_do_even_after_a_comment(checkout: Path, module: str) -> None:
    with (checkout / "cppo" / module).open("a") as out:
        out.write("# a comment\n")
    assert planned(checkout, "runs/micro/scores.csv") == {}


@pytest.mark.parametrize("suite", ["config/micro.yaml", "elsewhere/micro.yaml"])
def test_the_suite_may_be_a_file(checkout: Path, suite: str) -> None:
    """By its path, the suite is the one that its name means: nothing is left to be done."""
    (checkout / "elsewhere").mkdir(exist_ok=True)
    shutil.copy(checkout / "config" / "micro.yaml", checkout / "elsewhere" / "micro.yaml")
    assert planned(checkout, "runs/micro/scores.csv", "--config", f"suite={suite}") == {}


def test_another_numerics_version_makes_everything_again(checkout: Path, tmp_path: Path) -> None:
    """After a raised version, base model, runs and scores are planned and made; what there was is moved aside, not deleted."""
    copy = tmp_path / "copy"
    shutil.copytree(checkout, copy)
    folders = {path.parent for path in (copy / "runs").glob("*/*/*/DONE")}
    metrics = {folder: (folder / "metrics.jsonl").read_bytes() for folder in folders if "train" in folder.parts}
    assert len(folders) == 3 and len(metrics) == 2
    before = (copy / "runs" / "micro" / "scores.csv").read_text()
    numerics = copy / "cppo" / "numerics.py"
    old = f"\nNUMERICS_VERSION = {NUMERICS_VERSION}\n"
    assert old in numerics.read_text()
    numerics.write_text(numerics.read_text().replace(old, "\nNUMERICS_VERSION = 999\n"))
    assert planned(copy, "runs/micro/scores.csv") == OF_EVERY_RUN
    refused = cppo(copy, "collect", "--suite", "micro")
    assert refused.returncode == 2, refused.stdout
    assert f"it was made by numerics version {NUMERICS_VERSION}, this code has version 999" in refused.stdout
    done = snakemake(copy, "runs/micro/scores.csv")
    assert done.returncode == 0, done.stdout[-3000:]
    assert planned(copy, "runs/micro/scores.csv") == {}
    assert set(pd.read_csv(copy / "runs" / "micro" / "runs.csv", dtype=str)["numerics"]) == {"999"}
    for folder in folders:
        aside = folder.with_name(f"{folder.name}.numerics-{NUMERICS_VERSION}")
        assert (aside / "config.json").is_file() and (aside / "checkpoints").is_dir()
        if folder in metrics:
            assert (aside / "metrics.jsonl").read_bytes() == metrics[folder]
    assert (copy / "runs" / "micro" / "scores.csv").read_text() == before, "only the version's number was raised"


def test_redrawing_published_figures_plans_no_training(checkout: Path) -> None:
    shutil.copytree(checkout / "runs" / "micro", checkout / "results" / "micro", dirs_exist_ok=True)
    jobs = planned(checkout, "-F", "paper_figures")
    assert "figure4_results_micro" in jobs
    assert not jobs.keys() & {"data", "base", "train", "evaluate", "evaluate_base", "collect"}
    shutil.rmtree(checkout / "results" / "micro")


@pytest.mark.parametrize("way", ["workflow file", "suite entry"])
def test_a_rule_of_the_users_own(checkout: Path, way: str) -> None:
    """Added by a workflow file with `use rule`, or by an entry with an import path: only its own jobs are new.

    After an edit of its module's code the same jobs are new again; after an edit of its comments and docstrings none is.
    """
    workflow_file = checkout / "workflow" / "rules" / "baselines" / "halt.smk"
    suite_file, module = checkout / "config" / "micro.yaml", checkout / "halting.py"
    before = suite_file.read_text()
    if way == "workflow file":
        name, train = "halt", "train_halt"
        workflow_file.parent.mkdir(exist_ok=True)
        workflow_file.write_text(BASELINE)
    else:
        name, train = "halt2", "train"
        suite = yaml.safe_load(before)
        suite["rules"].append({"name": name, "objective": "halting:halt", "params": {"limit": 0.3}})
        suite_file.write_text(yaml.safe_dump(suite))
    jobs = {train: 1, "evaluate": 1, "collect": 1}
    try:
        assert planned(checkout, "runs/micro/scores.csv") == jobs
        done = snakemake(checkout, "runs/micro/scores.csv")
        assert done.returncode == 0, done.stdout[-3000:]
        scores = pd.read_csv(checkout / "runs/micro/scores.csv")
        assert set(scores["rule"]) == {"base", "grpo", "cppo", name}
        assert planned(checkout, "runs/micro/scores.csv") == {}
        with edited(module, "x.abs() <= cfg.limit", "x.abs() < cfg.limit"):
            assert planned(checkout, "runs/micro/scores.csv") == jobs
            figures = set(planned(checkout)) - {*jobs, "all"}
            assert figures and all(re.fullmatch(r"(figure|table)\d_runs_micro", figure) for figure in figures)
        for old, new in [
            ('"""Drop tokens', '"""Mask tokens'),
            ("    x = log_ratio(tokens)\n", "    # a comment\n    x = log_ratio(tokens)  # another\n"),
            ('"""Largest log-ratio', '"""The largest log-ratio'),
        ]:
            with edited(module, old, new):
                assert planned(checkout, "runs/micro/scores.csv") == {}, new
    finally:
        workflow_file.unlink(missing_ok=True)
        suite_file.write_text(before)


def test_the_old_name_of_add_rule_tells_the_new_one(checkout: Path) -> None:
    path = checkout / "workflow" / "rules" / "baselines" / "old.smk"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        BASELINE.replace("added=add_rule", "baseline=baseline")
        .replace("rule=", "label=")
        .replace("params={", "settings={")
    )
    try:
        done = snakemake(checkout, "-n")
        assert done.returncode != 0 and "baseline(...) is now add_rule(...)" in done.stdout, done.stdout
    finally:
        path.unlink()


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
