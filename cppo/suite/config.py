"""Types of settings, rules and runs: frozen, fully checked configuration."""

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from cppo.suite.schema import Betas, Commit, Config, Count, Name, Positive, Seed, Share, content_hash, parse, unique


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


class Benchmark(Config):
    """A held-out set of problems of one difficulty; stands in for one AIME year."""

    name: Name
    """The lm-eval task's name."""
    steps: Annotated[int, Field(ge=1, le=20)]
    """Length of every chain in it."""
    problems: Count
    """How many problems."""


class Task(Config):
    """The noisy modular chain (see `cppo.tasks.types`): step-by-step arithmetic modulo 10 with a boxed answer."""

    family: Literal["chain"] = "chain"
    """Kind of problem."""
    steps: tuple[Annotated[int, Field(ge=1, le=20)], ...] = Field(min_length=1)
    """Chain lengths of the training problems, equally often."""
    problems: Count
    """Size of the training set; reused in a new order when exhausted."""
    weak: Share
    """Probability that an entry of the arithmetic table is shown wrongly most of the time in the warm start."""
    benchmarks: tuple[Benchmark, ...] = Field(min_length=1)
    """Held-out sets, disjoint from the training problems."""

    @model_validator(mode="after")
    def _distinct(self) -> "Task":
        unique([b.name for b in self.benchmarks], "benchmarks: name")
        if "train" in (b.name for b in self.benchmarks):
            raise ValueError("benchmarks: the name 'train' is taken by the training problems")
        return self


class Dataset(Config):
    """A published set of problems that `cppo.tasks.published` knows how to read."""

    name: Literal["dapo_math_17k", "aime24", "aime25", "aime26", "math500", "gsm8k", "gsm8k_train"]
    """Which one; also the lm-eval task's name."""
    revision: Commit | None = None
    """The hub's commit; needed unless `data_dir` holds the file."""


class TrainingSet(Dataset):
    """Training problems: what is empty, repeated, contradictory or part of a benchmark is dropped and counted."""

    rows: Count
    """Rows that its file must hold, repeats included; another number is an error."""


class HeldOutSet(Dataset):
    """A benchmark: must be whole, so an empty or repeated problem is an error."""

    problems: Count
    """Problems that its file must hold; another number is an error."""


class MathTask(Config):
    """Competition mathematics in words: published training problems and benchmarks, the paper's task."""

    family: Literal["math"]
    """Kind of problem."""
    train: TrainingSet
    """The training problems."""
    benchmarks: tuple[HeldOutSet, ...] = Field(min_length=1)
    """Held-out sets."""
    data_dir: str | None = None
    """Folder with the data sets' files, <data_dir>/<name>/*.parquet, .jsonl or .csv, if there is no hub; None = hub."""
    prompt: Literal["chat", "base"]
    """chat = the tokenizer's chat template; base = plain text for a model that knows no chat."""
    enable_thinking: bool | None = None
    """The chat template's flag of this name (Qwen3: think before answering); None = the template's own default."""
    instruction: str
    """What follows the question on a line of its own, such as a request for a boxed answer."""
    max_prompt_tokens: Count
    """A training problem with a longer prompt is left out, and counted."""

    @model_validator(mode="after")
    def _fits(self) -> "MathTask":
        unique([b.name for b in self.benchmarks], "benchmarks: name")
        if self.train.name in (b.name for b in self.benchmarks):
            raise ValueError(f"benchmarks: {self.train.name} is the training set")
        for wanted in (self.train, *self.benchmarks):
            if self.data_dir is None and wanted.revision is None:
                raise ValueError(f"{wanted.name}: revision is missing: the hub needs a commit; or set data_dir")
        if self.enable_thinking is not None and self.prompt != "chat":
            raise ValueError("enable_thinking is for prompt chat")
        if any(mark in self.instruction for mark in ("{{", "{%", "{#")):
            raise ValueError("instruction: {{, {% and {# have a meaning in lm-eval's task files; write { { instead")
        return self


class WarmStart(Config):
    """Supervised training on noisy demonstrations that makes the base model; one for all runs of a setting."""

    max_steps: Count
    """Give up (with an error) when `target_accuracy` is not reached by then."""
    target_accuracy: Share
    """Stop at this sampled accuracy (temperature 1), the mean over the task's training lengths."""
    check_every: Count
    """Steps between two measurements of the accuracy."""
    batch: Count
    """Demonstrations a step."""
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


class RolloutPlan(Config):
    """How many responses are sampled and how they are split into updates (Table 3's columns)."""

    prompts: Count
    """Prompts a rollout."""
    responses: Annotated[int, Field(ge=2)]
    """Responses a prompt; the group whose mean is the baseline."""
    minibatch: Count
    """Prompts a minibatch (one optimiser step); divides `prompts`."""
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
        """Optimiser steps a rollout."""
        return self.prompts // self.minibatch

    @model_validator(mode="after")
    def _divides(self) -> "RolloutPlan":
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
    lam: Share = 0.95
    """GAE's lambda."""
    value_clip: Positive = 0.2
    """How far a value may move from the rollout's before its gradient is dropped."""


class Scale(Config):
    """How a run uses accelerators and processes; left out for the embedded CPU suites."""

    engine: Literal["torch", "vllm", "verl"] = "torch"
    """What samples: our loop on the policy itself; vLLM beside it; or verl, which runs the whole training."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of forward and backward passes; weights, log-probabilities and losses are float32 in any case."""
    sharding: Literal["ddp", "fsdp2", "megatron"] = "ddp"
    """With several processes: a whole copy of the model in each, or a share of it; megatron only for engine verl."""
    tensor_parallel: Count = 1
    """Engine verl: GPUs of a node that hold one copy of the model in vLLM, and of the policy with megatron."""
    expert_parallel: Count = 1
    """Megatron: GPUs over which a layer's experts are spread."""
    micro_rows: Count | None = None
    """Responses in one forward and backward pass; None = the whole minibatch at once. Changes no result but rounding."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    vllm_gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs of vLLM's own; 0 = it shares the trainer's and sleeps during updates."""
    vllm_memory: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Share of a GPU's memory that vLLM may take."""
    vllm_tolerance: Positive | None = None
    """Largest 99% quantile of |log pi - log mu| between vLLM and the trainer at the same weights; a larger one means that
    the weights did not arrive, and ends the run. None = 0.001 in float32, 0.2 in bfloat16."""

    @property
    def tolerance(self) -> float:
        """`vllm_tolerance` or its default."""
        return self.vllm_tolerance or {"float32": 1e-3, "bfloat16": 0.2}[self.precision]


class Resources(Config):
    """What a job of a setting asks the cluster for; changes no number and no run id."""

    gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs on each node; also the processes that train."""
    nodes: Count = 1
    """Nodes; more than one only for engine verl."""
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
    return "published" if isinstance(raw, Pretrained) or (isinstance(raw, dict) and "name" in raw) else "created"


def _kind_of_task(raw: Any) -> str:
    return "math" if isinstance(raw, MathTask) or (isinstance(raw, dict) and raw.get("family") == "math") else "chain"


_TAGS = {("model", "created"), ("model", "published"), ("task", "chain"), ("task", "math")}
"""What pydantic adds to the place of an error below such a key."""
AnyModel = Annotated[
    Annotated[Model, Tag("created")] | Annotated[Pretrained, Tag("published")], Discriminator(_kind_of_model)
]
AnyTask = Annotated[Annotated[Task, Tag("chain")] | Annotated[MathTask, Tag("math")], Discriminator(_kind_of_task)]


class Setting(Config):
    """One column of the paper's tables: a base model with its task and training plan."""

    title: Annotated[str, Field(min_length=1, max_length=60)]
    """What tables and figures call it."""
    model: AnyModel
    """The architecture to create, or a published checkpoint."""
    task: AnyTask
    """Training and held-out problems."""
    warm_start: WarmStart | None = None
    """How the base model is made from a created one; left out for a published checkpoint."""
    rollout: RolloutPlan
    """Rollouts and minibatches."""
    optimizer: Optimizer
    """The policy's optimiser."""
    critic: Critic = Critic()
    """For advantages `gae` only."""
    iterations: Count
    """Rollouts in a run."""
    checkpoint_every: Count
    """Iterations between two scored checkpoints; divides `iterations`."""
    collapse_after: Count = 5
    """Non-finite updates in a row after which the run ends and is reported as collapsed."""
    scale: Scale | None = None
    """Accelerators and processes; None = the torch engine in one process in float32."""

    @property
    def engine(self) -> Literal["torch", "vllm", "verl"]:
        """What samples."""
        return "torch" if self.scale is None else self.scale.engine

    @model_validator(mode="after")
    def _fits(self) -> "Setting":
        created, chain = isinstance(self.model, Model), isinstance(self.task, Task)
        if created != (self.warm_start is not None):
            raise ValueError("warm_start is for a created model, which needs it; a published one has none")
        if created != chain:
            raise ValueError("task.family: a created model knows only the chain, a published one only math")
        return self

    @model_validator(mode="after")
    def _divides(self) -> "Setting":
        if self.iterations % self.checkpoint_every:
            raise ValueError(f"checkpoint_every {self.checkpoint_every} does not divide iterations {self.iterations}")
        if isinstance(self.task, MathTask):
            return self
        longest = max((*self.task.steps, *(b.steps for b in self.task.benchmarks)))
        needed = 6 * longest + 4
        if self.rollout.max_response_tokens < needed:
            raise ValueError(
                f"rollout.max_response_tokens {self.rollout.max_response_tokens} is too short: "
                f"a chain of {longest} steps takes {needed} tokens"
            )
        return self


class Evaluation(Config):
    """Avg@k on the held-out sets, through lm-eval."""

    samples: Count
    """Responses a problem: the k of Avg@k."""
    temperature: Positive = 0.7
    """Sampling temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Nucleus: the smallest set of tokens with at least this probability."""


class Divergence(Config):
    """Which estimate of the token divergence a divergence rule gets."""

    estimator: Literal["binary", "top_k", "exact"]
    """binary = the sampled token against the rest; top_k = mu's K likeliest, the sampled one, the rest; exact = all."""
    kind: Literal["tv", "kl"] = "tv"
    """Total variation, or KL from mu to pi."""
    k: Count | None = None
    """K of top_k; must be below the vocabulary's size."""
    support: Literal["union", "replace"] | None = None
    """top_k: add the sampled token to the K (union, default), or overwrite the K-th with it (replace)."""

    @model_validator(mode="after")
    def _fits(self) -> "Divergence":
        if (self.estimator == "top_k") != (self.k is not None):
            raise ValueError("k is for estimator top_k, which needs it")
        if self.support is not None and self.estimator != "top_k":
            raise ValueError("support is for estimator top_k")
        return self


class ObjectiveEntry(Config):
    """One row of the tables: an objective with its settings."""

    name: Name
    """Its label in tables, figures and paths."""
    objective: Annotated[str, Field(pattern=r"^(\w+|\w+(\.\w+)*:\w+)$")]
    """A registered objective (`python -m cppo objectives`), or "module:function" of your own."""
    settings: dict[str, Any] = {}
    """The objective's own settings; what is not given keeps its default."""
    by_setting: dict[Name, dict[str, Any]] = {}
    """Settings that differ for a named setting of the suite (as delta in the paper's Table 3), and `divergence` if it does."""
    divergence: Divergence | None = None
    """The divergence; exactly for the rules that need one."""
    advantage: Literal["grpo", "dr_grpo", "rloo", "gpg", "reinforce_pp", "reinforce_pp_baseline", "gae"] = "grpo"
    """Estimator of `cppo.advantages`: grpo = (R - mean) / std in the group; dr_grpo = R - mean; gae = from a critic; ..."""
    aggregation: Literal[
        "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-sum"
    ] = "token-mean"
    """How token losses become one (see `cppo.loss.policy_loss`)."""
    anchor: Literal["rollout", "recomputed", "decoupled"] = "rollout"
    """What ratios and divergences refer to: mu as sampled; the policy recomputed before the first update; or the latter with
    the truncated weight min(pi_old / mu, tis_cap) on the advantages."""
    tis_cap: Positive = 2.0
    """Largest truncated importance weight of anchor decoupled."""


class RunConfig(Config):
    """Everything that determines a run's numbers, nothing else."""

    label: Name
    """The objective entry's name."""
    setting: Name
    """The setting's name; an axis of the seeds."""
    seed: Seed
    """Varies the order of problems and the sampling; the base model is shared."""
    plan: Setting
    """The setting."""
    objective: ObjectiveEntry
    """The objective, with every setting spelled out."""
    evaluation: Evaluation
    """How its checkpoints are scored."""

    @property
    def id(self) -> str:
        """The run's id: hash of this configuration without the setting's title, which changes no number.

        `scale` came later and is left out while absent, so that older runs keep their ids.
        """
        unhashed = {"title", "scale"} if self.plan.scale is None else {"title"}
        return content_hash(self.model_dump(mode="json", exclude={"plan": unhashed}))

    @property
    def folder(self) -> str:
        """The run directory under the root (`runs/`)."""
        return f"train/{self.label}/{self.id}"

    @property
    def base(self) -> "BaseConfig":
        """The warm start that this run begins from."""
        return BaseConfig(setting=self.setting, plan=self.plan, evaluation=self.evaluation)


class BaseConfig(Config):
    """What determines a base model and its score."""

    label: ClassVar[str] = "base"
    seed: ClassVar[int] = 0
    """What tables hold for it in the columns of a run."""
    setting: Name
    """The setting's name; an axis of the seeds."""
    plan: Setting
    """The setting; of its keys only model, task, warm_start and the longest response count."""
    evaluation: Evaluation
    """How it is scored."""

    @property
    def id(self) -> str:
        """The base model's id: hash of what it depends on."""
        plan = self.plan
        parts = [
            self.setting,
            plan.model,
            plan.task,
            plan.warm_start,
            plan.rollout.max_response_tokens,
            self.evaluation,
        ]
        return content_hash(parts)

    @property
    def folder(self) -> str:
        """The base model's directory under the root."""
        return f"base/{self.setting}/{self.id}"

    @property
    def data(self) -> str:
        """The directory of its problems and lm-eval tasks under the root."""
        parts = [self.setting, self.plan.task, self.plan.rollout.max_response_tokens, self.evaluation]
        return f"data/{self.setting}/{content_hash(parts)}"


def read_config(folder: Path) -> RunConfig | BaseConfig:
    """The resolved configuration in the directory of a run or a base model.

    Raises ValueError when there is none, or when the directory's name is not its hash.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise ValueError(f"{path}: missing or not JSON; train the run (or make the base model) first") from None
    config = parse_run(raw, str(path))
    if config.id != folder.name:
        raise ValueError(f"{path}: its hash is {config.id}, not the directory's name: the file was edited; train again")
    return config


def parse_run(raw: object, where: str) -> RunConfig | BaseConfig:
    """The resolved configuration of a run or, without a seed, of a base model."""
    if isinstance(raw, dict) and "seed" in raw:
        return parse(RunConfig, raw, where)
    return parse(BaseConfig, raw, where)
