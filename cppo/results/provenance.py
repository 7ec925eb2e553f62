"""Which code, packages and files a number comes from."""

import hashlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

# Numbers depend on these parts of the package; plotting, tables and the command line are not among them.
NUMERIC = (
    "problems.py datasets.py prompts.py seeds.py policy.py rollout rewards.py verify_worker.py advantages.py critic.py"
    " distributed.py batches.py divergences.py objectives loss.py diagnostics.py checkpoint.py train.py base.py lm_task.py"
    " evaluate.py"
).split()
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "lm-eval", "math-verify", "sympy")


def code_version() -> str:
    """Ten hex digits of the SHA-256 of the modules that numbers depend on."""
    return hash_files(Path(__file__).parent, NUMERIC)


def hash_files(root: Path, names: Iterable[str]) -> str:
    """One hash over these files, and the .py files in these folders, by name and content."""
    digest = hashlib.sha256()
    for name in names:
        path = root / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:10]


def commit() -> str:
    """The checkout's git commit, with -dirty for uncommitted changes; "unknown" outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def provenance() -> dict[str, str]:
    """Code version, commit, Python, machine type and package versions; no host name, path or time."""
    found = {
        "code_version": code_version(),
        "commit": commit(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    return found | {name: importlib.metadata.version(name) for name in PACKAGES}
