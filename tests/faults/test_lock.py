"""One writer per run directory."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from faults.kills import Reference, in_child

import cppo.system.lock
from cppo.__main__ import main
from cppo.system.interrupts import TRY_AGAIN
from cppo.system.lock import STALE_SECONDS, locked


def hold(folder: Path, beat: float = 10.0) -> int:
    """A child process that holds the lock until it is killed; its id, once it has it."""
    child = os.fork()
    if child == 0:
        cppo.system.lock.HEARTBEAT_SECONDS = beat
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with locked(folder):
            (folder / "held").touch()
            time.sleep(60)
        os._exit(0)
    while not (folder / "held").exists():
        time.sleep(0.01)
    return child


def end(child: int) -> int:
    """Kill a child; its exit code."""
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_the_second_writer_stops_with_one_line(whole: Reference, capsys: pytest.CaptureFixture[str]) -> None:
    root = whole.shop.copy("two-writers")
    child = hold(root / whole.shop.run("ppo").folder)
    try:
        assert main(whole.shop.everything(root)[0]) == 2
        err = capsys.readouterr().err
        assert f"process {child} on " in err and "is working on it (last heartbeat" in err and err.count("\n") == 1
    finally:
        end(child)


def test_a_killed_writers_lock_is_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    child = hold(tmp_path)
    end(child)
    with locked(tmp_path):
        assert json.loads((tmp_path / "LOCK").read_text())["process"] == os.getpid()
    assert f"taking over from process {child}" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["held"]


def test_another_hosts_lock_counts_while_its_heart_beats(tmp_path: Path) -> None:
    """Processes of another host cannot be asked; only the age of the lock on the shared file system tells."""
    lock = tmp_path / "LOCK"
    lock.write_text(json.dumps({"host": "elsewhere", "process": 1, "token": "a"}))
    with pytest.raises(ValueError, match="process 1 on elsewhere is working on it"), locked(tmp_path):
        pass
    past = time.time() - STALE_SECONDS - 5
    os.utime(lock, (past, past))
    with locked(tmp_path):
        assert json.loads(lock.read_text())["host"] != "elsewhere"


def test_the_heartbeat_renews_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cppo.system.lock, "HEARTBEAT_SECONDS", 0.02)
    with locked(tmp_path):
        past = time.time() - 1000
        os.utime(tmp_path / "LOCK", (past, past))
        deadline = time.monotonic() + 10
        while (tmp_path / "LOCK").stat().st_mtime < past + 500 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / "LOCK").stat().st_mtime > past + 500


def test_a_suspended_writer_whose_lock_was_taken_ends(tmp_path: Path) -> None:
    """Stopped for so long that another took over: when it wakes it ends, and leaves the other's lock alone."""
    child = hold(tmp_path, beat=0.05)
    os.kill(child, signal.SIGSTOP)
    past = time.time() - STALE_SECONDS - 5
    os.utime(tmp_path / "LOCK", (past, past))
    with locked(tmp_path):
        os.kill(child, signal.SIGCONT)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == TRY_AGAIN
        assert json.loads((tmp_path / "LOCK").read_text())["process"] == os.getpid()


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    lock = tmp_path / "LOCK"
    lock.write_text(json.dumps({"host": "elsewhere", "process": 1, "token": "a"}))
    past = time.time() - STALE_SECONDS - 5
    os.utime(lock, (past, past))
    start = time.time() + 0.3

    def compete() -> int:
        while time.time() < start:
            pass
        try:
            with locked(tmp_path):
                time.sleep(0.5)
        except ValueError:
            return 3
        return 0

    children = []
    for _ in range(6):
        child = os.fork()
        if child == 0:
            os._exit(compete())
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(codes) == [0, 3, 3, 3, 3, 3]


def test_the_lock_goes_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path):
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    assert in_child(lambda: 0) == 0  # the child helper reports codes faithfully
    assert in_child(lambda: 7) == 7
