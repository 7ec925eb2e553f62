"""The workflow through a real Slurm of one node (onenode.sh): the smoke suite, and training jobs that Slurm ends early.

It needs Debian's apt-get, for Slurm itself, and no root. It is not part of `make test`: run `make test-slurm`.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from tiny import ROOT, copy_checkout

from cppo.suite.config import RunConfig
from cppo.suite.suite import load_suite

pytestmark = pytest.mark.skipif(shutil.which("apt-get") is None, reason="Slurm's packages come from Debian's apt-get")

SCRIPT = str(ROOT / "tests" / "slurm" / "onenode.sh")
SNAKEMAKE = [sys.executable, "-m", "snakemake", "--cores", "all", "--profile", "slurm"]
# The jobs are short and on one machine: look at them more often, and wait for no network file system.
SNAKEMAKE += ["--slurm-init-seconds-before-status-checks", "5", "--latency-wait", "5"]
DAWDLING = '''
"""PG that takes its time, so that a test can interrupt it."""

import os
import time
from dataclasses import dataclass

import torch

from cppo.objectives import Terms, Tokens, register
from cppo.objectives.ratio import hard_gate, log_ratio


@dataclass(frozen=True)
class Dawdle:
    """No parameters."""


@register()
def dawdle(cfg: Dawdle, tokens: Tokens) -> Terms:
    """`pg` and a nap."""
    time.sleep(float(os.environ["NAP"]))
    return hard_gate(tokens.advantages * log_ratio(tokens).exp(), torch.ones_like(tokens.mask))
'''
NAP = 0.5
ITERATIONS = 60
"""Iterations of a run: with about two naps each, they take more than the limit of one minute allows."""


class Cluster:
    """The questions that the tests ask Slurm."""

    def __init__(self, folder: Path) -> None:
        self.environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def ask(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True).stdout

    def jobs(self, rule: str) -> list[tuple[str, str]]:
        """Slurm's id and state of every job of the rule (and of wildcards that follow its name) so far, in order."""
        lines = self.ask("squeue", "--states=all", "--noheader", "--sort=i", "--format=%i|%T|%k").splitlines()
        found = [line.split("|") for line in lines]
        return [(job, state) for job, state, comment in found if comment.startswith(f"rule_{rule}")]

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says about a job."""
        fields = self.ask("scontrol", "show", "job", number).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def snakemake(
        self, checkout: Path, suite: str, *targets: str, watch: Callable[[], None] = lambda: None
    ) -> tuple[int, str]:
        """Exit code and output; `watch` is called about once a second."""
        output = checkout / f"{suite}.txt"
        with output.open("w") as out:
            command = [*SNAKEMAKE, "--config", f"suite={suite}", "--", *targets]
            process = subprocess.Popen(
                command, cwd=checkout, stdout=out, stderr=subprocess.STDOUT, env=self.environment | {"NAP": str(NAP)}
            )
            try:
                while process.poll() is None:
                    watch()
                    time.sleep(1)
            finally:
                process.send_signal(signal.SIGINT)  # where a test failed: snakemake cancels its jobs
                process.wait()
        return process.returncode, output.read_text()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([SCRIPT, "start", str(folder)], check=True)
    try:
        yield Cluster(folder)
    finally:
        subprocess.run([SCRIPT, "stop", str(folder)], check=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with a suite of two settings: one run will be cancelled, the other is given too little time."""
    folder = tmp_path_factory.mktemp("checkout")
    copy_checkout(folder)
    (folder / "dawdling.py").write_text(DAWDLING)
    suite = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    # There is one checkpoint, at the end: a job that continues does so from what was saved at SIGTERM.
    tiny = suite["settings"]["tiny"] | {"iterations": ITERATIONS, "checkpoint_every": ITERATIONS}
    suite |= {
        "seeds": [0],
        "settings": {"cancelled": tiny, "limited": tiny},
        "rules": [{"name": "dawdle", "objective": "dawdling:dawdle"}],
        "resources": {"cancelled": {"gpus": 2, "cpus": 2}, "limited": {"hours": 1 / 60}},
    }
    (folder / "config" / "interrupted.yaml").write_text(yaml.safe_dump(suite))
    return folder


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def uninterrupted(checkout: Path, run: RunConfig, processes: int) -> bytes:
    """The metrics of the run when nothing stops it, without Slurm, by as many processes, for their number changes rounding."""
    for part in (run.base.folder, run.base.data):
        shutil.copytree(checkout / "runs" / part, checkout / "alone" / part)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, "-m", "--"]
    command += ["cppo", "train", "--suite", "config/interrupted.yaml", "--root", "alone"]
    environment = os.environ | {"NAP": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "--run", run.id], cwd=checkout, check=True, env=environment)
    return (checkout / "alone" / run.folder / "metrics.jsonl").read_bytes()


def test_jobs_that_slurm_ends_are_retried_and_resume(
    cluster: Cluster, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(checkout)
    runs = {run.setting_name: run for run in load_suite(checkout / "config" / "interrupted.yaml").runs()}
    folders = {setting: checkout / "runs" / run.folder for setting, run in runs.items()}
    comments = {setting: f"train_wildcards_{run.rule_name}_{run.id}" for setting, run in runs.items()}
    cancelled: list[str] = []

    def cancel() -> None:
        if not cancelled and lines(folders["cancelled"] / "metrics.jsonl") >= 5:
            ((job, state),) = cluster.jobs(comments["cancelled"])
            assert state == "RUNNING"
            cluster.ask("scancel", job)
            cancelled.append(job)

    targets = [f"runs/{run.folder}/DONE" for run in runs.values()]
    targets.append(f"runs/{runs['cancelled'].folder}/scores.csv")
    code, output = cluster.snakemake(checkout, "interrupted", *targets, watch=cancel)
    assert code == 0, output[-5000:]

    processes = {"cancelled": 2, "limited": 1}
    # Each job was ended at least once, and its last attempt continued.
    for setting, run in runs.items():
        *ended, last = cluster.jobs(comments[setting])
        print(setting, [state for _, state in ended], last)
        assert ended and last[1] == "COMPLETED", (setting, ended, last)
        log = (checkout / "runs" / "logs" / "train" / f"{run.rule_name}-{run.id}.log").read_text()
        assert f"{run.folder}: continuing after iteration " in log, log[-2000:]
        assert (folders[setting] / "metrics.jsonl").read_bytes() == uninterrupted(checkout, run, processes[setting])
    assert cancelled == [job for job, state in cluster.jobs(comments["cancelled"]) if state == "CANCELLED"]

    # What was asked for is what the suite says: two GPUs to train, one to evaluate.
    train, limited = (cluster.job(cluster.jobs(comments[setting])[0][0]) for setting in ("cancelled", "limited"))
    assert train["TresPerJob"] == "gres:gpu:2" and train["TimeLimit"] == "01:00:00" and train["CPUs/Task"] == "2"
    assert "TresPerJob" not in limited and limited["TimeLimit"] == "00:01:00" and limited["CPUs/Task"] == "1"
    evaluate = cluster.job(cluster.jobs("evaluate_wildcards")[0][0])
    assert evaluate["TresPerJob"] == "gres:gpu:1"


def test_the_smoke_suite(cluster: Cluster, checkout: Path) -> None:
    code, output = cluster.snakemake(checkout, "smoke", "all")
    assert code == 0, output[-5000:]
    suite = load_suite(checkout / "config" / "smoke.yaml")
    expected = {run.id for run in suite.runs()}
    for rule in ("train", "evaluate"):
        done = [cluster.job(job)["Comment"] for job, state in cluster.jobs(f"{rule}_wildcards") if state == "COMPLETED"]
        assert expected <= {comment.split("_")[-1] for comment in done}
    assert (checkout / "runs" / "smoke" / "figures" / "table1.md").stat().st_size > 0
