"""Atomic writes: a file or a folder is either complete or absent.

Each is made beside its final name, flushed to the disk, then renamed. A process that is killed at any moment leaves the old
content, the new content, or neither with a `.partial` beside it, which the next attempt removes. A full disk or a folder
without permission is a ValueError of one line, and the old content stays.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

PARTIAL = ".partial"
"""Ending of the name of what is not complete yet."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write `path` into a ValueError that names the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ValueError(
            f"{path}: cannot be written ({reason}); free some space or fix the permissions, then start again: "
            "the command continues from what is already saved"
        ) from None


def partial_path(path: Path) -> Path:
    """Where `path` is made before it gets its name."""
    return path.with_name(path.name + PARTIAL)


def write_atomic(path: Path, text: str) -> None:
    """Write a text file, complete or not at all. Its folder is made where it is missing."""
    partial = partial_path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8", newline="") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, path)
        _flush(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill. It becomes `path`, replacing an old one, when the block ends without an error."""
    partial = partial_path(path)
    with writing(path):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            yield partial
            for item in (*partial.iterdir(), partial):
                _flush(item)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(partial, path)
            _flush(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # a half-written one would keep a full disk full


def _flush(path: Path) -> None:
    """Wait until the file or folder is on the disk, not only in memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError naming the file when it is missing or damaged, or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise ValueError(f"{path}: missing or not JSON; make it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object; make it again")
    return content


def sha256(path: Path, size: int | None = None) -> str:
    """The SHA-256, in hex digits, of the file's first `size` bytes; None = of all bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as source:
        left = path.stat().st_size if size is None else size
        while left > 0 and (piece := source.read(min(left, 2**20))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()
