"""Small models and configurations that several test files share."""

import shutil
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cppo.models.create import create_model, create_tokenizer
from cppo.objectives import names, objective
from cppo.suite.config import RunConfig
from cppo.suite.setting import Model
from cppo.suite.suite import Suite, load_suite
from cppo.tasks.chain import ChainTask
from cppo.tasks.types import SPECIAL

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
VOCABULARY = (*SPECIAL, *ChainTask.alphabet)
"""Token texts of the task family that the small models are made for."""


def chain_model(model: Model, setting_name: str = "test") -> PreTrainedModel:
    """A small model for the chain, with the weights of this setting's seed."""
    return create_model(model, setting_name, len(VOCABULARY))


def chain_tokenizer() -> PreTrainedTokenizerFast:
    """The chain's tokenizer."""
    return create_tokenizer(VOCABULARY)


def copy_checkout(folder: Path) -> None:
    """Copy the parts of the checkout that the workflow needs to `folder`."""
    for name in ("Snakefile", "environment.yml", "workflow", "config", "slurm", "cppo", "paper_figures", "results"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)


def smoke(folder: Path, **changes: Any) -> Suite:
    """The suite config/smoke.yaml with top-level keys replaced, written to `folder` and loaded."""
    raw = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({**raw, **changes}))
    return load_suite(path)


def run_of(suite: Suite, rule: str, seed: int = 0) -> RunConfig:
    """The suite's run of the rule of this name with this seed."""
    return next(run for run in suite.runs() if run.rule_name == rule and run.seed == seed)


VERL_SETTING: dict[str, Any] = {
    "title": "Qwen3-30B-A3B-Base",
    "model": {"name": "Qwen/Qwen3-30B-A3B-Base", "revision": "0" * 40},
    "task": {
        "family": "math",
        "train": {"name": "dapo_math_17k", "revision": "1" * 40, "rows": 1791700},
        "benchmarks": [{"name": "aime24", "revision": "2" * 40, "problems": 30}],
        "prompt": "chat",
        "instruction": "Put the final answer in \\boxed{}.",
        "max_prompt_tokens": 1024,
    },
    "rollout": {"prompts": 64, "responses": 8, "minibatch": 32, "max_response_tokens": 8192},
    "optimizer": {"lr": 1e-6, "warmup_updates": 10, "betas": [0.9, 0.95], "weight_decay": 0.1, "grad_clip": 0.5},
    "iterations": 200,
    "checkpoint_every": 10,
    "scale": {
        "trainer": "verl",
        "precision": "bfloat16",
        "sharding": "fsdp2",
        "micro_rows": 2,
        "gradient_checkpointing": True,
        "tensor_parallel": 4,
        "engine_memory": 0.6,
    },
}
"""The paper's largest setting, on four nodes."""
BINARY_TV = {"estimator": "binary", "kind": "tv"}


def verl_suite(
    folder: Path,
    setting: dict[str, Any] | None = None,
    resources: dict[str, Any] | None = None,
    rules: list[dict[str, Any]] | None = None,
) -> Suite:
    """A suite of one setting that verl trains; the keys given replace VERL_SETTING's and the default resources'."""
    default = [
        {
            "name": name,
            "objective": name,
            **({"divergence": BINARY_TV} if "divergence" in objective(name).needs else {}),
        }
        for name in names()
    ]
    raw = {
        "description": "verl",
        "seeds": [0, 1],
        "settings": {"moe": merged(VERL_SETTING, setting or {})},
        "evaluation": {"samples": 16},
        "rules": default if rules is None else rules,
        "resources": {"moe": {"gpus": 8, "nodes": 4, "cpus": 64, "memory_gb": 512.0, **(resources or {})}},
    }
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(raw))
    return load_suite(path)


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`old` with the keys of `new`, dicts key by key."""
    return old | {k: merged(old[k], v) if isinstance(v, dict) and k in old else v for k, v in new.items()}
