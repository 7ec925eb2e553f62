"""Types of everything that a suite configures: models, settings, rules and runs. Frozen and fully checked.

What needs the registries of objectives, advantages and divergences is checked where a suite is resolved (`cppo.suite.suite`).
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from cppo.loss import Aggregation
from cppo.rollout.engines import ENGINES
from cppo.suite.schema import (
    LATER,
    NOT_HASHED,
    Betas,
    Commit,
    Config,
    Count,
    ImportPath,
    Name,
    Positive,
    Seed,
    Share,
    content_hash,
    parse,
)
from cppo.tasks import AnyTask
from cppo.tasks.types import GeneratedTask

Registered = Annotated[str, Field(pattern=rf"^(\w+|{ImportPath})$")]
"""The name of something in a registry of the package, or "module:function" of one's own."""
TITLE_TOLERANCE = 0.02
"""Relative error of a parameter count in a title: what rounding to two or three digits leaves."""


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
    """Width of the feed-forward layer; of one expert for qwen3_moe."""
    experts: Annotated[int, Field(ge=0)] = 0
    """Experts a layer (qwen3_moe only)."""
    experts_per_token: Annotated[int, Field(ge=0)] = 0
    """Experts that each token uses (qwen3_moe only)."""
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
        """All parameters with a vocabulary of this size, and those that each token uses."""
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
    """The hub's commit; needed for a hub name, not for a folder."""

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
    """Supervised training on noisy demonstrations that makes the base model; one for all runs of a setting."""

    max_steps: Count
    """Give up (with an error) when `target_accuracy` is not reached by then."""
    target_accuracy: Share
    """Stop at this sampled accuracy (temperature 1), the mean over the task's training sizes."""
    check_every: Count
    """Steps between two measurements of the accuracy."""
    batch: Count
    """Demonstrations per step."""
    lr: Positive
    """Peak learning rate of AdamW; linear warm-up, then cosine to a tenth at `max_steps`."""
    warmup_steps: Annotated[int, Field(ge=0)] = 40
    """Steps of linear warm-up."""
    betas: Betas = (0.9, 0.98)
    """AdamW's averaging coefficients."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's weight decay."""
    grad_clip: Positive = 1.0
    """Largest gradient norm."""


class RolloutConfig(Config):
    """How many responses are sampled and how they are split into updates (Table 3's columns)."""

    prompts: Count
    """Prompts per rollout."""
    responses: Annotated[int, Field(ge=2)]
    """Responses per prompt: the group whose mean is the baseline."""
    minibatch: Count
    """Prompts per minibatch, which is one optimiser step; divides `prompts`."""
    max_response_tokens: Count
    """Longest response; a longer one is truncated and judged as it is."""
    temperature: Positive = 1.0
    """Sampling temperature; the log-probabilities of both policies are taken at it."""
    overlong_buffer: Annotated[int, Field(ge=0)] = 0
    """DAPO's overlong shaping: the reward falls by up to 1 over this many last tokens before the limit; 0 = off."""
    resample: Annotated[int, Field(ge=0)] = 0
    """DAPO's dynamic sampling: so many more rollouts may be drawn to replace prompts of zero reward variance; 0 = off."""

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
    """Learning rate after the warm-up; constant."""
    warmup_updates: Annotated[int, Field(ge=0)] = 10
    """Optimiser steps of linear warm-up."""
    betas: Betas = (0.9, 0.999)
    """Averaging coefficients."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay."""
    grad_clip: Positive = 1.0
    """Largest gradient norm."""


class Critic(Config):
    """PPO's value model: separate, started from the base model, with its own optimiser."""

    lr_factor: Positive = 10.0
    """Its learning rate in units of the policy's."""
    gamma: Share = 1.0
    """Discount."""
    gae_lambda: Share = 0.95
    """Lambda of generalised advantage estimation (GAE)."""
    value_clip: Positive = 0.2
    """How far a value may move from the rollout's before its gradient is dropped."""


class Scale(Config):
    """How a run uses accelerators and processes; left out for the embedded CPU suites."""

    trainer: Literal["builtin", "verl"] = "builtin"
    """Which program trains: this package's loop, or verl, which also samples by itself with vLLM."""
    engine: str = "torch"
    """Which engine generates the evaluation's responses and, for the built-in trainer, the rollouts: torch = on the policy
    itself, vllm = vLLM beside it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of forward and backward passes; weights, log-probabilities and losses are float32 in any case."""
    sharding: Literal["ddp", "fsdp2", "megatron"] = "ddp"
    """With several processes: a whole copy of the model in each, or a share of it; megatron only for trainer verl."""
    tensor_parallel: Count = 1
    """Trainer verl: GPUs of a node that hold one copy of the model in vLLM, and of the policy with megatron."""
    expert_parallel: Count = 1
    """Megatron: GPUs over which a layer's experts are spread."""
    micro_rows: Count | None = None
    """Responses in one forward and backward pass; None = the whole minibatch at once. Changes no result but rounding."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    engine_gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs of the engine's own; 0 = it shares the trainer's and sleeps during updates."""
    engine_memory: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Share of a GPU's memory that the engine may take."""
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
    """GPUs on each node; also the processes that train."""
    nodes: Count = 1
    """Nodes; more than one only for trainer verl."""
    cpus: Count = 1
    """CPU cores on each node."""
    memory_gb: Positive = 4.0
    """Main memory on each node."""
    hours: Positive = 1.0
    """Time limit of a training job; it resumes when it is hit."""
    evaluate_hours: Positive = 1.0
    """Time limit of an evaluation job, which takes one GPU where `gpus` is not 0."""
    parameters: Positive | None = None
    """Billions of parameters of a published model, for `python -m cppo plan` only; a created one's are counted."""
    active_parameters: Positive | None = None
    """Billions that each token uses, for a mixture of experts; None = all."""
    response_tokens: Count | None = None
    """Expected mean length of a response, for `python -m cppo plan` only; None = the longest, an upper bound."""

    @property
    def share(self) -> "Resources":
        """What goes with one GPU of a node, for jobs that cannot use more; the same where there is none."""
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
    """One column of the paper's tables: a base model with its task, rollouts and optimiser."""

    title: Annotated[str, Field(min_length=1, max_length=60), NOT_HASHED]
    """What tables and figures call it. A number of parameters in it (101k, 1.7B) must be that of a created model."""
    model: AnyModel
    """The architecture to create, or a published checkpoint."""
    task: AnyTask
    """Training and held-out problems."""
    warm_start: WarmStart | None = None
    """How the base model is made from a created one; left out for a published checkpoint."""
    rollout: RolloutConfig
    """Rollouts and minibatches."""
    optimizer: Optimizer
    """The policy's optimiser."""
    critic: Critic = Critic()
    """For advantages from a critic (`gae`) only."""
    iterations: Count
    """Iterations of a run; each is one rollout with its updates."""
    checkpoint_every: Count
    """Iterations between two scored checkpoints; divides `iterations`."""
    collapse_after: Count = 5
    """Non-finite updates in a row after which the run ends and is reported as collapsed."""
    scale: Scale | None = None
    """Accelerators and processes; None = the torch engine in one process in float32."""

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
        """Token texts of a created model; None for a published one, which brings its own tokenizer."""
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
    """Avg@k on the held-out sets, through lm-eval."""

    samples: Count
    """Responses per problem: the k of Avg@k."""
    temperature: Positive = 0.7
    """Sampling temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Nucleus: the smallest set of tokens with at least this probability."""


class Divergence(Config):
    """Which estimate of the token divergence a rule gets."""

    estimator: Registered
    """binary = the sampled token against the rest; top_k = mu's K likeliest, the sampled one, the rest; exact = all tokens;
    sampled = from the sampled token's ratio alone; or "module:function" of your own (see `cppo.divergences`)."""
    kind: str = "tv"
    """tv = total variation, kl = KL from mu to pi; k2, k3 for estimator sampled."""
    k: Count | None = None
    """K of an estimator on mu's likeliest tokens; it must be below the vocabulary's size."""
    support: Literal["union", "replace"] | None = None
    """top_k: add the sampled token to the K (union, default), or overwrite the K-th with it (replace)."""


class RuleEntry(Config):
    """One row of the tables: an objective with its parameters, and how its inputs and its loss are made."""

    name: Name
    """What the rule is called in tables, figures and paths."""
    objective: Registered
    """A registered objective (`python -m cppo objectives`), or "module:function" of your own."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Hyper-parameters of the objective; omitted ones keep their defaults. The text max_response_tokens stands for the
    setting's number."""
    params_by_setting: dict[Name, dict[str, Any]] = Field(default_factory=dict)
    """Parameters that differ in a named setting of the suite (as delta in the paper's Table 3), and `divergence` if it does."""
    divergence: Divergence | None = None
    """The divergence, exactly for the objectives that need one."""
    advantage: Registered = "grpo"
    """An estimator of `cppo.advantages` (grpo = (R - mean) / std in the group, dr_grpo = R - mean, gae = from a critic, ...),
    or "module:function" of your own."""
    aggregation: Aggregation = "token-mean"
    """How the losses of tokens become one (see `cppo.loss.policy_loss`)."""
    anchor: Literal["rollout", "recomputed", "decoupled"] = "rollout"
    """What ratios and divergences refer to: mu as sampled; the policy recomputed before the first update; or the latter with
    the truncated weight min(pi_old / mu, tis_cap) on the advantages."""
    tis_cap: Positive = 2.0
    """Largest truncated importance weight of anchor decoupled."""
    code: Annotated[dict[str, str], LATER] = Field(default_factory=dict)
    """Filled in when a suite is resolved: module -> hash of its code, for each module of your own that the rule uses."""

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and "settings" in raw:
            raise ValueError("settings: is now called params")
        return raw


class RunConfig(Config):
    """Everything that determines a run's numbers, nothing else."""

    rule: RuleEntry
    """The rule, with every parameter spelled out."""
    setting_name: Name
    """The setting's name; an axis of the seeds."""
    setting: Setting
    """The setting."""
    seed: Seed
    """Varies the order of problems and the sampling; the base model is shared."""
    evaluation: Evaluation
    """How its checkpoints are scored."""

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
        """The run directory under the root (`runs/`)."""
        return f"train/{self.rule_name}/{self.id}"

    @property
    def base(self) -> "BaseConfig":
        """The base model that this run begins from."""
        return BaseConfig(setting_name=self.setting_name, setting=self.setting, evaluation=self.evaluation)


class BaseConfig(Config):
    """What determines a base model and its score."""

    rule_name: ClassVar[str] = "base"
    seed: ClassVar[int] = 0
    """What tables hold for it in the columns of a run."""
    setting_name: Name
    """The setting's name; an axis of the seeds."""
    setting: Setting
    """The setting; of its keys only model, task, warm_start and the longest response count."""
    evaluation: Evaluation
    """How it is scored."""

    @property
    def id(self) -> str:
        """The base model's id: the hash of what it depends on. The rest of the setting is training's."""
        setting = self.setting
        return content_hash([setting.model, setting.warm_start, *self._problems])

    @property
    def folder(self) -> str:
        """The base model's directory under the root."""
        return f"base/{self.setting_name}/{self.id}"

    @property
    def data(self) -> str:
        """The directory of its problems and lm-eval tasks under the root."""
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
