"""Which code, packages and machine a number comes from."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

from cppo.numerics import NUMERICS_VERSION

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "lm-eval", "math-verify", "sympy")


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
    """Numerics version, commit, Python, machine type and package versions; no host name, path or time."""
    found = {
        "numerics": str(NUMERICS_VERSION),
        "commit": commit(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    return found | {name: importlib.metadata.version(name) for name in PACKAGES}
