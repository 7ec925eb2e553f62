"""Small models and configurations that several test files share."""

import shutil
from pathlib import Path
from typing import Any

import yaml

from cppo.config import Model, RunConfig, Suite, load_suite

ROOT = Path(__file__).resolve().parent.parent
DENSE = Model(hidden_size=16, layers=2, heads=2, kv_heads=1, head_dim=8, intermediate_size=32)
MOE = Model(
    architecture="qwen3_moe",
    hidden_size=16,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=8,
    intermediate_size=16,
    experts=4,
    experts_per_token=2,
)


def copy_checkout(folder: Path) -> None:
    """What the workflow needs of the checkout, copied to `folder`."""
    for name in ("Snakefile", "environment.yml", "workflow", "config", "slurm", "cppo", "paper_figures", "results"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)


def smoke(folder: Path, **changes: Any) -> Suite:
    """config/smoke.yaml with top-level keys replaced, written to `folder` and loaded."""
    raw = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({**raw, **changes}))
    return load_suite(path)


def run_of(suite: Suite, label: str, seed: int = 0) -> RunConfig:
    """The suite's run of this label and seed."""
    return next(run for run in suite.runs() if run.label == label and run.seed == seed)
