"""Regenerate constraints/main.txt and environment.yml: resolve pyproject.toml afresh and pin what came out.

    python constraints/lock.py                # newest versions that pyproject.toml's ranges allow (torch as pinned below)
    python constraints/lock.py --keep         # keep every current pin that still fits, add only what is new

Takes minutes: it installs everything into a temporary environment. torch is pinned by its public version, without local
label and without CUDA packages, so that pip takes the CPU wheel where one is offered and the CUDA build on a GPU machine.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAIN = ROOT / "constraints" / "main.txt"
TORCH = "torch==2.13.0"
# Come with a CUDA build of torch only, are this package, or belong to the environment's maker.
LEFT_OUT = re.compile(r"(nvidia-|cuda-|triton|cppo-bench|(pip|setuptools|wheel)==)", re.IGNORECASE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="constrain by the present pins")
    keep = ["-c", str(MAIN)] if parser.parse_args().keep else []
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", *keep, TORCH, f"{ROOT}[dev,trl]"], check=True)
        freeze = [python, "-m", "pip", "freeze", "--all"]
        done = subprocess.run(freeze, check=True, capture_output=True, text=True)
    write(pins(done.stdout))


def pins(frozen: str) -> list[str]:
    """The lines of `pip freeze` that belong into a constraints file, without local version labels."""
    lines = [re.sub(r"\+\S+$", "", line) for line in frozen.splitlines() if re.match(r"[\w.-]+==", line)]
    return sorted((line for line in lines if not LEFT_OUT.match(line)), key=str.lower)


def environment(pinned: list[str]) -> str:
    """environment.yml with the same pins."""
    head = (
        "# For conda users: conda env create -f environment.yml && conda activate cppo-bench && pip install --no-deps -e .\n"
        "# Written by constraints/lock.py from the pins of constraints/main.txt.\n"
        "name: cppo-bench\nchannels: [conda-forge]\ndependencies:\n  - python=3.11\n  - pip\n  - pip:\n"
    )
    return head + "".join(f"      - {pin}\n" for pin in pinned)


def write(pinned: list[str]) -> None:
    """Both files."""
    MAIN.write_text("# Written by constraints/lock.py; do not edit.\n" + "".join(f"{pin}\n" for pin in pinned))
    (ROOT / "environment.yml").write_text(environment(pinned))


if __name__ == "__main__":
    sys.exit(main())
