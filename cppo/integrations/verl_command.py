"""The command line with which verl 0.9.1 trains a run."""

import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cppo.integrations.verl_checks import VERL_ADVANTAGES, divergence_of, micro_rows
from cppo.suite.config import RunConfig
from cppo.suite.setting import Resources, Setting
from cppo.system.seeds import seed
from cppo.tasks.types import TextTask

VERSION = "0.9.1"
"""The version of verl whose configuration keys `overrides` writes. Every key is tested against it."""
PLAIN_PROMPT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""A chat template that adds nothing, because verl asks models in chats only."""


def verl_python() -> str:
    """Path of the Python that has verl: $CPPO_VERL_PYTHON, or this one."""
    return os.environ.get("CPPO_VERL_PYTHON", sys.executable)


def command(
    run: RunConfig, resources: Resources, base: Path, folder: Path, report_to: Sequence[str] = (), attempt: int = 0
) -> list[str]:
    """The complete command line that trains `run` with verl.

    base: the model's checkpoint folder. folder: the run's folder. report_to: further trackers of verl. attempt: how often the
    run was started before.
    """
    chosen = overrides(run, resources, base, folder, report_to, attempt)
    return [verl_python(), "-m", "verl.trainer.main_ppo", *(f"{key}={hydra(value)}" for key, value in chosen.items())]


def overrides(
    run: RunConfig, resources: Resources, base: Path, folder: Path, report_to: Sequence[str] = (), attempt: int = 0
) -> dict[str, Any]:
    """verl's configuration keys for `run` -> values; the arguments are those of `command`.

    A key that begins with + is one that verl's YAML does not list.
    """
    setting, rule, work = run.setting, run.rule, folder.resolve() / "verl"
    task, rollout, scale = setting.task, setting.rollout, setting.scale
    assert isinstance(task, TextTask) and scale is not None and scale.trainer == "verl"
    # vLLM adds the replica's number to the seed, so seeds of runs must not be neighbours.
    noise = seed("verl", run.setting_name, run.seed) % 2**31
    megatron, gae, micro = scale.sharding == "megatron", rule.advantage == "gae", micro_rows(setting, resources)
    actor, engine = "actor_rollout_ref.actor", "megatron" if megatron else "fsdp_config"
    environment = {
        "VERL_FILE_LOGGER_PATH": str(work / f"log-{attempt}.jsonl"),
        "TENSORBOARD_DIR": str(work / "tensorboard"),
    }
    keys: dict[str, Any] = {
        "model_engine": "megatron" if megatron else "dp",
        # Prompts. The parquet file holds every prompt of the run in its order, so verl must not shuffle or filter any.
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
        "algorithm.adv_estimator": VERL_ADVANTAGES[rule.advantage],
        "algorithm.norm_adv_by_std_in_grpo": rule.advantage == "grpo",
        "algorithm.rollout_correction.bypass_mode": True,
        f"{actor}.policy_loss._target_": "cppo.integrations.verl.PolicyLoss",
        f"{actor}.policy_loss.loss_mode": f"cppo_bench_{rule.objective}",
        f"+{actor}.policy_loss.params": rule.params,
        f"+{actor}.policy_loss.divergence": divergence_of(rule),
        f"+{actor}.policy_loss.rollout_correction": "${algorithm.rollout_correction}",
        f"{actor}.loss_agg_mode": rule.aggregation,
        f"{actor}.loss_scale_factor": (
            rollout.max_response_tokens if rule.aggregation == "seq-mean-token-sum-norm" else None
        ),
        # The policy and its optimiser.
        "actor_rollout_ref.model.path": base.resolve(),
        "actor_rollout_ref.model.external_lib": "cppo.integrations.verl",
        "actor_rollout_ref.model.enable_gradient_checkpointing": scale.gradient_checkpointing,
        f"{actor}.ppo_mini_batch_size": rollout.minibatch,
        f"{actor}.ppo_micro_batch_size_per_gpu": micro,
        f"{actor}.{engine}.seed": noise,
        f"{actor}.data_loader_seed": noise,
        **_engine(f"{actor}.{engine}", setting),
        **_optimizer(f"{actor}.optim", setting, setting.optimizer.lr),
        **_states(actor),
        # Sampling.
        "actor_rollout_ref.rollout.name": "vllm",
        "actor_rollout_ref.rollout.n": rollout.responses,
        "actor_rollout_ref.rollout.temperature": rollout.temperature,
        "actor_rollout_ref.rollout.calculate_log_probs": True,
        "actor_rollout_ref.rollout.dtype": scale.precision,
        "actor_rollout_ref.rollout.gpu_memory_utilization": scale.engine_memory,
        "actor_rollout_ref.rollout.tensor_model_parallel_size": scale.tensor_parallel,
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": micro,
        "actor_rollout_ref.rollout.seed": noise,
        "critic.enable": gae,
        # The trainer. lm-eval scores the checkpoints, not verl.
        "trainer.use_v1": True,
        "trainer.nnodes": resources.nodes,
        "trainer.n_gpus_per_node": resources.gpus,
        "trainer.total_epochs": 1,
        "trainer.total_training_steps": setting.iterations,
        "trainer.save_freq": setting.checkpoint_every,
        "trainer.test_freq": -1,
        "trainer.val_before_train": False,
        "trainer.resume_mode": "auto",
        "trainer.default_local_dir": work,
        "trainer.max_actor_ckpt_to_keep": 2,
        "trainer.max_critic_ckpt_to_keep": 2,
        "trainer.checkpoint_callback_class": "cppo.integrations.verl.KeepWeights",
        "trainer.project_name": "cppo-bench",
        "trainer.experiment_name": f"{run.rule_name}-{run.id}",
        "trainer.logger": ["console", "file", *report_to],
        # Environment variables go through Ray, because the trainer may run on any node.
        **{f"+ray_kwargs.ray_init.runtime_env.env_vars.{name}": value for name, value in environment.items()},
        "hydra.run.dir": work / "hydra",
    }
    if not megatron:
        keys |= {f"{actor}.strategy": "fsdp2"}
    if task.prompt == "base":
        keys |= {"actor_rollout_ref.model.custom_chat_template": PLAIN_PROMPT}
    if task.enable_thinking is not None:
        keys |= {"+data.apply_chat_template_kwargs.enable_thinking": task.enable_thinking}
    if rollout.overlong_buffer:
        buffer = {"enable": True, "len": rollout.overlong_buffer, "penalty_factor": 1.0, "log": False}
        keys |= {
            "reward.reward_manager.name": "dapo",
            "+reward.reward_kwargs": {"overlong_buffer_cfg": buffer, "max_resp_len": rollout.max_response_tokens},
        }
    if gae:
        keys |= _critic(run, base, micro, noise)
    return keys


def _engine(key: str, setting: Setting) -> dict[str, Any]:
    """Keys below `key` for sharding and precision: float32 weights and optimiser state, passes in the setting's precision."""
    scale = setting.scale
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
    keys: dict[str, Any] = {f"{key}.model_dtype": "fp32", f"{key}.dtype": scale.precision}
    if scale.precision == "float32":  # verl's FSDP computes in bfloat16 unless told here
        keys[f"+{key}.mixed_precision"] = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    return keys


def _optimizer(key: str, setting: Setting, lr: float) -> dict[str, Any]:
    """Keys below `key` for AdamW. verl counts the warm-up in rollouts, from learning rate 0."""
    optimizer = setting.optimizer
    return {
        f"{key}.lr": lr,
        f"{key}.lr_warmup_steps": optimizer.warmup_updates // setting.rollout.updates,
        f"{key}.betas": list(optimizer.betas),
        f"{key}.weight_decay": optimizer.weight_decay,
        f"{key}.clip_grad": optimizer.grad_clip,
    }


def _states(key: str) -> dict[str, Any]:
    """Keys below `key` for what a checkpoint holds; hf_model is what we score."""
    state = ["model", "optimizer", "extra"]
    return {f"{key}.checkpoint.save_contents": [*state, "hf_model"], f"{key}.checkpoint.load_contents": state}


def _critic(run: RunConfig, base: Path, micro: int, noise: int) -> dict[str, Any]:
    """Keys for PPO's value model, on the same GPUs as the policy."""
    setting = run.setting
    assert setting.scale is not None
    megatron = setting.scale.sharding == "megatron"
    engine = "critic.megatron" if megatron else "critic.fsdp"
    return {
        "algorithm.gamma": setting.critic.gamma,
        "algorithm.lam": setting.critic.gae_lambda,
        "critic.model.path": base.resolve(),
        "critic.model.enable_gradient_checkpointing": setting.scale.gradient_checkpointing,
        "critic.ppo_micro_batch_size_per_gpu": micro,
        "critic.cliprange_value": setting.critic.value_clip,
        "critic.loss_agg_mode": "token-mean",
        f"{engine}.seed": noise,
        **({} if megatron else {"critic.strategy": "fsdp2"}),
        **_engine(engine, setting),
        **_optimizer("critic.optim", setting, setting.optimizer.lr * setting.critic.lr_factor),
    }


def hydra(value: Any) -> str:
    """A value as text that Hydra's command line reads back.

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
    """The command `words` as it is started on the nodes of `resources`.

    On one node, and where a Ray cluster runs already ($RAY_ADDRESS), it stays as it is. On several nodes of a Slurm job it is
    started through `ray symmetric-run`, which starts Ray on each node, runs `words` on the first and stops Ray.

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
