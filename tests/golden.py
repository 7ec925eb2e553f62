"""Golden traces: the numbers that this version of the code makes, stored in golden/. `python tests/golden.py --write`

A trace is a short run, a loss on a fixed batch, or another small computation. `test_golden.py` makes each of them again and
compares it with what is stored, so that a change which moves numbers cannot pass unnoticed. When a change is meant to move
them: raise `NUMERICS_VERSION` in cppo/numerics.py, say there what moved, and write the traces again with the command above.
It writes moved traces under a raised version only; traces that are new may be added at any time.

Runs begin from stored weights, so that they hold no rounding of a warm start. Delete a file of weights to have it trained
anew.

Legend: B responses, T tokens.
"""

import argparse
import hashlib
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from fixture import AGGREGATIONS, HORIZON, random_tokens
from mathematics import make_tokenizer, raw_suite, write_data, write_suite
from safetensors.torch import load_model, save_model
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from cppo import advantages
from cppo.evaluation.evaluate import evaluate, read_scores
from cppo.evaluation.lm_eval_task import write_tasks
from cppo.integrations import SampledTokenLoss
from cppo.loss import Aggregation
from cppo.models.create import create_model, create_tokenizer
from cppo.models.load import load_pretrained, save_pretrained
from cppo.numerics import NUMERICS_VERSION
from cppo.objectives import Tokens, names, objective
from cppo.results.run_folder import RunFolder
from cppo.rewards import Judge
from cppo.rollout.torch_engine import TorchEngine
from cppo.suite.config import BaseConfig, Model, RunConfig
from cppo.suite.suite import Suite, load_suite
from cppo.tasks.types import GeneratedTask, write_problems
from cppo.training.base_model import make_base
from cppo.training.critic import ValueModel
from cppo.training.distributed import make_accelerator
from cppo.training.train import Trainer

FOLDER = Path(__file__).resolve().parent / "golden"
RELATIVE, ABSOLUTE = 1e-4, 1e-6
"""How far a number may be from its stored value: other processors round differently."""
ITERATIONS = 2
REMEDY = (
    "a change moved numbers. If it should not have: mend it. If it should: raise NUMERICS_VERSION in cppo/numerics.py, say "
    "there what moved, and run `python tests/golden.py --write`"
)
"""What to do about a difference."""

# Settings and rules ---------------------------------------------------------------------------------------------------

SETTING: dict[str, Any] = {
    "title": "Golden",
    "model": {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "intermediate_size": 32},
    "warm_start": {"max_steps": 2000, "target_accuracy": 0.2, "check_every": 20, "batch": 64, "lr": 1e-2},
    "rollout": {"prompts": 8, "responses": 4, "minibatch": 4, "max_response_tokens": 24},
    "optimizer": {"lr": 5e-3, "warmup_updates": 1},
    "iterations": ITERATIONS,
    "checkpoint_every": ITERATIONS,
}
CHAIN = {
    "family": "chain",
    "sizes": [1, 2],
    "problems": 64,
    "weak": 0.25,
    "benchmarks": [{"name": "chain1", "size": 1, "problems": 4}, {"name": "chain2", "size": 2, "problems": 4}],
}
REDUCE = {
    "family": "reduce",
    "sizes": [2, 3],
    "problems": 64,
    "weak": 0.25,
    "benchmarks": [{"name": "reduce2", "size": 2, "problems": 4}, {"name": "reduce3", "size": 3, "problems": 4}],
}
SETTINGS: dict[str, dict[str, Any]] = {
    "chain": SETTING | {"task": CHAIN},
    "reduce": SETTING | {"task": REDUCE},
    # DAPO's shaping and dynamic sampling.
    "shaped": SETTING | {"task": CHAIN, "rollout": SETTING["rollout"] | {"overlong_buffer": 12, "resample": 1}},
}
WEIGHTS = {"chain": "chain", "reduce": "reduce", "shaped": "chain"}
"""Setting -> name of the stored weights that its runs begin from."""

BINARY, EXACT = {"estimator": "binary"}, {"estimator": "exact"}
TOP4 = {"estimator": "top_k", "k": 4}
TIGHT = {"delta": 0.02, "delta_b": 0.004}
RULES: dict[str, dict[str, Any]] = {
    "gpg": {"objective": "gpg", "advantage": "gpg"},
    "pg": {"objective": "pg", "advantage": "rloo", "aggregation": "token-sum"},
    "ppo": {"objective": "ppo", "params": {"clip_low": 0.05, "clip_high": 0.05}, "advantage": "gae"},
    "ppo_dual": {
        "objective": "ppo",
        "params": {"clip_low": 0.05, "clip_high": 0.05, "dual_clip": 1.02},
        "advantage": "reinforce_pp",
        "anchor": "recomputed",
    },
    "grpo": {"objective": "grpo", "params": {"clip_low": 0.04, "clip_high": 0.05}},
    "grpo_norm": {
        "objective": "grpo",
        "params": {"clip_low": 0.04, "clip_high": 0.05},
        "advantage": "dr_grpo",
        "aggregation": "seq-mean-token-sum-norm",
        "anchor": "decoupled",
    },
    "cispo": {
        "objective": "cispo",
        "params": {"clip_low": 0.05, "clip_high": 0.05},
        "advantage": "reinforce_pp_baseline",
    },
    "minpro": {"objective": "minpro", "params": {"clip_high": 0.05}, "aggregation": "seq-mean-token-sum"},
    "sapo": {"objective": "sapo", "aggregation": "seq-mean-token-mean", "anchor": "recomputed"},
    "drpo": {"objective": "drpo", "params": {"delta": 0.15}},
    "spo": {"objective": "drpo", "params": {"delta": 0.15, "weight_by_mu": False}},
    "gspo": {
        "objective": "gspo",
        "params": {"clip_low": 0.01, "clip_high": 0.01},
        "aggregation": "seq-mean-token-mean",
    },
    "gmpo": {
        "objective": "gmpo",
        "params": {"clip_low": 0.05, "clip_high": 0.05},
        "aggregation": "seq-mean-token-mean",
    },
    "trm_max": {"objective": "trm", "params": {"delta_max": 0.01}, "divergence": EXACT | {"kind": "kl"}},
    "trm_avg": {
        "objective": "trm",
        "params": {"delta_max": None, "delta_mean": 0.001},
        "divergence": TOP4 | {"kind": "kl"},
    },
    "trm_k3": {"objective": "trm", "params": {"delta_max": 0.01}, "divergence": {"estimator": "sampled", "kind": "k3"}},
    "dppo_binary": {"objective": "dppo", "params": {"delta": 0.02}, "divergence": BINARY},
    "dppo_kl": {"objective": "dppo", "params": {"delta": 0.002}, "divergence": BINARY | {"kind": "kl"}},
    "dppo_exact": {"objective": "dppo", "params": {"delta": 0.02, "cap": None}, "divergence": EXACT},
    "dppo_replace": {"objective": "dppo", "params": {"delta": 0.02}, "divergence": TOP4 | {"support": "replace"}},
    "cppo": {"objective": "cppo", "params": TIGHT, "divergence": TOP4},
    "cppo_shuffle": {"objective": "cppo", "params": TIGHT | {"shuffle": True, "w_min": 0.5}, "divergence": EXACT},
    "cppo_soft": {"objective": "cppo", "params": TIGHT | {"soft": True}, "divergence": BINARY},
    "cppo_span": {
        "objective": "cppo",
        "params": TIGHT | {"span": 6, "adaptive": False, "w_min": 0.5},
        "divergence": BINARY,
    },
    "cppo_weights": {
        "objective": "cppo",
        "params": {"delta": 0.02, "delta_b": None, "w_min": 0.5},
        "divergence": EXACT,
    },
}
"""Rule -> its entry of a suite: every objective, advantage, aggregation, anchor and divergence, with thresholds that bind."""
OTHER_SETTINGS = {"chain": ("ppo", "grpo", "cppo"), "shaped": ("grpo", "cppo")}
"""The rules that run in further settings. All run in `reduce`, where a response has choices at many positions."""
RUNS = {f"{rule} on reduce": ("reduce", rule) for rule in RULES}
RUNS |= {f"{rule} on {setting}": (setting, rule) for setting, chosen in OTHER_SETTINGS.items() for rule in chosen}


@cache
def suite() -> Suite:
    """All settings and rules."""
    raw = {
        "description": "Golden traces.",
        "seeds": [0],
        "settings": SETTINGS,
        "evaluation": {"samples": 4},
        "rules": [{"name": name, **entry} for name, entry in RULES.items()],
    }
    return written(raw)


def written(raw: dict[str, Any]) -> Suite:
    """A suite from plain data, by way of a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "suite.yaml"
        path.write_text(json.dumps(raw))
        return load_suite(path)


def stored_model(config: RunConfig | BaseConfig) -> PreTrainedModel:
    """The model with the stored weights of the setting."""
    setting = config.setting
    assert isinstance(setting.model, Model) and isinstance(setting.task, GeneratedTask)
    model = create_model(setting.model, config.setting_name, len(setting.task.vocabulary))
    load_model(model, FOLDER / f"{WEIGHTS[config.setting_name]}.safetensors")
    return model


# Traces ---------------------------------------------------------------------------------------------------------------


def run_trace(setting_name: str, rule_name: str) -> dict[str, Any]:
    """The first iterations of a run: its metrics, and sums over what it says of positions, tokens and weights."""
    run = next(r for r in suite().runs() if (r.setting_name, r.rule_name) == (setting_name, rule_name))
    setting = run.setting
    assert isinstance(setting.task, GeneratedTask)
    critic = ValueModel(stored_model(run)) if advantages.estimator(run.rule.advantage).critic else None
    return trained(run, stored_model(run), create_tokenizer(setting.task.vocabulary), critic)


def trained(
    run: RunConfig, policy: PreTrainedModel, tokenizer: Any, critic: ValueModel | None = None
) -> dict[str, Any]:
    """Train for `ITERATIONS` and read the streams."""
    problems = run.setting.task.load(run.setting_name)[0]["train"]
    with tempfile.TemporaryDirectory() as name, judge() as open_judge:
        folder = RunFolder(Path(name))
        accelerator, engine = make_accelerator(None), TorchEngine(policy)
        trainer = Trainer(run, folder, problems, policy, tokenizer, critic, open_judge, accelerator, engine)
        for _ in range(ITERATIONS):
            trainer.step()
        streams = {
            stream: [json.loads(line) for line in folder.stream(stream).read_text().splitlines()]
            for stream in ("metrics", "positions", "tokens")
        }
    return {
        "metrics": streams["metrics"],
        "positions": sums(streams["positions"]),
        "tokens": sums(streams["tokens"]),
        "weights": norm(policy),
    } | ({} if critic is None else {"critic": norm(critic)})


def text_trace() -> dict[str, Any]:
    """CPPO on problems in words, with a chat template. The model is untrained, so that lengths alone decide rewards."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw = raw_suite(write_data(folder / "data"), folder / "checkpoint")
        raw["settings"]["tiny"]["rollout"]["overlong_buffer"] = 8
        raw["settings"]["tiny"]["optimizer"] = SETTING["optimizer"]
        raw["rules"] = [{"name": "cppo", **RULES["cppo"]}]
        (run,) = write_suite(folder / "suite.yaml", raw).runs()
        tokenizer = make_tokenizer()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            policy = Qwen3ForCausalLM(
                Qwen3Config(
                    vocab_size=len(tokenizer),
                    hidden_size=16,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    head_dim=8,
                    intermediate_size=32,
                    max_position_embeddings=256,
                    tie_word_embeddings=True,
                    initializer_range=0.1,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            )
        with torch.no_grad():  # so that some responses end by themselves
            policy.get_input_embeddings().weight[tokenizer.eos_token_id] *= 10
        return trained(run, policy, tokenizer)


_JUDGE = Judge()


@contextmanager
def judge() -> Iterator[Judge]:
    """One judge for all traces: its child process takes longer to start than a run."""
    _JUDGE.start()
    yield _JUDGE


def sums(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Column -> the sum of absolute values over all rows and, where a row has a list, over its entries; text is left out."""
    totals: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            numbers = [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, int | float)]
            if numbers:
                totals[name] = totals.get(name, 0.0) + math.fsum(map(abs, numbers))
    return totals


def norm(model: torch.nn.Module) -> float:
    """The norm of all parameters."""
    return float(torch.cat([p.detach().double().flatten() for p in model.parameters()]).norm())


def digest(value: object) -> str:
    """A hash of plain data."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def problems_trace(setting_name: str) -> dict[str, Any]:
    """Hashes of a generated family's problems, prompts and demonstrations."""
    task = suite().settings[setting_name].task
    assert isinstance(task, GeneratedTask)
    sets, _ = task.load(setting_name)
    tokenizer = create_tokenizer(task.vocabulary)
    return {
        "problems": {name: digest([asdict(p) for p in problems]) for name, problems in sets.items()},
        "prompts": digest([task.prompt_ids(tokenizer, p.question) for p in sets["train"]]),
        "demonstrations": digest(list(itertools.islice(task.demonstrations(setting_name), 50))),
    }


def warm_start_trace(setting_name: str) -> dict[str, Any]:
    """The first steps of a warm start: the loss of the third one, the accuracy after it, the weights."""
    raw = SETTINGS[setting_name] | {"warm_start": SETTING["warm_start"] | {"check_every": 3, "target_accuracy": 0.0}}
    config = suite().base(setting_name)
    config = config.model_copy(update={"setting": type(config.setting).model_validate_json(json.dumps(raw))})
    problems = config.setting.task.load(setting_name)[0]["train"]
    with tempfile.TemporaryDirectory() as name:
        make_base(config, problems, Path(name))
        (row,) = [json.loads(line) for line in (Path(name) / "warm_start.jsonl").read_text().splitlines()]
        return row | {"weights": norm(load_pretrained(RunFolder(Path(name)).checkpoint(0)))}


def evaluation_trace(setting_name: str) -> dict[str, Any]:
    """The scores of the stored weights, problem by problem."""
    config = suite().base(setting_name)
    task = config.setting.task
    assert isinstance(task, GeneratedTask)
    sets, _ = task.load(setting_name)
    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder(Path(name) / config.folder)
        data = Path(name) / config.data
        for source, problems in sets.items():
            write_problems(problems, data / f"{source}.jsonl")
        write_tasks(data / "lm_eval", config, lambda source: data / f"{source}.jsonl")
        folder.begin(config, {"numerics": str(NUMERICS_VERSION)}, begun=False)
        with folder.new_checkpoint(0) as checkpoint:
            save_pretrained(stored_model(config), checkpoint, create_tokenizer(task.vocabulary))
        evaluate(folder.path)
        scores = read_scores(folder.scores)
    return {f"{s.benchmark} {s.problem}": [s.correct, s.unjudged, s.mean_length, s.truncated] for s in scores}


# Integrations ---------------------------------------------------------------------------------------------------------

WIDER: dict[str, dict[str, Any]] = {
    "cppo": {"delta": 0.06, "delta_b": 0.02},
    "dppo": {"delta": 0.03},
    "trm": {"delta_max": 0.3},
    "gspo": {"clip_low": 0.1, "clip_high": 0.1},
}
"""Parameters under which each of these masks some tokens of `fixed_batch`, but not all."""


def fixed_batch() -> Tokens:
    """Ragged, float64, with holes and an empty row."""
    tokens = random_tokens(5, batch=8, width=10)
    tokens.mask[3] = False
    return replace(tokens, divergence=None, position=None)


Loss = Callable[[str, Tensor, Tokens, Aggregation, int | None], Tensor]
"""(rule, logp that needs a gradient, batch, aggregation, horizon) -> loss."""


def sampled_token_loss(name: str, logp: Tensor, batch: Tokens, aggregation: Aggregation, horizon: int | None) -> Tensor:
    """The loss that TRL and verl get."""
    loss, _ = sampled_rule(name)(logp, batch.rollout_logp, batch.advantages, batch.mask, aggregation, horizon)
    return loss


def sampled_rule(name: str) -> SampledTokenLoss:
    """The rule as TRL and verl have it."""
    params = WIDER.get(name, {})
    needs_divergence = "divergence" in objective(name, **params).needs
    return SampledTokenLoss.of(name, params, {"estimator": "binary", "kind": "tv"} if needs_divergence else None)


def integration_trace(name: str, loss_of: Loss = sampled_token_loss) -> dict[str, list[float]]:
    """Aggregation -> [loss, norm of its gradient in logp] on the fixed batch."""
    trace = {}
    for aggregation in AGGREGATIONS:
        batch = fixed_batch()
        logp = batch.logp.requires_grad_()
        horizon = HORIZON if aggregation == "seq-mean-token-sum-norm" else None
        loss = loss_of(name, logp, batch, aggregation, horizon)
        (gradient,) = torch.autograd.grad(loss, logp)
        trace[aggregation] = [float(loss.detach()), float(gradient.norm())]
    return trace


def trl_trace() -> dict[str, Any]:
    """Two optimiser steps of TRL's trainer with CPPO's loss: the loss and the gradient's norm of every micro-batch."""
    from test_trl import BINARY_TV, CPPO, recorder  # TRL may not be installed

    with tempfile.TemporaryDirectory() as folder:
        trainer = recorder(Path(folder), objective="cppo", params=CPPO, divergence=BINARY_TV)
        trainer.train()
        losses = [step.loss for step in trainer.steps]
        norms = [float(torch.cat([g.flatten() for g in step.gradients.values()]).norm()) for step in trainer.steps]
    return {"losses": losses, "gradients": norms}


# Stored ---------------------------------------------------------------------------------------------------------------

TRACES: dict[str, dict[str, Callable[[], dict[str, Any]]]] = {
    "runs": {label: (lambda pair=pair: run_trace(*pair)) for label, pair in RUNS.items()},  # type: ignore[misc]
    "tasks": {"text": text_trace}
    | {
        f"{kind} of {family}": (lambda trace=trace, family=family: trace(family))  # type: ignore[misc]
        for family in ("chain", "reduce")
        for kind, trace in (
            ("problems", problems_trace),
            ("warm start", warm_start_trace),
            ("scores", evaluation_trace),
        )
    },
    "integrations": {name: (lambda name=name: integration_trace(name)) for name in names()},  # type: ignore[misc]
    "trl": {"two steps": trl_trace},
}
"""File in golden/ -> trace -> what makes it."""


def stored(file: str) -> dict[str, Any]:
    """{"numerics": version, "traces": {name: trace}} as stored; no traces where there is no file."""
    path = FOLDER / f"{file}.json"
    return json.loads(path.read_text()) if path.is_file() else {"numerics": NUMERICS_VERSION, "traces": {}}


def differences(now: Any, then: Any, place: str = "") -> list[str]:
    """Where two traces differ by more than rounding, one line each."""
    if isinstance(now, dict) and isinstance(then, dict):
        if now.keys() != then.keys():
            return [f"{place}: other names: {', '.join(sorted(now.keys() ^ then.keys()))}"]
        return [line for key in then for line in differences(now[key], then[key], f"{place}.{key}".lstrip("."))]
    if isinstance(now, list) and isinstance(then, list) and len(now) == len(then):
        return [
            line for i, pair in enumerate(zip(now, then, strict=True)) for line in differences(*pair, f"{place}[{i}]")
        ]
    if isinstance(now, int | float) and isinstance(then, int | float):
        same = now == then or math.isclose(now, then, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    else:
        same = now == then
    return [] if same else [f"{place}: stored {then}, now {now}"]


def make_weights() -> None:
    """Train and store the weights that are not there yet."""
    for setting_name in sorted(set(WEIGHTS.values())):
        path = FOLDER / f"{setting_name}.safetensors"
        if not path.is_file():
            config = suite().base(setting_name)
            with tempfile.TemporaryDirectory() as name:
                make_base(config, config.setting.task.load(setting_name)[0]["train"], Path(name))
                save_model(load_pretrained(RunFolder(Path(name)).checkpoint(0)), str(path))


def write() -> None:
    """Make all traces and store them. Exits with a message when one has moved under the same numerics version."""
    make_weights()
    for file, traces in TRACES.items():
        old, new = stored(file), {name: json.loads(json.dumps(make())) for name, make in traces.items()}
        if old["numerics"] == NUMERICS_VERSION:
            for name in new.keys() & old["traces"].keys():
                if moved := differences(new[name], old["traces"][name]):
                    sys.exit(f"{file}: {name}: {moved[0]}: {REMEDY}")
            new |= {name: trace for name, trace in old["traces"].items() if name in new}
        text = json.dumps({"numerics": NUMERICS_VERSION, "traces": new}, indent=1)
        (FOLDER / f"{file}.json").write_text(text + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", required=True, help="make all traces and store them")
    parser.parse_args()
    torch.set_num_threads(1)
    write()
