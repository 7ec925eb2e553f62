"""Training state on disk: complete or absent, checked when it is read, never unpickled.

A state is a folder of safetensors files and one JSON file, with a manifest of SHA-256 sums. The last two states are kept, so
that a damaged one has a predecessor. The streams (JSON lines that only grow) are not copied: the state holds how many bytes
of each belong to it, with their SHA-256.
"""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from cppo.system.files import atomic_folder, sha256, writing

STATES_KEPT = 2
"""How many of the newest states are kept."""


def save_state(
    root: Path, iteration: int, tensors: dict[str, dict[str, Tensor]], info: dict[str, Any], streams: Iterable[Path]
) -> None:
    """Write the state of `iteration` under `root` and drop all but the last two.

    tensors: file name (without ending) -> tensors; info: anything that JSON can hold; streams: files that only grow.
    """
    with atomic_folder(root / f"{iteration:06d}") as folder:
        for name, content in tensors.items():
            save_file({k: v.contiguous() for k, v in content.items()}, folder / f"{name}.safetensors")
        sizes = {path.name: [path.stat().st_size, sha256(path)] for path in streams}
        (folder / "info.json").write_text(json.dumps({"info": info, "streams": sizes}))
        manifest = {p.name: sha256(p) for p in sorted(folder.iterdir())}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    for old in _states(root)[:-STATES_KEPT]:
        shutil.rmtree(old)


def load_latest(
    root: Path, streams: Iterable[Path]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], list[str]] | None:
    """The newest undamaged state (tensors, info), and a line for each damaged one that was passed over; None = no state.

    The streams are cut back to what belongs to the state. Without a state they are emptied.
    Raises ValueError when there are states and all are damaged: training from the start would repeat work without a word.
    """
    streams, damaged = list(streams), list[str]()
    for folder in reversed(_states(root)):
        problem = _damage(folder, streams)
        if problem is None:
            saved = json.loads((folder / "info.json").read_text())
            _cut(streams, {name: size for name, (size, _) in saved["streams"].items()})
            tensors = {p.stem: load_file(p) for p in sorted(folder.glob("*.safetensors"))}
            return tensors, saved["info"], damaged
        damaged.append(f"{problem}; falling back to the state before it")
    if damaged:
        first = damaged[0].split(";")[0]
        raise ValueError(f"{root}: every saved state is damaged ({first}); delete the run's folder to start again")
    _cut(streams, {})
    return None


def _cut(streams: Iterable[Path], sizes: dict[str, int]) -> None:
    """Drop from the streams what was written after the state."""
    for path in streams:
        with writing(path):
            path.touch()
            os.truncate(path, sizes.get(path.name, 0))


def _states(root: Path) -> list[Path]:
    return sorted(p for p in root.glob("*") if p.is_dir() and p.name.isdigit())


def _damage(folder: Path, streams: Iterable[Path]) -> str | None:
    """What is wrong with a state or with its share of the streams, in one line; None = nothing."""
    manifest = folder / "manifest.json"
    try:
        sums = json.loads(manifest.read_text())
    except (OSError, ValueError):
        return f"{manifest}: missing or unreadable"
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            return f"{path}: missing"
        if sha256(path) != expected:
            return f"{path}: damaged (its SHA-256 differs from the manifest's)"
    for path in streams:
        size, expected = json.loads((folder / "info.json").read_text())["streams"][path.name]
        if not path.is_file() or path.stat().st_size < size:
            return f"{path}: shorter than the {size} bytes of state {folder.name}"
        if sha256(path, size) != expected:
            return f"{path}: damaged (its first {size} bytes are not those of state {folder.name})"
    return None
