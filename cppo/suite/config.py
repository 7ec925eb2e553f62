"""The types of what a suite configures besides rules: models, settings, resources, runs. They are frozen and fully checked."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from cppo.rollout.engines import ENGINES
from cppo.suite.rule import RuleEntry
from cppo.suite.schema import (
    NOT_HASHED,
    Betas,
    Commit,
    Config,
    Count,
    Name,
    Positive,
    Seed,
    Share,
    content_hash,
    parse,
)
from cppo.tasks import AnyTask
from cppo.tasks.types import GeneratedTask

TITLE_TOLERANCE = 0.02
"""Largest relative error of a parameter count in a title: what rounding to two digits leaves."""


class Model(Config):
    """A small causal language model of a real architecture, saved as an ordinary Hugging Face checkpoint."""

    architecture: Literal["qwen3", "qwen3_moe"] = "qwen3"
    """Which transformers configuration to make small."""
    hidden_size: Count
    """Width of the residual stream."""
    layers: Count
    """Decoder layers."""
    heads: Count
    """Query heads."""
    kv_heads: Count
    """Key and value heads; divides `heads`."""
    head_dim: Annotated[int, Field(ge=2, multiple_of=2)]
    """Width of one head; even, for rotary positions."""
    intermediate_size: Count
    """Width of the feed-forward layer; for qwen3_moe the width of one expert."""
    experts: Annotated[int, Field(ge=0)] = 0
    """Experts per layer, for qwen3_moe only."""
    experts_per_token: Annotated[int, Field(ge=0)] = 0
    """Experts that each token uses, for qwen3_moe only."""
    tied: bool = True
    """Whether the output head shares the embedding's weights."""

    @model_validator(mode="after")
    def _possible(self) -> "Model":
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} does not divide heads {self.heads}")
        if (self.architecture == "qwen3_moe") != (self.experts > 0):
            raise ValueError("experts is for architecture qwen3_moe, which needs at least 1")
        if not min(self.experts, 1) <= self.experts_per_token <= self.experts:
            raise ValueError(f"experts_per_token {self.experts_per_token} must be between 1 and experts {self.experts}")
        return self

    def parameters(self, vocabulary: int) -> tuple[int, int]:
        """The number of all parameters with a vocabulary of this size, and the number of those that each token uses."""
        width, head = self.hidden_size, self.head_dim
        attention = 2 * width * head * (self.heads + self.kv_heads) + 2 * head
        expert = 3 * width * self.intermediate_size
        router = width * self.experts
        shared = vocabulary * width * (1 if self.tied else 2) + width
        layer = attention + router + 2 * width
        total = shared + self.layers * (layer + expert * max(self.experts, 1))
        active = shared + self.layers * (layer + expert * max(self.experts_per_token, 1))
        return total, active


class Pretrained(Config):
    """A published checkpoint, from the hub or a local folder."""

    name: Annotated[str, Field(pattern=r"^(\.{0,2}/.+|[\w.-]+/[\w.-]+)$", max_length=300)]
    """`organisation/model` on the Hugging Face hub, or the path of a checkpoint folder, which begins with /, ./ or ../"""
    revision: Commit | None = None
    """The commit on the hub. A name on the hub needs it; a folder has none."""

    @property
    def local(self) -> bool:
        """Whether the name is the path of a folder."""
        return self.name.startswith(("/", "./", "../"))

    @model_validator(mode="after")
    def _pinned(self) -> "Pretrained":
        if self.local == (self.revision is not None):
            raise ValueError("revision: a hub name needs the commit of 40 hex digits, a folder has none")
        return self


class WarmStart(Config):
    """Supervised training on noisy demonstrations, which makes the base model. All runs of a setting share it."""

    max_steps: Count
    """Largest number of steps. If `target_accuracy` is not reached by then, the warm start ends with an error."""
    target_accuracy: Share
    """The sampled accuracy at which the warm start stops: the mean over the task's training sizes, at temperature 1."""
    check_every: Count
    """Steps between two measurements of the accuracy."""
    batch: Count
    """Demonstrations per step."""
    lr: Positive
    """Peak learning rate of AdamW. It rises linearly, then falls along a cosine to a tenth at `max_steps`."""
    warmup_steps: Annotated[int, Field(ge=0)] = 40
    """Steps in which the learning rate rises."""
    betas: Betas = (0.9, 0.98)
    """AdamW's averaging coefficients."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's weight decay."""
    grad_clip: Positive = 1.0
    """Largest gradient norm."""


class RolloutConfig(Config):
    """How many responses are sampled, and how they are split into updates: columns of the paper's Table 3."""

    prompts: Count
    """Prompts per rollout."""
    responses: Annotated[int, Field(ge=2)]
    """Responses per prompt. They are the group whose mean reward an advantage is measured from."""
    minibatch: Count
    """Prompts per minibatch. A minibatch is one optimiser step; it must divide `prompts`."""
    max_response_tokens: Count
    """Most tokens of a response. A longer response is cut there and judged as it is."""
    temperature: Positive = 1.0
    """Sampling temperature. The log-probabilities of both policies are taken at it too."""
    overlong_buffer: Annotated[int, Field(ge=0)] = 0
    """The overlong shaping of DAPO (arXiv:2503.14476): the reward falls by up to 1 over this many last tokens before the limit.
    0 = off."""
    resample: Annotated[int, Field(ge=0)] = 0
    """The dynamic sampling of DAPO: up to this many more rollouts are drawn to replace prompts whose rewards are all equal.
    0 = off."""

    @property
    def updates(self) -> int:
        """Optimiser steps per rollout."""
        return self.prompts // self.minibatch

    @model_validator(mode="after")
    def _divides(self) -> "RolloutConfig":
        if self.prompts % self.minibatch:
            raise ValueError(f"minibatch {self.minibatch} does not divide prompts {self.prompts}")
        if self.overlong_buffer > self.max_response_tokens:
            raise ValueError(f"overlong_buffer {self.overlong_buffer} exceeds max_response_tokens")
        return self


class Optimizer(Config):
    """AdamW on the policy."""

    lr: Positive
    """Learning rate after the warm-up. It stays constant."""
    warmup_updates: Annotated[int, Field(ge=0)] = 10
    """Optimiser steps in which the learning rate rises linearly."""
    betas: Betas = (0.9, 0.999)
    """Averaging coefficients."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay."""
    grad_clip: Positive = 1.0
    """Largest gradient norm."""


class Critic(Config):
    """The value model of PPO (arXiv:1707.06347): a separate model that begins as the base model and has its own optimiser."""

    lr_factor: Positive = 10.0
    """The critic's learning rate divided by the policy's."""
    gamma: Share = 1.0
    """Discount factor of rewards."""
    gae_lambda: Share = 0.95
    """Lambda of generalised advantage estimation (GAE, arXiv:1506.02438)."""
    value_clip: Positive = 0.2
    """How far a value may move from the value at the rollout before its gradient is dropped."""


class Scale(Config):
    """How a run uses accelerators and processes. The embedded suites for CPUs leave it out."""

    trainer: Literal["builtin", "verl"] = "builtin"
    """Which program trains: this package's loop, or verl, which also samples by itself with vLLM."""
    engine: str = "torch"
    """Which engine generates the responses of the evaluation and, for the built-in trainer, those of the rollouts: torch = the
    policy itself, vllm = vLLM beside it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of forward and backward passes; weights, log-probabilities and losses are float32 in any case."""
    sharding: Literal["ddp", "fsdp2", "megatron"] = "ddp"
    """What each of several processes holds: a copy of the model (ddp) or a share of it. megatron is only for trainer verl."""
    tensor_parallel: Count = 1
    """For trainer verl: GPUs of a node that hold one copy of the model in vLLM, and of the policy with megatron."""
    expert_parallel: Count = 1
    """For sharding megatron: GPUs over which the experts of a layer are spread."""
    micro_rows: Count | None = None
    """Responses per forward and backward pass; None = the whole minibatch. It changes results by rounding only."""
    gradient_checkpointing: bool = False
    """Whether activations are computed again in the backward pass, which saves memory and takes a third more time."""
    engine_gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs that the engine has to itself; 0 = it shares the trainer's GPUs and sleeps during updates."""
    engine_memory: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Share of the memory of a GPU that the engine may take."""
    engine_tolerance: Positive | None = None
    """Largest 99% quantile of |log pi - log mu| between a separate engine and the trainer at the same weights. A larger one
    means that the weights did not arrive, and ends the run. None = 0.001 in float32, 0.2 in bfloat16."""

    @property
    def tolerance(self) -> float:
        """`engine_tolerance` or its default."""
        return self.engine_tolerance or {"float32": 1e-3, "bfloat16": 0.2}[self.precision]

    @model_validator(mode="after")
    def _known(self) -> "Scale":
        if self.engine == "verl":
            raise ValueError("engine: verl is a trainer, not an engine: write trainer: verl")
        if self.engine not in ENGINES:
            raise ValueError(f"engine: {self.engine!r} is not one of {', '.join(ENGINES)}")
        if self.trainer != "verl" and self.sharding == "megatron":
            raise ValueError("sharding: megatron is only for trainer verl")
        return self


class Resources(Config):
    """Cluster resources for the jobs of a setting. They affect neither results nor run ids."""

    gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs per node. As many processes train on it."""
    nodes: Count = 1
    """Nodes. More than one is only for trainer verl."""
    cpus: Count = 1
    """CPU cores per node."""
    memory_gb: Positive = 4.0
    """Main memory per node, in gigabytes."""
    hours: Positive = 1.0
    """Time limit of a training job. A job that hits it is submitted again and continues."""
    evaluate_hours: Positive = 1.0
    """Time limit of an evaluation job. The job takes one GPU where `gpus` is not 0."""
    parameters: Positive | None = None
    """Billions of parameters of a published model, for `cppo plan` only. Those of a created model are counted."""
    active_parameters: Positive | None = None
    """Billions of parameters that each token uses, for a mixture of experts; None = all."""
    response_tokens: Count | None = None
    """Expected mean length of a response in tokens, for `cppo plan` only; None = the longest, which is an upper bound."""

    @property
    def share(self) -> "Resources":
        """The part of a node that goes with one of its GPUs, for jobs that cannot use more; all of it where there is no GPU."""
        parts = max(self.gpus, 1)
        update = {
            "nodes": 1,
            "gpus": min(self.gpus, 1),
            "cpus": max(self.cpus // parts, 1),
            "memory_gb": self.memory_gb / parts,
        }
        return self.model_copy(update=update)


def _kind_of_model(raw: Any) -> str:
    published = isinstance(raw, Pretrained) or (isinstance(raw, Mapping) and "name" in raw)
    return "published" if published else "created"


AnyModel = Annotated[
    Annotated[Model, Tag("created")] | Annotated[Pretrained, Tag("published")], Discriminator(_kind_of_model)
]


class Setting(Config):
    """One column of the tables: a base model with its task, rollouts and optimiser."""

    title: Annotated[str, Field(min_length=1, max_length=60), NOT_HASHED]
    """What tables and figures call the setting. A parameter count in it, such as 101k, must be that of a created model."""
    model: AnyModel
    """The architecture to create, or a published checkpoint."""
    task: AnyTask
    """Training and held-out problems."""
    warm_start: WarmStart | None = None
    """How a created model becomes the base model; left out for a published checkpoint."""
    rollout: RolloutConfig
    """Rollouts and minibatches."""
    optimizer: Optimizer
    """The policy's optimiser."""
    critic: Critic = Critic()
    """The critic, for advantages that need one (`gae`)."""
    iterations: Count
    """Iterations per run. An iteration is one rollout with its updates."""
    checkpoint_every: Count
    """Iterations between two scored checkpoints. It must divide `iterations`."""
    collapse_after: Count = 5
    """Number of updates in a row with a loss or gradient that is not finite, after which the run ends as collapsed."""
    scale: Scale | None = None
    """Accelerators and processes; None = one process with engine torch, in float32."""

    @property
    def trainer(self) -> Literal["builtin", "verl"]:
        """Which program trains."""
        return "builtin" if self.scale is None else self.scale.trainer

    @property
    def engine(self) -> str:
        """Which engine generates the evaluation's responses and, for the built-in trainer, the rollouts."""
        return "torch" if self.scale is None else self.scale.engine

    @property
    def vocabulary(self) -> tuple[str, ...] | None:
        """The token texts of a created model; None for a published one, which has a tokenizer of its own."""
        return self.task.vocabulary if isinstance(self.task, GeneratedTask) else None

    @model_validator(mode="after")
    def _fits(self) -> "Setting":
        created, generated = isinstance(self.model, Model), isinstance(self.task, GeneratedTask)
        if created != (self.warm_start is not None):
            raise ValueError("warm_start is for a created model, which needs it; a published one has none")
        if created != generated:
            kind = (
                "created model knows only generated problems" if created else "published model needs problems in words"
            )
            raise ValueError(f"task.family: {self.task.family}: a {kind}; see cppo/tasks")
        return self

    @model_validator(mode="after")
    def _divides(self) -> "Setting":
        if self.iterations % self.checkpoint_every:
            raise ValueError(f"checkpoint_every {self.checkpoint_every} does not divide iterations {self.iterations}")
        if isinstance(self.task, GeneratedTask):
            size, tokens = self.task.longest_response
            if self.rollout.max_response_tokens < tokens:
                raise ValueError(
                    f"rollout.max_response_tokens {self.rollout.max_response_tokens} is too short: "
                    f"a problem of size {size} takes {tokens} tokens"
                )
        return self

    @model_validator(mode="after")
    def _title_is_true(self) -> "Setting":
        said = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)([kMB])(?![\w.])", self.title)
        if isinstance(self.model, Model) and self.vocabulary is not None and said is not None:
            total, _ = self.model.parameters(len(self.vocabulary))
            if abs(float(said[1]) * {"k": 1e3, "M": 1e6, "B": 1e9}[said[2]] / total - 1) > TITLE_TOLERANCE:
                raise ValueError(f"title: {self.title!r} says {said[0]} parameters, the model has {total:,}")
        return self


class Evaluation(Config):
    """How checkpoints are scored: Avg@k, the mean accuracy of k responses per problem, on the held-out sets through lm-eval."""

    samples: Count
    """Responses per problem: the k of Avg@k."""
    temperature: Positive = 0.7
    """Sampling temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Sampling is from the smallest set of tokens with at least this probability."""


class RunConfig(Config):
    """Everything that determines the numbers of a run, and nothing else."""

    rule: RuleEntry
    """The rule, with every parameter spelled out."""
    setting_name: Name
    """The setting's name, which the random seeds depend on."""
    setting: Setting
    """The setting itself."""
    seed: Seed
    """It varies the order of the problems and the sampling. The base model is shared."""
    evaluation: Evaluation
    """How the run's checkpoints are scored."""

    @property
    def rule_name(self) -> str:
        """The rule's name."""
        return self.rule.name

    @property
    def id(self) -> str:
        """The run's id: the hash of this configuration."""
        return content_hash(self)

    @property
    def folder(self) -> str:
        """The run's folder under the root (`runs/`)."""
        return f"train/{self.rule_name}/{self.id}"

    @property
    def base(self) -> "BaseConfig":
        """The base model that this run begins from."""
        return BaseConfig(setting_name=self.setting_name, setting=self.setting, evaluation=self.evaluation)


class BaseConfig(Config):
    """Everything that determines a base model and its scores."""

    rule_name: ClassVar[str] = "base"
    seed: ClassVar[int] = 0
    """What tables hold for a base model in the columns of a run."""
    setting_name: Name
    """The setting's name, which the random seeds depend on."""
    setting: Setting
    """The setting. Of its keys only model, task, warm_start and the longest response count."""
    evaluation: Evaluation
    """How the base model is scored."""

    @property
    def id(self) -> str:
        """The base model's id: the hash of what it depends on. The other keys of the setting are for training."""
        setting = self.setting
        return content_hash([setting.model, setting.warm_start, *self._problems])

    @property
    def folder(self) -> str:
        """The base model's folder under the root."""
        return f"base/{self.setting_name}/{self.id}"

    @property
    def data(self) -> str:
        """The folder of its problems and lm-eval tasks under the root."""
        return f"data/{self.setting_name}/{content_hash(self._problems)}"

    @property
    def _problems(self) -> list[Any]:
        return [self.setting_name, self.setting.task, self.setting.rollout.max_response_tokens, self.evaluation]


def parse_run(raw: object, where: str) -> RunConfig | BaseConfig:
    """The resolved configuration of a run or, without a seed, of a base model.

    Raises ValueError, one line that begins with `where`, for anything else.
    """
    if isinstance(raw, dict) and "seed" in raw:
        return parse(RunConfig, raw, where)
    return parse(BaseConfig, raw, where)
