"""One writer per run directory, on shared file systems too.

The lock is the file LOCK in the directory. It holds the host, the process and a random token, and its modification time is
renewed as a heartbeat. An age is the difference of two times of the same file system, so the clocks of hosts need not
agree. A lock is stale when its process is gone (same host) or its heartbeat has stopped. A stale lock is taken over. A
process that finds that its lock was taken over (it was suspended for long) ends at once, as if it were killed: everything
in this package survives that.
"""

import json
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cppo.system.files import writing
from cppo.system.interrupts import TRY_AGAIN

HEARTBEAT_SECONDS = 10.0
"""Seconds between two renewals."""
STALE_SECONDS = 120.0
"""Age in seconds of the last renewal from which a lock of another host is taken over."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the directory's lock for the block. The directory is made where it is missing.

    Raises ValueError, one line with host, process and heartbeat, when another living process holds it.
    """
    path, token = folder / "LOCK", secrets.token_hex(8)
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        while not _create(path, token):
            _take_over(path, token)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, token, stop), daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        if _owner(path).get("token") == token:
            path.unlink()


def _create(path: Path, token: str) -> bool:
    """Make the lock; False = there is one already. It gets its name when it is complete, by a link, which replaces nothing."""
    complete = path.with_name(f"LOCK.{token}")
    complete.write_text(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "token": token}))
    try:
        os.link(complete, path)
    except FileExistsError:
        return False
    finally:
        complete.unlink()
    return True


def _owner(path: Path) -> dict[str, object]:
    """Host, process and token in the lock; empty when it is gone or unreadable."""
    try:
        owner = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _take_over(path: Path, token: str) -> None:
    """Remove a stale lock. Raises ValueError when its owner lives."""
    owner, age = _owner(path), _age(path, token)
    if age is None:
        return  # released meanwhile
    same_host = owner.get("host") == socket.gethostname()
    stale = age > STALE_SECONDS or (same_host and not _alive(owner.get("process")))
    if not stale:
        raise ValueError(
            f"{path.parent}: process {owner.get('process')} on {owner.get('host')} is working on it (last heartbeat "
            f"{age:.0f} s ago); wait for it or stop it, and start again"
        )
    print(
        f"{path}: taking over from process {owner.get('process')} on {owner.get('host')}, which is gone",
        file=sys.stderr,
    )
    # Two processes may do this at once. The rename moves one file only, and whoever moved another's new lock puts it back.
    moved = path.with_name(f"LOCK.{token}.stale")
    try:
        os.rename(path, moved)
    except FileNotFoundError:
        return
    if _owner(moved) != owner:
        os.link(moved, path)
    moved.unlink()


def _age(path: Path, token: str) -> float | None:
    """Seconds since the last heartbeat, by the file system's own clock; None = the lock is gone."""
    now = path.with_name(f"LOCK.{token}.now")
    now.touch()
    try:
        return now.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return None
    finally:
        now.unlink()


def _alive(process: object) -> bool:
    """Whether a process with this id runs on this host."""
    if not isinstance(process, int):
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _beat(path: Path, token: str, stop: threading.Event) -> None:
    """Renew the lock until told to stop. End the process when the lock is another's."""
    while not stop.wait(HEARTBEAT_SECONDS):
        if _owner(path).get("token") != token:
            print(f"{path}: taken over by another process while this one was suspended; it ends", file=sys.stderr)
            os._exit(TRY_AGAIN)
        os.utime(path)
