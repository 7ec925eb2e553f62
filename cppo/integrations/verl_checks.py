"""What verl 0.9.1 cannot do; it is refused when a suite is loaded."""

from typing import Any

from cppo.integrations import SampledTokenLoss
from cppo.suite.config import RuleEntry
from cppo.suite.setting import Resources, Setting
from cppo.tasks.types import Task, TextTask

VERL_ADVANTAGES = {
    "grpo": "grpo",
    "dr_grpo": "grpo",  # with norm_adv_by_std_in_grpo=False
    "rloo": "rloo",
    "gpg": "gpg",
    "reinforce_pp": "reinforce_plus_plus",
    "reinforce_pp_baseline": "reinforce_plus_plus_baseline",
    "gae": "gae",
}
"""Names of our advantage estimators -> their names in verl."""
CORES_PER_GPU = 4
"""CPU cores per GPU. verl reserves three for its workers on each GPU; rewards and agents need some more."""


def check_setting(name: str, setting: Setting, resources: Resources) -> None:
    """Check a setting of trainer verl, called `name` in the suite, with its resources.

    Raises ValueError, one line that names the key, for anything that verl cannot do.
    """
    scale, rollout, updates = setting.scale, setting.rollout, setting.rollout.updates
    assert scale is not None and scale.trainer == "verl"
    key = f"settings.{name}"
    if not isinstance(setting.task, TextTask) or type(setting.task).verify is not Task.verify:
        raise ValueError(
            f"{key}.task.family: {setting.task.family}: trainer verl trains published models on problems whose answers are "
            "boxed text"
        )
    if scale.sharding == "ddp":
        raise ValueError(f"{key}.scale.sharding: ddp is not for trainer verl; take fsdp2 or megatron")
    if scale.sharding == "megatron" and scale.precision != "bfloat16":
        raise ValueError(f"{key}.scale.precision: megatron computes in bfloat16")
    if scale.engine_gpus:
        raise ValueError(f"{key}.scale.engine_gpus: verl's vLLM shares the trainer's GPUs; take 0")
    if rollout.resample:
        raise ValueError(f"{key}.rollout.resample: verl's dynamic sampling has no limit on its rollouts; take 0")
    if setting.optimizer.warmup_updates % updates:
        raise ValueError(
            f"{key}.optimizer.warmup_updates: {setting.optimizer.warmup_updates} is not a multiple of the {updates} "
            "updates in a rollout, and verl raises the learning rate only between rollouts"
        )
    resources_key = f"resources.{name}"
    if resources.gpus < 1:
        raise ValueError(f"{resources_key}.gpus: trainer verl needs at least 1 on each node")
    if resources.cpus < CORES_PER_GPU * resources.gpus:
        raise ValueError(f"{resources_key}.cpus: verl needs at least {CORES_PER_GPU} for each GPU of a node")
    if resources.gpus % scale.tensor_parallel:
        raise ValueError(
            f"{key}.scale.tensor_parallel: {scale.tensor_parallel} does not divide the {resources.gpus} GPUs of a node"
        )
    ranks, rows = data_parallel_ranks(setting, resources), rollout.minibatch * rollout.responses
    if rows % ranks:
        raise ValueError(
            f"{resources_key}.gpus: {ranks} data-parallel ranks do not divide the {rows} responses of a minibatch"
        )
    if rows // ranks % micro_rows(setting, resources):
        raise ValueError(
            f"{key}.scale.micro_rows: {scale.micro_rows} does not divide a rank's {rows // ranks} responses of a minibatch"
        )


def check_rule(rule: RuleEntry, needs: frozenset[str]) -> None:
    """Check a resolved rule of a setting of trainer verl. needs: what its objective needs (`Objective.needs`).

    Raises ValueError, one line that names the key, for a rule that verl cannot train.
    """
    if rule.anchor != "rollout":
        raise ValueError(f"anchor: {rule.anchor} is not for trainer verl, which keeps the rollout's log-probabilities")
    missing = sorted(needs - {"divergence"})
    if missing:
        raise ValueError(f"objective: needs {missing[0]} with these params, which verl does not give")
    if rule.advantage not in VERL_ADVANTAGES:
        raise ValueError(f"advantage: {rule.advantage} is not one of verl's: {', '.join(VERL_ADVANTAGES)}")
    if rule.divergence is not None and rule.divergence.estimator != "binary":
        raise ValueError(
            f"divergence.estimator: {rule.divergence.estimator} is not for trainer verl, which records the sampled token's "
            "log-probability only; take binary, for one setting alone in params_by_setting"
        )
    SampledTokenLoss.of(rule.objective, rule.params, divergence_of(rule))


def divergence_of(rule: RuleEntry) -> dict[str, Any] | None:
    """The rule's divergence as verl's configuration holds it; None for a rule without one."""
    return None if rule.divergence is None else rule.divergence.model_dump(exclude_none=True)


def data_parallel_ranks(setting: Setting, resources: Resources) -> int:
    """The number of data-parallel ranks of verl's trainer."""
    assert setting.scale is not None
    split = setting.scale.tensor_parallel if setting.scale.sharding == "megatron" else 1
    return resources.gpus * resources.nodes // split


def micro_rows(setting: Setting, resources: Resources) -> int:
    """The number of responses that a rank takes through one forward and backward pass."""
    assert setting.scale is not None
    whole = setting.rollout.minibatch * setting.rollout.responses // data_parallel_ranks(setting, resources)
    return setting.scale.micro_rows or whole
