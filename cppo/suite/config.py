"""Types of rules and runs. Frozen and fully checked; those of a setting are in `cppo.suite.setting`.

What needs the registries of objectives, advantages and divergences is checked where a suite is resolved (`cppo.suite.suite`).
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from cppo.loss import Aggregation
from cppo.suite.schema import (
    LATER,
    Config,
    Count,
    ImportPath,
    Name,
    Positive,
    Seed,
    content_hash,
    parse,
)
from cppo.suite.setting import Setting

Registered = Annotated[str, Field(pattern=rf"^(\w+|{ImportPath})$")]
"""The name of something in a registry of the package, or "module:function" of one's own."""


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
