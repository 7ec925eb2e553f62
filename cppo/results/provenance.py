"""Which code, packages and machine a run's numbers come from."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

from cppo.numerics import NUMERICS_VERSION

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "lm-eval", "math-verify", "sympy")
"""Packages whose versions are recorded: those that numbers pass through."""


def commit() -> str:
    """The checkout's git commit, with -dirty for uncommitted changes; "unknown" outside a checkout."""
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return git.stdout.strip()


def provenance() -> dict[str, str]:
    """The numerics version, the commit, Python, the machine's type and package versions; no host name, path or time."""
    versions = {
        "numerics": str(NUMERICS_VERSION),
        "commit": commit(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    return versions | {name: importlib.metadata.version(name) for name in PACKAGES}
