"""The same objectives inside other trainers: `trl.TrustRegionTrainer`, and the policy losses that `verl` registers.

Both record the log-probability of the sampled token only, so binary TV and KL are the divergences they can have.
Importing this package imports neither trl nor verl; their modules do.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from cppo import divergences
from cppo.loss import Aggregation, Metrics, policy_loss
from cppo.objectives import Objective, Tokens, objective


@dataclass(frozen=True)
class SampledTokenLoss:
    """The loss of an objective whose divergence comes from the sampled token alone.

    >>> rule = SampledTokenLoss.of("dppo", {"delta": 0.2}, {"estimator": "binary", "kind": "tv"})
    >>> rule.objective.params.delta
    0.2
    """

    objective: Objective
    kind: divergences.Kind | None
    """The kind of the binary divergence; None = no divergence is computed."""

    @classmethod
    def of(
        cls, name: str, params: Mapping[str, object] | None = None, divergence: Mapping[str, object] | None = None
    ) -> "SampledTokenLoss":
        """The objective `name` with `params`; `divergence` as in a suite: {"estimator": "binary", "kind": "tv" or "kl"}.

        A rule that needs no divergence may have one all the same: it is then only logged.

        Raises ValueError for anything unknown, an estimator that needs more than the sampled token, a divergence rule
        without a divergence, and a rule that needs other inputs (shuffled positions).
        """
        rule = cls(objective(name, **(params or {})), None if divergence is None else _binary_kind(divergence))
        missing = sorted(rule.objective.needs - {"divergence"})
        if missing:
            raise ValueError(f"objective {name} needs {missing[0]} with these params, which is not recorded here")
        if "divergence" in rule.objective.needs and rule.kind is None:
            raise ValueError(f"divergence: objective {name} needs one: {{estimator: binary, kind: tv}} or kind: kl")
        return rule

    def __call__(
        self,
        logp: Tensor,
        rollout_logp: Tensor,
        advantages: Tensor,
        mask: Tensor,
        aggregation: Aggregation,
        horizon: int | None = None,
        denominator: float | None = None,
    ) -> tuple[Tensor, Metrics]:
        """The loss (a scalar) and the metrics of one batch, as `policy_loss`; all tensors are [B, T], `mask` is bool."""
        divergence = None if self.kind is None else divergences.binary(logp, rollout_logp, self.kind)
        tokens = Tokens(logp, rollout_logp, advantages, mask, divergence)
        return policy_loss(self.objective, tokens, aggregation, horizon, denominator)


def _binary_kind(divergence: Mapping[str, object]) -> divergences.Kind:
    estimator, kind = divergence.get("estimator", "binary"), divergence.get("kind", "tv")
    if estimator != "binary":
        raise ValueError(
            f"divergence.estimator: {estimator} is not possible here, only the sampled token is recorded: binary"
        )
    unknown = [key for key in divergence if key not in ("estimator", "kind")]
    if unknown:
        raise ValueError(f"divergence.{unknown[0]}: unknown for estimator binary; known: estimator, kind")
    if kind == "tv":
        return "tv"
    if kind == "kl":
        return "kl"
    raise ValueError(f"divergence.kind: {kind!r} is not one of 'tv', 'kl'")
