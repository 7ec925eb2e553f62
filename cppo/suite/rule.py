"""The types of a rule as a suite names it: an objective, its parameters, and how its inputs and its loss are made.

The registries of objectives, advantages and divergences are not known here. What needs them is checked where a suite is
resolved (`cppo.suite.suite`).
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cppo.loss import Aggregation
from cppo.suite.schema import LATER, Config, Count, ImportPath, Name, Positive

Registered = Annotated[str, Field(pattern=rf"^(\w+|{ImportPath})$")]
"""The name of an entry in one of the package's registries, or "module:function" of your own."""


class Divergence(Config):
    """Which estimate of the token divergence a rule is given."""

    estimator: Registered
    """binary = the sampled token against the rest; top_k = mu's K likeliest, the sampled one, the rest; exact = all tokens;
    sampled = from the sampled token's ratio alone; or "module:function" of your own (see `cppo.divergences`)."""
    kind: str = "tv"
    """tv = total variation; kl = Kullback-Leibler divergence from mu to pi; k2 and k3 are for estimator sampled."""
    k: Count | None = None
    """K of an estimator on mu's likeliest tokens. It must be below the vocabulary's size."""
    support: Literal["union", "replace"] | None = None
    """For top_k: whether the sampled token is added to the K (union, the default) or replaces the K-th (replace)."""


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
    """Filled in when a suite is resolved, not in a file: module -> hash of its code, for each module of your own that the rule
    uses."""

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and "settings" in raw:
            raise ValueError("settings: is now called params")
        return raw
