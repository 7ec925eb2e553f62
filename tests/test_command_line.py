"""The command line by itself: how a suite is named, remedies that work, and readers that leave early."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT, smoke

from cppo.__main__ import main
from cppo.suite.suite import Suite, load_suite, suite_name


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own folder with config/own.yaml, in which commands run; the suite is small."""
    (tmp_path / "config").mkdir()
    smoke(tmp_path, seeds=[0], rules=[{"name": "grpo", "objective": "grpo"}])
    raw = (tmp_path / "suite.yaml").read_text().replace("iterations: 4", "iterations: 2")
    (tmp_path / "config" / "own.yaml").write_text(raw)
    (tmp_path / "suite.yaml").unlink()
    monkeypatch.chdir(tmp_path)
    return tmp_path


WAYS = ("own", "config/own.yaml", "./config/own.yaml")


# How a suite is named -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_suite_is_its_name_or_its_file(way: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In every command; what is written is called by the name."""
    suite = load_suite("config/own.yaml")
    assert load_suite(way) == suite and suite_name(way) == "own"
    (run,) = suite.runs()
    for command in (["check-suite", way], ["plan", way], ["runs", "--suite", way]):
        assert main(command) == 0
    said = capsys.readouterr().out
    assert "1 runs, 1 base models" in said and "own: Every rule and divergence" in said and run.id in said
    for name in ("data", "base"):
        assert main([name, "--suite", way, "--setting", "tiny"]) == 0
    assert main(["train", "--suite", way, "--run", run.id]) == 0
    for config in (run, run.base):
        assert main(["evaluate", f"runs/{config.folder}"]) == 0
    assert main(["collect", "--suite", way]) == 0
    assert main(["publish", way]) == 0
    assert "scores.csv" in capsys.readouterr().out
    assert {path.name for path in (folder / "results").iterdir()} == {"own"}


def test_published_tables_are_named_in_four_ways(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By suite, file or folder: `verify` reads results/<suite>."""
    seen: list[Path] = []
    monkeypatch.setattr("cppo.results.audit.verify", lambda folder: seen.append(folder) or [])
    monkeypatch.setattr("cppo.results.audit.published_numerics", lambda folder: "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results" / "own").mkdir(parents=True)
    for way in (*WAYS, "results/own", "results/own/"):
        assert main(["verify", way]) == 0
    assert seen == [Path("results/own")] * 5


def test_a_name_may_have_a_dot(folder: Path) -> None:
    shutil.copy("config/own.yaml", "config/v1.5.yaml")
    assert load_suite("v1.5") == load_suite("own")
    assert suite_name("v1.5") == suite_name("config/v1.5.yaml") == "v1.5"


def test_an_unknown_suite_lists_the_known_ones(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--suite", "mine"]) == 2
    assert capsys.readouterr().err == (
        "cppo: error: mine: no such suite; give a YAML file, or a name in config/: own\n"
    )


# Remedies -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["runs", "elsewhere/my runs"])
def test_the_remedy_for_what_is_missing_works(root: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each error names the command that makes what is missing, with suite and root: run as it is written, it does."""
    shutil.move("config/own.yaml", "my suite.yaml")
    suite: Suite = load_suite("my suite.yaml")
    train = ["train", "--suite", "my suite.yaml", "--root", root, "--run", suite.runs()[0].id]
    commands = [train]
    for missing, command in (("base model", "base"), ("train.jsonl", "data")):
        assert main(commands[-1]) == 2
        error = capsys.readouterr().err
        assert missing in error and error.count("\n") == 1
        (remedy,) = re.findall("`(cppo .*?)`", error)
        assert f"cppo {command} --suite 'my suite.yaml' --setting tiny" in remedy
        assert ("--root" in remedy) is (root != "runs")
        commands.append(shlex.split(remedy)[1:])
    while commands:
        assert main(commands.pop()) == 0
    assert (folder / root / suite.runs()[0].folder / "DONE").is_file()


# Readers that leave ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["runs", "--suite", "cpu"], ["schema"], ["objectives"]])
def test_a_reader_may_leave_early(command: list[str]) -> None:
    """As in `cppo runs | head -1`: no traceback, no complaint at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cppo", *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0


def test_the_schema_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    """Every key of every part of a suite has its meaning, and what a title or a preset is can be found there."""
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    parts = {"Suite": schema, **schema["$defs"]}
    assert {"ChainTask", "ReduceTask", "MathTask", "FileTask", "RuleEntry", "Scale", "Critic"} <= set(parts)
    for name, part in parts.items():
        for key, field in part["properties"].items():
            assert field.get("description"), f"{name}.{key}"
