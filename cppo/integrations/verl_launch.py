"""Engine verl: a run that verl 0.9.1 trains on a Ray cluster, and its results in this repository's schema.

`train` writes the run's prompts as parquet, runs `command` (verl's own entry point with our objective, see `verl.py`) and
collects verl's metrics and weights, so that evaluation, tables and figures read the run like any other.
verl itself is never imported: its environment is another one ($CPPO_VERL_PYTHON).

What verl cannot do is refused by `check_plan` and `check_objective` when the suite is loaded. Left out: drift by position
and token dumps (verl keeps no tokens for us), and stopping at a collapse (verl skips a non-finite update and goes on).

A run's folder holds, besides the usual files, verl/: train.parquet, log-N.jsonl (verl's metrics, one file an attempt,
because verl overwrites), global_step_N/ (the last two states, to resume from).
"""

import json
import math
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cppo.config import MathTask, ObjectiveEntry, Resources, RunConfig, Setting
from cppo.files import whole_folder, write_whole
from cppo.integrations import SampledTokenLoss
from cppo.interrupts import Interrupted, Terminated
from cppo.problems import Problem
from cppo.seeds import seed

VERSION = "0.9.1"
"""The verl whose configuration `overrides` speaks; every key is tested against it."""
PACKAGES = ("verl", "vllm", "ray", "torch", "transformers", "math-verify")
"""What the environment of `verl_python` must hold, besides this package."""
CORES_A_GPU = 4
"""verl reserves three for its workers on each GPU; rewards and agents need some more."""
POLL_SECONDS = 1.0
"""Between two looks at whether verl has ended."""
PLAIN_PROMPT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""A chat template that adds nothing: verl knows only chats."""

ADVANTAGES = {
    "grpo": "grpo",
    "dr_grpo": "grpo",  # with norm_adv_by_std_in_grpo=False
    "rloo": "rloo",
    "gpg": "gpg",
    "reinforce_pp": "reinforce_plus_plus",
    "reinforce_pp_baseline": "reinforce_plus_plus_baseline",
    "gae": "gae",
}
"""Our estimators' names in verl."""

METRICS = {
    "reward": "critic/score/mean",
    "response_length": "response_length/mean",
    "loss": "actor/loss",
    "value_loss": "critic/loss",
    "grad_norm": "actor/grad_norm",
}
"""Ours -> verl's, where both mean the same: over responses, or over the updates of an iteration."""
RATIOS = (
    "mask_share",
    "mask_share/threshold",
    "mask_share/budget",
    "mask_share/sequence",
    "gate_mean",
    "divergence",
)
"""Those of our plug-in: actor/cppo_bench/NAME_sum over NAME_count."""
TIMINGS = {
    "rollout": "timing_s/gen",  # verl judges while it samples
    "values": "timing_s/values",
    "advantage": "timing_s/adv",
    "update": "timing_s/update_actor",
    "update_critic": "timing_s/update_critic",
    "weights": "timing_s/update_weights",
    "checkpoint": "timing_s/save_checkpoint",
    "total": "timing_s/step",
}
"""Seconds, ours -> verl's."""


# What verl cannot do --------------------------------------------------------------------------------------------------


def check_plan(setting: str, plan: Setting, resources: Resources) -> None:
    """ValueError naming the key for anything in a setting of engine verl, or its resources, that verl cannot do."""
    scale, rollout, updates = plan.scale, plan.rollout, plan.rollout.updates
    assert scale is not None and scale.engine == "verl"
    here = f"settings.{setting}"
    if not isinstance(plan.task, MathTask):
        raise ValueError(f"{here}.task.family: engine verl trains published models on math")
    if scale.sharding == "ddp":
        raise ValueError(f"{here}.scale.sharding: ddp is not for engine verl; take fsdp2 or megatron")
    if scale.sharding == "megatron" and scale.precision != "bfloat16":
        raise ValueError(f"{here}.scale.precision: megatron computes in bfloat16")
    if scale.vllm_gpus:
        raise ValueError(f"{here}.scale.vllm_gpus: verl's vLLM shares the trainer's GPUs; take 0")
    if rollout.resample:
        raise ValueError(f"{here}.rollout.resample: verl's dynamic sampling has no limit on its rollouts; take 0")
    if plan.optimizer.warmup_updates % updates:
        raise ValueError(
            f"{here}.optimizer.warmup_updates: {plan.optimizer.warmup_updates} is no multiple of the {updates} updates "
            "in a rollout, and verl raises the learning rate only between rollouts"
        )
    where = f"resources.{setting}"
    if resources.gpus < 1:
        raise ValueError(f"{where}.gpus: engine verl needs at least 1 on each node")
    if resources.cpus < CORES_A_GPU * resources.gpus:
        raise ValueError(f"{where}.cpus: verl needs at least {CORES_A_GPU} for each GPU of a node")
    if resources.gpus % scale.tensor_parallel:
        raise ValueError(
            f"{here}.scale.tensor_parallel: {scale.tensor_parallel} does not divide the {resources.gpus} GPUs of a node"
        )
    ranks, rows = _ranks(plan, resources), rollout.minibatch * rollout.responses
    if rows % ranks:
        raise ValueError(f"{where}.gpus: {ranks} data-parallel ranks do not divide the {rows} responses of a minibatch")
    if rows // ranks % _micro_rows(plan, resources):
        raise ValueError(
            f"{here}.scale.micro_rows: {scale.micro_rows} does not divide a rank's {rows // ranks} responses of a minibatch"
        )


def check_objective(entry: ObjectiveEntry) -> None:
    """ValueError naming the key for an objective entry that verl cannot train."""
    if entry.anchor != "rollout":
        raise ValueError(f"anchor: {entry.anchor} is not for engine verl, which keeps the rollout's log-probabilities")
    if entry.settings.get("shuffle"):
        raise ValueError("settings.shuffle: needs positions drawn by the trainer, and verl draws none; take false")
    if entry.divergence is not None and entry.divergence.estimator != "binary":
        raise ValueError(
            f"divergence.estimator: {entry.divergence.estimator} is not for engine verl, which records the sampled token's "
            "log-probability only; take binary, for one setting alone in by_setting"
        )
    SampledTokenLoss.of(entry.objective, entry.settings, _divergence(entry))


def _divergence(entry: ObjectiveEntry) -> dict[str, Any] | None:
    return None if entry.divergence is None else entry.divergence.model_dump(exclude_none=True)


def _ranks(plan: Setting, resources: Resources) -> int:
    """Data-parallel ranks of the trainer."""
    assert plan.scale is not None
    split = plan.scale.tensor_parallel if plan.scale.sharding == "megatron" else 1
    return resources.gpus * resources.nodes // split


def _micro_rows(plan: Setting, resources: Resources) -> int:
    assert plan.scale is not None
    whole = plan.rollout.minibatch * plan.rollout.responses // _ranks(plan, resources)
    return plan.scale.micro_rows or whole


# The command ----------------------------------------------------------------------------------------------------------


def verl_python() -> str:
    """The Python that has verl: $CPPO_VERL_PYTHON, or this one."""
    return os.environ.get("CPPO_VERL_PYTHON", sys.executable)


def command(
    run: RunConfig, resources: Resources, base: Path, folder: Path, report_to: Sequence[str] = (), attempt: int = 0
) -> list[str]:
    """The complete command line that trains `run` with verl.

    base: the model's checkpoint folder; folder: the run's directory; report_to: further trackers of verl; attempt: how
    often the run was started before.
    """
    chosen = overrides(run, resources, base, folder, report_to, attempt)
    return [verl_python(), "-m", "verl.trainer.main_ppo", *(f"{key}={hydra(value)}" for key, value in chosen.items())]


def overrides(
    run: RunConfig, resources: Resources, base: Path, folder: Path, report_to: Sequence[str] = (), attempt: int = 0
) -> dict[str, Any]:
    """verl's configuration keys for `run` -> values; a key with + is one that verl's YAML does not list."""
    plan, entry, work = run.plan, run.objective, folder.resolve() / "verl"
    task, rollout, scale = plan.task, plan.rollout, plan.scale
    assert isinstance(task, MathTask) and scale is not None and scale.engine == "verl"
    # vLLM adds the replica's number: seeds of runs must not be neighbours.
    noise = seed("verl", run.setting, run.seed) % 2**31
    megatron, gae, micro = scale.sharding == "megatron", entry.advantage == "gae", _micro_rows(plan, resources)
    actor, engine = "actor_rollout_ref.actor", "megatron" if megatron else "fsdp_config"
    environment = {
        "VERL_FILE_LOGGER_PATH": str(work / f"log-{attempt}.jsonl"),
        "TENSORBOARD_DIR": str(work / "tensorboard"),
    }
    found: dict[str, Any] = {
        "model_engine": "megatron" if megatron else "dp",
        # Prompts: the parquet holds every prompt of the run in its order, so that verl shuffles and filters nothing.
        "data.train_files": work / "train.parquet",
        "data.val_files": work / "train.parquet",
        "data.train_batch_size": rollout.prompts,
        "data.max_prompt_length": task.max_prompt_tokens,
        "data.max_response_length": rollout.max_response_tokens,
        "data.shuffle": False,
        "data.filter_overlong_prompts": False,
        "reward.custom_reward_function.path": "pkg://cppo.integrations.verl",
        "reward.custom_reward_function.name": "compute_score",
        # The objective.
        "algorithm.adv_estimator": ADVANTAGES[entry.advantage],
        "algorithm.norm_adv_by_std_in_grpo": entry.advantage == "grpo",
        "algorithm.rollout_correction.bypass_mode": True,
        f"{actor}.policy_loss._target_": "cppo.integrations.verl.PolicyLoss",
        f"{actor}.policy_loss.loss_mode": f"cppo_bench_{entry.objective}",
        f"+{actor}.policy_loss.settings": entry.settings,
        f"+{actor}.policy_loss.divergence": _divergence(entry),
        f"+{actor}.policy_loss.rollout_correction": "${algorithm.rollout_correction}",
        f"{actor}.loss_agg_mode": entry.aggregation,
        f"{actor}.loss_scale_factor": (
            rollout.max_response_tokens if entry.aggregation == "seq-mean-token-sum-norm" else None
        ),
        # The policy and its optimiser.
        "actor_rollout_ref.model.path": base.resolve(),
        "actor_rollout_ref.model.external_lib": "cppo.integrations.verl",
        "actor_rollout_ref.model.enable_gradient_checkpointing": scale.gradient_checkpointing,
        f"{actor}.ppo_mini_batch_size": rollout.minibatch,
        f"{actor}.ppo_micro_batch_size_per_gpu": micro,
        f"{actor}.{engine}.seed": noise,
        f"{actor}.data_loader_seed": noise,
        **_engine(f"{actor}.{engine}", plan),
        **_optimizer(f"{actor}.optim", plan, plan.optimizer.lr),
        **_states(actor),
        # Sampling.
        "actor_rollout_ref.rollout.name": "vllm",
        "actor_rollout_ref.rollout.n": rollout.responses,
        "actor_rollout_ref.rollout.temperature": rollout.temperature,
        "actor_rollout_ref.rollout.calculate_log_probs": True,
        "actor_rollout_ref.rollout.dtype": scale.precision,
        "actor_rollout_ref.rollout.gpu_memory_utilization": scale.vllm_memory,
        "actor_rollout_ref.rollout.tensor_model_parallel_size": scale.tensor_parallel,
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": micro,
        "actor_rollout_ref.rollout.seed": noise,
        "critic.enable": gae,
        # The trainer; checkpoints are scored by lm-eval, not by verl.
        "trainer.use_v1": True,
        "trainer.nnodes": resources.nodes,
        "trainer.n_gpus_per_node": resources.gpus,
        "trainer.total_epochs": 1,
        "trainer.total_training_steps": plan.iterations,
        "trainer.save_freq": plan.checkpoint_every,
        "trainer.test_freq": -1,
        "trainer.val_before_train": False,
        "trainer.resume_mode": "auto",
        "trainer.default_local_dir": work,
        "trainer.max_actor_ckpt_to_keep": 2,
        "trainer.max_critic_ckpt_to_keep": 2,
        "trainer.checkpoint_callback_class": "cppo.integrations.verl.KeepWeights",
        "trainer.project_name": "cppo-bench",
        "trainer.experiment_name": f"{run.label}-{run.id}",
        "trainer.logger": ["console", "file", *report_to],
        # Through Ray, because the trainer may run on any node.
        **{f"+ray_kwargs.ray_init.runtime_env.env_vars.{name}": value for name, value in environment.items()},
        "hydra.run.dir": work / "hydra",
    }
    if not megatron:
        found |= {f"{actor}.strategy": "fsdp2"}
    if task.prompt == "base":
        found |= {"actor_rollout_ref.model.custom_chat_template": PLAIN_PROMPT}
    if task.enable_thinking is not None:
        found |= {"+data.apply_chat_template_kwargs.enable_thinking": task.enable_thinking}
    if rollout.overlong_buffer:
        buffer = {"enable": True, "len": rollout.overlong_buffer, "penalty_factor": 1.0, "log": False}
        found |= {
            "reward.reward_manager.name": "dapo",
            "+reward.reward_kwargs": {"overlong_buffer_cfg": buffer, "max_resp_len": rollout.max_response_tokens},
        }
    if gae:
        found |= _critic(run, base, micro, noise)
    return found


def _engine(key: str, plan: Setting) -> dict[str, Any]:
    """Sharding and precision: weights and optimiser state in float32, passes in the setting's precision."""
    scale = plan.scale
    assert scale is not None
    if scale.sharding == "megatron":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        return {
            f"{key}.tensor_model_parallel_size": scale.tensor_parallel,
            f"{key}.expert_model_parallel_size": scale.expert_parallel,
            f"{key}.dtype": "bfloat16",
            **{
                f"{key}.override_transformer_config.{name}": value
                for name, value in recompute.items()
                if scale.gradient_checkpointing
            },
        }
    found: dict[str, Any] = {f"{key}.model_dtype": "fp32", f"{key}.dtype": scale.precision}
    if scale.precision == "float32":  # verl's FSDP computes in bfloat16 unless told here
        found[f"+{key}.mixed_precision"] = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    return found


def _optimizer(key: str, plan: Setting, lr: float) -> dict[str, Any]:
    """AdamW; verl counts the warm-up in rollouts, from learning rate 0."""
    how = plan.optimizer
    return {
        f"{key}.lr": lr,
        f"{key}.lr_warmup_steps": how.warmup_updates // plan.rollout.updates,
        f"{key}.betas": list(how.betas),
        f"{key}.weight_decay": how.weight_decay,
        f"{key}.clip_grad": how.grad_clip,
    }


def _states(key: str) -> dict[str, Any]:
    """What a checkpoint holds; hf_model is what we score."""
    state = ["model", "optimizer", "extra"]
    return {f"{key}.checkpoint.save_contents": [*state, "hf_model"], f"{key}.checkpoint.load_contents": state}


def _critic(run: RunConfig, base: Path, micro: int, noise: int) -> dict[str, Any]:
    """PPO's value model, on the same GPUs as the policy."""
    plan = run.plan
    assert plan.scale is not None
    megatron = plan.scale.sharding == "megatron"
    engine = "critic.megatron" if megatron else "critic.fsdp"
    return {
        "algorithm.gamma": plan.critic.gamma,
        "algorithm.lam": plan.critic.lam,
        "critic.model.path": base.resolve(),
        "critic.model.enable_gradient_checkpointing": plan.scale.gradient_checkpointing,
        "critic.ppo_micro_batch_size_per_gpu": micro,
        "critic.cliprange_value": plan.critic.value_clip,
        "critic.loss_agg_mode": "token-mean",
        f"{engine}.seed": noise,
        **({} if megatron else {"critic.strategy": "fsdp2"}),
        **_engine(engine, plan),
        **_optimizer("critic.optim", plan, plan.optimizer.lr * plan.critic.lr_factor),
    }


def hydra(value: Any) -> str:
    """A value as Hydra's command line reads it back.

    >>> hydra({"delta": 0.15, "span": None, "adaptive": True, "betas": [0.9, 1e-8]})
    '{delta:0.15,span:null,adaptive:true,betas:[0.9,1e-08]}'
    >>> hydra("a b"), hydra("null"), hydra(Path("/x/y")), hydra("token-mean")
    ('"a b"', '"null"', '"/x/y"', 'token-mean')
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{hydra(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(hydra, value)) + "]"
    text = str(value)
    plain = re.fullmatch(r"[A-Za-z_][\w.-]*|\$\{[\w.]+\}", text)
    if plain and text.lower() not in ("null", "true", "false", "nan", "inf"):
        return text
    return '"' + text.replace('"', '\\"') + '"'


def on_cluster(words: list[str], resources: Resources, environment: Mapping[str, str] = os.environ) -> list[str]:
    """`words` as it is started: on one node, or on a Ray cluster that runs ($RAY_ADDRESS), unchanged; on several nodes of a
    Slurm job through `ray symmetric-run`, which starts Ray on each, runs `words` on the first and stops Ray.

    Raises ValueError for several nodes with neither.
    """
    nodes = resources.nodes
    if nodes == 1 or "RAY_ADDRESS" in environment:
        return words
    if "SLURM_JOB_ID" not in environment:
        raise ValueError(
            f"resources.nodes: {nodes} nodes need a Slurm job of as many nodes, or a Ray cluster that runs, in RAY_ADDRESS"
        )
    ray = [str(Path(words[0]).parent / "ray"), "symmetric-run", "--address", f"{socket.gethostname()}:6379"]
    return [
        *("srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--overlap", "--mem=0"),
        f"--cpus-per-task={resources.cpus}",
        *(*ray, "--min-nodes", str(nodes), "--num-cpus", str(resources.cpus), "--num-gpus", str(resources.gpus), "--"),
        *words,
    ]


# Running and collecting -----------------------------------------------------------------------------------------------


def train(
    run: RunConfig,
    resources: Resources,
    base: Path,
    problems: tuple[Problem, ...],
    folder: Path,
    report_to: Sequence[str] = (),
) -> None:
    """Train `run` with verl, or continue it, until its DONE file is written; verl's output goes where ours does.

    SIGTERM ends verl, whose last saved state stays, by `Interrupted`. Raises ValueError when verl is not installed, ends
    before the last iteration, or the saved state is of another version of the code or of a package.
    """
    from cppo.provenance import provenance
    from cppo.train import begin  # needs transformers, which checking a suite does not

    if (folder / "DONE").is_file():
        return
    versions, work = installed(verl_python()), folder / "verl"
    words = on_cluster(command(run, resources, base, folder, report_to, len(_logs(folder))), resources)
    begin(run, folder, work / "latest_checkpointed_iteration.txt", provenance() | versions)
    work.mkdir(exist_ok=True)
    write_prompts(run, problems, work / "train.parquet")
    _watch(words, folder)
    collect(run, folder)


def _watch(words: list[str], folder: Path) -> None:
    """Run the command to its end; SIGTERM is passed on."""
    # `ray symmetric-run` calls ray by its name; without a token anyone in the network could run code on its nodes.
    changes = {"PATH": f"{Path(verl_python()).parent}:{os.environ.get('PATH', '')}"}
    if words[0] == "srun":
        changes |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with Terminated() as terminated, subprocess.Popen(words, env={**os.environ, **changes}) as process:
        while process.poll() is None:
            if terminated:
                process.terminate()
            time.sleep(POLL_SECONDS)
    if process.returncode and terminated:
        raise Interrupted(f"{folder}: stopped by SIGTERM; it will continue from the last state that verl saved")
    if process.returncode:
        raise ValueError(
            f"{folder}: verl ended with exit code {process.returncode}, see its output; the same command continues the run"
        )


def installed(python: str) -> dict[str, str]:
    """Versions of verl and what it needs in that environment. Raises ValueError with the remedy when something is missing."""
    probe = (
        "import importlib.metadata as m, json, sys, cppo; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    )
    remedy = (
        f"engine verl needs verl {VERSION}, vllm, math-verify and this package in one environment; "
        "name its Python in CPPO_VERL_PYTHON (docs/cluster.md)"
    )
    try:
        done = subprocess.run([python, "-c", probe, *PACKAGES], capture_output=True, text=True)
    except OSError as error:
        raise ValueError(f"{python}: {error.strerror}; {remedy}") from None
    if done.returncode:
        raise ValueError(f"{python}: {done.stderr.strip().splitlines()[-1]}; {remedy}")
    versions: dict[str, str] = json.loads(done.stdout)
    if versions["verl"] != VERSION:
        raise ValueError(f"{python}: has verl {versions['verl']}; {remedy}")
    return {f"verl/{name}": version for name, version in versions.items()}


def write_prompts(run: RunConfig, problems: tuple[Problem, ...], path: Path) -> None:
    """Every prompt of the run in order, in verl's schema: the problems and their order are those of any other engine."""
    import pandas as pd

    from cppo.batches import problem_order  # these need transformers, which checking a suite does not
    from cppo.prompts import wording

    task, prompts = run.plan.task, run.plan.rollout.prompts
    assert isinstance(task, MathTask)
    rows: list[dict[str, Any]] = []
    for iteration in range(run.plan.iterations):
        for i in problem_order(len(problems), prompts, iteration, run.setting, run.seed):
            asked = problems[i]
            rows.append(
                {
                    "data_source": asked.source,
                    "prompt": [{"role": "user", "content": wording(task, asked.question)}],
                    "reward_model": {"style": "rule", "ground_truth": asked.answer},
                    "extra_info": {"index": len(rows), "id": asked.id},
                }
            )
    pd.DataFrame(rows).to_parquet(path)


def collect(run: RunConfig, folder: Path) -> None:
    """Turn verl's metrics and weights into the run directory's streams, checkpoints and DONE.

    Raises ValueError when iterations are missing.
    """
    keep_weights(folder)
    found: dict[int, dict[str, Any]] = {}
    for log in _logs(folder):  # a later attempt repeats what was not saved
        whole = log.read_text().rpartition("\n")[0]  # a killed one may end in half a line
        found |= {row["step"]: row["data"] for row in map(json.loads, whole.splitlines())}
    total = run.plan.iterations
    missing = sorted(set(range(1, total + 1)) - set(found))
    if missing:
        raise ValueError(f"{folder}: verl logged no iteration {missing[0]} of {total}; run it again to continue")
    rows = [found[iteration] for iteration in range(1, total + 1)]
    streams: dict[str, list[dict[str, Any]]] = {
        "metrics": [{"iteration": i, **metrics(run, row)} for i, row in enumerate(rows, 1)],
        "timings": [{"iteration": i, **timings(run, row)} for i, row in enumerate(rows, 1)],
        "positions": [],
        "tokens": [],
    }
    for name, lines in streams.items():
        write_whole(folder / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    collapsed = collapse(run, [row["actor/grad_norm"] for row in rows])
    status = "finished" if collapsed is None else f"collapsed at step {collapsed}"
    write_whole(folder / "DONE", json.dumps({"status": status, "iterations": total}) + "\n")


def metrics(run: RunConfig, row: Mapping[str, Any]) -> dict[str, float | None]:
    """One iteration's metrics under our names; those that verl does not measure alike are left out."""
    found = {ours: row[theirs] for ours, theirs in METRICS.items() if theirs in row}
    for name in RATIOS:
        key = f"actor/cppo_bench/{name}"
        if f"{key}_count" in row:
            count = row[f"{key}_count"]
            found[name] = row[f"{key}_sum"] / count if count else None
    plan = run.plan.rollout
    if not plan.overlong_buffer:  # verl logs the shaped reward only
        found["accuracy"] = found["reward"]
    # verl's clip_ratio is the share of the batch's longest responses, whatever their length.
    at_limit = row["response_length/max"] >= plan.max_response_tokens
    found["truncated"] = row["response_length/clip_ratio"] if at_limit else 0.0
    return dict(sorted(found.items()))


def timings(run: RunConfig, row: Mapping[str, Any]) -> dict[str, float]:
    """One iteration's response tokens, seconds by phase, and tokens a second of the two phases that handle every token."""
    plan = run.plan.rollout
    tokens = round(row["response_length/mean"] * plan.prompts * plan.responses)
    seconds = {ours: row[theirs] for ours, theirs in TIMINGS.items() if theirs in row}
    rates = {f"{phase}_tokens_per_second": tokens / seconds[phase] for phase in ("rollout", "update")}
    return {"tokens": tokens, **seconds, **rates}


def collapse(run: RunConfig, norms: Sequence[float | None]) -> int | None:
    """The iteration at which `collapse_after` updates in a row had no finite gradient; None = never.

    norms: the mean over each iteration's updates; None (how verl writes NaN) counts for all of them.
    """
    needed, row = math.ceil(run.plan.collapse_after / run.plan.rollout.updates), 0
    for iteration, norm in enumerate(norms, 1):
        row = 0 if norm is not None and math.isfinite(norm) else row + 1
        if row == needed:
            return iteration
    return None


def keep_weights(folder: Path) -> None:
    """Give verl's Hugging Face weights a second name under checkpoints/: verl deletes all but its last two states."""
    for state in (folder / "verl").glob("global_step_*"):
        # verl's FSDP and Megatron have different layouts.
        places = [state / "actor" / "huggingface", state / "actor" / "model" / "huggingface"]
        weights = next((place for place in places if any(place.glob("*.safetensors"))), None)
        final = folder / "checkpoints" / f"step-{state.name.removeprefix('global_step_')}"
        if weights is not None and not final.exists():
            with whole_folder(final) as partial:
                shutil.copytree(weights, partial, copy_function=os.link, dirs_exist_ok=True)


def _logs(folder: Path) -> list[Path]:
    return sorted((folder / "verl").glob("log-*.jsonl"), key=lambda path: int(path.stem.removeprefix("log-")))
