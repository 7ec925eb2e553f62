"""A tiny suite made by the real command line, and digests to compare what runs left behind."""

import hashlib
import json
import shutil
from pathlib import Path

import yaml
from tiny import ROOT

from cppo.__main__ import main
from cppo.suite.config import RunConfig
from cppo.suite.suite import Suite, load_suite

RULES = ("cppo", "ppo")
"""The rule with most state in its streams, and the one with a critic."""


class Workshop:
    """A suite file and a root with its data and base model, copied for every trial."""

    def __init__(self, folder: Path, rules: tuple[str, ...]) -> None:
        raw = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
        raw["seeds"] = [0]
        raw["rules"] = [entry for entry in raw["rules"] if entry["name"] in rules]
        self.rules = rules
        tiny = raw["settings"]["tiny"]
        tiny |= {"iterations": 6, "checkpoint_every": 1}
        tiny["task"]["benchmarks"] = tiny["task"]["benchmarks"][:1]
        raw["evaluation"] = {"samples": 2}
        self.folder = folder
        self.file = folder / "faults.yaml"
        self.file.write_text(yaml.safe_dump(raw))
        self.suite: Suite = load_suite(self.file)
        self.clean = folder / "clean"
        for command in ("data", "base"):
            assert self.call(self.clean, command, "--setting", "tiny") == 0
        assert main(["evaluate", str(self.clean / self.suite.bases()[0].folder)]) == 0

    def call(self, root: Path, command: str, *arguments: str) -> int:
        """One command on the suite; its exit code."""
        return main([command, "--suite", str(self.file), "--root", str(root), *arguments])

    def run(self, rule: str) -> RunConfig:
        """The run of a rule."""
        return next(run for run in self.suite.runs() if run.rule_name == rule)

    def copy(self, name: str) -> Path:
        """A fresh root with data and base model."""
        return self.copy_to(self.folder / name)

    def copy_to(self, root: Path) -> Path:
        """A fresh root elsewhere."""
        shutil.copytree(self.clean, root)
        return root

    def everything(self, root: Path) -> list[list[str]]:
        """The commands that take a root from its base model to the suite's tables."""
        commands = []
        for rule in self.rules:
            run = self.run(rule)
            commands.append(["train", "--suite", str(self.file), "--root", str(root), "--run", run.id])
            commands.append(["evaluate", str(root / run.folder)])
        return [*commands, ["collect", "--suite", str(self.file), "--root", str(root)]]


def digests(root: Path) -> dict[str, str]:
    """Path -> SHA-256 of everything that must not depend on interruptions: all but clocks.

    Times are in timings.jsonl and the runs table. The commit may move meanwhile: the numerics version decides.
    """
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_dir() or path.name.startswith(("timings.", "runs.")) or path.parts[-2:-1] == ("data",):
            continue
        content = path.read_bytes()
        if path.name == "manifest.json":
            content = json.dumps({k: v for k, v in json.loads(content).items() if k != "info.json"}).encode()
        if path.name == "provenance.json":
            content = json.dumps({k: v for k, v in json.loads(content).items() if k != "commit"}).encode()
        if path.name == "info.json":
            info = json.loads(content)
            del info["streams"]["timings.jsonl"]
            content = json.dumps(info).encode()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def leftovers(root: Path) -> list[str]:
    """Locks and half-made files that nothing will remove."""
    return [
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.name.startswith("LOCK") or path.name.endswith(".partial")
    ]
