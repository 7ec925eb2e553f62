"""Faults injected for real: each gives one clear line, leaves the last state intact, and what is continued equals what was
never stopped."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.kills import Reference, in_child
from faults.workshop import digests
from tiny import ROOT

import cppo.training.run
import cppo.training.train
from cppo.__main__ import main
from cppo.system.interrupts import TRY_AGAIN
from cppo.training.train import Trainer


def finish(whole: Reference, root: Path) -> None:
    """Continue everything in `root` and compare it with the undisturbed root."""
    for command in whole.shop.everything(root):
        assert main(command) == 0
    assert digests(root) == whole.expected


def train(whole: Reference, root: Path) -> int:
    """The train command alone; its exit code."""
    return main(whole.shop.everything(root)[0])


def one_line(capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    """The last thing on standard error is one line of ours with these parts, without a traceback."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("cppo: ") and all(part in last for part in parts), last


def disturb(monkeypatch: pytest.MonkeyPatch, iteration: int, what: Callable[[Trainer], None]) -> None:
    """Call `what` when this iteration begins."""
    original = Trainer.step

    def step(self: Trainer) -> None:
        if self.iteration + 1 == iteration:
            what(self)
        original(self)

    monkeypatch.setattr(Trainer, "step", step)


# Signals ---------------------------------------------------------------------------------------------------------------


def test_sigterm_saves_at_the_iterations_end_and_exits_with_a_code_to_retry(
    whole: Reference, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = whole.shop.copy("sigterm")
    with monkeypatch.context() as patch:
        disturb(patch, 3, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        assert train(whole, root) == TRY_AGAIN
    one_line(capsys, "stopped by SIGTERM after iteration 3", "the same command continues it")
    assert (root / whole.shop.run("ppo").folder / "state" / "000003").is_dir()
    finish(whole, root)


def test_sigterm_to_every_process_of_a_real_job(whole: Reference) -> None:
    """As Slurm does it: the signal goes to the whole group, the answer-judging child included."""
    root = whole.shop.copy("group")
    command = [sys.executable, "-m", "cppo", *whole.shop.everything(root)[0]]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(command, cwd=ROOT, env=one_thread, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = root / whole.shop.run("ppo").folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(job.pid, signal.SIGTERM)
    _, err = job.communicate(timeout=60)
    # A run this small may have finished before the signal came; then there is nothing to say.
    assert (job.returncode == TRY_AGAIN and "stopped by SIGTERM" in err) or job.returncode == 0, err
    finish(whole, root)


def test_a_time_limit_that_kills_in_mid_iteration_loses_only_that_iteration(
    whole: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM, then SIGKILL before the iteration's end: the state of the iteration before it stands."""
    root = whole.shop.copy("limit")

    def killed() -> int:
        def strike(_: Trainer) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGKILL)

        with monkeypatch.context() as patch:
            disturb(patch, 4, strike)
            return train(whole, root)

    assert in_child(killed) == -signal.SIGKILL
    assert (root / whole.shop.run("ppo").folder / "state" / "000003").is_dir()
    finish(whole, root)


def test_ctrl_c_is_one_line(
    whole: Reference, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = whole.shop.copy("ctrl-c")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest's workers ignore it
    with monkeypatch.context() as patch:
        disturb(patch, 3, lambda _: signal.raise_signal(signal.SIGINT))
        assert train(whole, root) == 130
    signal.signal(signal.SIGINT, before)
    one_line(capsys, "interrupted; the same command continues")
    finish(whole, root)


# Disk and memory ---------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of 16 MiB at `folder`."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no mount here: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(ballast: Path) -> None:
    """To the last block: not even the streams can grow."""
    with ballast.open("wb", buffering=0) as out, pytest.raises(OSError, match="No space left"):
        while True:
            out.write(b"\0" * 2**16)


def nearly_fill(ballast: Path) -> None:
    """Room for the streams, not for a checkpoint's weights."""
    disk = os.statvfs(ballast.parent)
    ballast.write_bytes(b"\0" * (disk.f_bavail * disk.f_frsize - 48 * 1024))


@pytest.mark.parametrize("filled", [fill, nearly_fill])
def test_a_full_disk_is_one_line_and_the_run_continues_when_there_is_room(
    filled: Callable[[Path], None],
    whole: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No half-made file or folder stays, to keep the full disk full."""
    with small_disk(tmp_path / "disk"):
        root = whole.shop.copy_to(tmp_path / "disk" / "root")
        ballast = tmp_path / "disk" / "ballast"
        with monkeypatch.context() as patch:
            disturb(patch, 3, lambda _: filled(ballast))
            assert train(whole, root) == 2
        one_line(capsys, str(root), "cannot be written (", "No space left on device")
        assert not list(root.rglob("*.partial"))
        ballast.unlink()
        finish(whole, root)


def test_a_folder_that_cannot_be_written(whole: Reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_disk(tmp_path / "disk"):
        root = whole.shop.copy_to(tmp_path / "disk" / "root")
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        assert train(whole, root) == 2
        one_line(capsys, str(root), "cannot be written (Read-only file system)", "fix the permissions")
        subprocess.run(["mount", "-o", "remount,rw", str(tmp_path / "disk")], check=True)
        finish(whole, root)


def test_out_of_memory_in_a_minibatch(
    whole: Reference, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PyTorch's allocator really refuses: a tensor of four tebibytes beside the third iteration's forward pass."""
    root = whole.shop.copy("memory")
    original = cppo.training.train.token_logprobs

    with monkeypatch.context() as patch:

        def greedy(*args: Any, **kwargs: Any) -> Any:
            torch.empty(2**40)
            return original(*args, **kwargs)

        disturb(patch, 3, lambda _: patch.setattr(cppo.training.train, "token_logprobs", greedy))
        assert train(whole, root) == 2
    one_line(
        capsys, str(root), "out of memory in iteration 3", "scale.micro_rows", "continues from the last saved state"
    )
    finish(whole, root)


def test_another_runtime_error_is_not_called_out_of_memory(whole: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    root = whole.shop.copy("bug")

    def bug(_: Trainer) -> None:
        torch.zeros(2) @ torch.zeros(3)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="size"):
        disturb(patch, 2, bug)
        train(whole, root)
    finish(whole, root)


# Damage -----------------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def half_a_line(path: Path) -> None:
    with path.open("a") as out:
        out.write('{"iteration": 4, "ent')


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str | None]] = {
    "truncated weights": ("state/000003/policy.safetensors", truncate, "policy.safetensors: damaged"),
    "flipped bit in weights": ("state/000003/policy.safetensors", flip, "policy.safetensors: damaged"),
    "flipped bit in optimizer": ("state/000003/optimizer.safetensors", flip, "optimizer.safetensors: damaged"),
    "missing critic": ("state/000003/critic.safetensors", Path.unlink, "critic.safetensors: missing"),
    "truncated counters": ("state/000003/info.json", truncate, "info.json: damaged"),
    "truncated manifest": ("state/000003/manifest.json", truncate, "manifest.json: missing or unreadable"),
    "missing manifest": ("state/000003/manifest.json", Path.unlink, "manifest.json: missing or unreadable"),
    "metrics cut short": (
        "metrics.jsonl",
        lambda p: os.truncate(p, p.stat().st_size - 9),
        "metrics.jsonl: shorter than",
    ),
    "half-written metrics line": ("metrics.jsonl", half_a_line, None),
}
"""What is damaged after iteration 3, how, and the line about it; None = what is beyond the state is cut off silently."""


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_falls_back_to_the_state_before_it_and_says_so(
    kind: str, whole: Reference, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, damage, message = DAMAGE[kind]
    root = whole.shop.copy(f"damage-{kind.replace(' ', '-')}")
    folder = root / whole.shop.run("ppo").folder
    with monkeypatch.context() as patch:
        disturb(patch, 3, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        assert train(whole, root) == TRY_AGAIN
    damage(folder / file)
    capsys.readouterr()
    finish(whole, root)
    out = capsys.readouterr().err
    assert f"continuing after iteration {2 if message else 3}" in out
    if message is not None:
        (line,) = (line for line in out.splitlines() if message in line)
        assert str(folder) in line and line.endswith("falling back to the state before it")


def test_damage_everywhere_is_refused(
    whole: Reference, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flipped bit in the rows that every state counts on: nothing to fall back to, and nothing is computed."""
    root = whole.shop.copy("everywhere")
    folder = root / whole.shop.run("ppo").folder
    with monkeypatch.context() as patch:
        disturb(patch, 3, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        assert train(whole, root) == TRY_AGAIN
    content = bytearray((folder / "metrics.jsonl").read_bytes())
    content[5] ^= 1
    (folder / "metrics.jsonl").write_bytes(content)
    before = digests(root)
    assert train(whole, root) == 2
    one_line(capsys, "every saved state is damaged", "metrics.jsonl: damaged", "delete the run's folder to start again")
    assert digests(root) == before


def test_a_damaged_base_model_is_one_line(whole: Reference, capsys: pytest.CaptureFixture[str]) -> None:
    root = whole.shop.copy("base")
    weights = root / whole.shop.run("ppo").base.folder / "checkpoints" / "iteration-0" / "model.safetensors"
    truncate(weights)
    assert train(whole, root) == 2
    one_line(capsys, "iteration-0", "not a loadable checkpoint")


def test_a_run_is_not_continued_by_another_numerics_version_or_other_packages(
    whole: Reference, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = whole.shop.copy("other-code")
    with monkeypatch.context() as patch:
        disturb(patch, 3, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        assert train(whole, root) == TRY_AGAIN
    with monkeypatch.context() as patch:
        patch.setattr("cppo.results.run_folder.NUMERICS_VERSION", 99)
        assert train(whole, root) == 2
    one_line(capsys, "it was made by numerics version 1, this code has version 99", "run `snakemake`, or delete")
    with monkeypatch.context() as patch:
        now = cppo.training.run.provenance()
        patch.setattr("cppo.training.run.provenance", lambda: now | {"torch": "0.0.1"})
        assert train(whole, root) == 2
    one_line(
        capsys, "it was begun with torch", "this is 0.0.1; go back to that version to finish it, or delete the folder"
    )
    finish(whole, root)
