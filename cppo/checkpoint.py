"""Training state on disk: whole or absent, checked when read, never unpickled.

A state is a folder of safetensors files and one JSON file, with a manifest of SHA-256 sums. It is written beside its final
name, flushed to the disk and renamed; the last two are kept, so a damaged one has a predecessor to fall back to.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

KEPT = 2


def save_state(root: Path, iteration: int, tensors: dict[str, dict[str, Tensor]], info: dict[str, Any]) -> None:
    """Write the state of `iteration` under `root` and drop all but the last two.

    tensors: file name (without ending) -> tensors; info: anything that JSON can hold.
    """
    final, partial = root / f"{iteration:06d}", root / f"{iteration:06d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, content in tensors.items():
        save_file({k: v.contiguous() for k, v in content.items()}, partial / f"{name}.safetensors")
    (partial / "info.json").write_text(json.dumps(info))
    manifest = {p.name: _sha256(p) for p in sorted(partial.iterdir())}
    (partial / "manifest.json").write_text(json.dumps(manifest))
    for path in (*partial.iterdir(), partial):
        _flush(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    _flush(root)
    for old in _states(root)[:-KEPT]:
        shutil.rmtree(old)


def load_latest(root: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], list[str]] | None:
    """The newest undamaged state (tensors, info) and a line for each damaged one that was passed over; None = no state.

    Raises ValueError when there are states and all are damaged: training from the start would silently repeat work.
    """
    states = _states(root)
    damaged: list[str] = []
    for folder in reversed(states):
        problem = _damage(folder)
        if problem is None:
            tensors = {p.stem: load_file(p) for p in sorted(folder.glob("*.safetensors"))}
            return tensors, json.loads((folder / "info.json").read_text()), damaged
        damaged.append(f"{problem}; falling back to the state before it")
    if damaged:
        first = damaged[0].split(";")[0]
        raise ValueError(f"{root}: every saved state is damaged ({first}); delete the run's folder to start again")
    return None


def _states(root: Path) -> list[Path]:
    return sorted(p for p in root.glob("*") if p.is_dir() and p.name.isdigit())


def _damage(folder: Path) -> str | None:
    """What is wrong with a state, in one line; None = nothing."""
    manifest = folder / "manifest.json"
    try:
        sums = json.loads(manifest.read_text())
    except (OSError, ValueError):
        return f"{manifest}: missing or unreadable"
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            return f"{path}: missing"
        if _sha256(path) != expected:
            return f"{path}: damaged (its SHA-256 differs from the manifest's)"
    return None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's per-parameter state as flat tensors, "<parameter>.<name>"."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": value for i, entries in state.items() for name, value in entries.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the tensors of `optimizer_tensors` back into an optimiser over the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
