"""What verl 0.9.1 cannot do, refused when a suite is loaded."""

from typing import Any

from cppo.integrations import SampledTokenLoss
from cppo.suite.config import MathTask, ObjectiveEntry, Resources, Setting

CORES_A_GPU = 4
"""verl reserves three for its workers on each GPU; rewards and agents need some more."""


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
