"""One writer a run directory, on shared file systems too.

The lock is the file LOCK in the directory: host, process and a random token, made with O_EXCL, its modification time
renewed as a heartbeat. Ages are differences of two times of the same file system, so clocks of hosts need not agree. A lock
is stale when its process is gone (same host) or its heartbeat stopped; then it is taken over. A process that finds that its
lock was taken over (it was suspended for long) ends at once, as if killed: everything here survives that.
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
"""Time between two renewals."""
STALE_SECONDS = 120.0
"""Age of the last renewal from which a lock of another host is taken over."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the directory's lock for the block; the directory is made.

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
    """Make the lock; False = there is one. It gets its name when it is whole, by a link, which fails where one exists."""
    own = path.with_name(f"LOCK.{token}")
    own.write_text(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "token": token}))
    try:
        os.link(own, path)
    except FileExistsError:
        return False
    finally:
        own.unlink()
    return True


def _owner(path: Path) -> dict[str, object]:
    """Host, process and token in the lock; empty when it is gone or unreadable."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _take_over(path: Path, token: str) -> None:
    """Remove a stale lock. Raises ValueError when its owner lives."""
    owner, age = _owner(path), _age(path, token)
    if age is None:
        return  # released meanwhile
    here = owner.get("host") == socket.gethostname()
    stale = age > STALE_SECONDS or (here and not _alive(owner.get("process")))
    if not stale:
        raise ValueError(
            f"{path.parent}: process {owner.get('process')} on {owner.get('host')} is working on it (last heartbeat "
            f"{age:.0f} s ago); wait for it or stop it, and start again"
        )
    print(f"{path}: taking over from process {owner.get('process')} on {owner.get('host')}, gone", file=sys.stderr)
    # Two may do this at once: the rename moves one file, and who moved another's new lock puts it back.
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
    """Whether a process of this host runs."""
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
    """Renew the lock until told to stop; end the process when the lock is another's."""
    while not stop.wait(HEARTBEAT_SECONDS):
        if _owner(path).get("token") != token:
            print(f"{path}: taken over by another process while this one was suspended; it ends", file=sys.stderr)
            os._exit(TRY_AGAIN)
        os.utime(path)
