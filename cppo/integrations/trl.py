"""TRL's GRPOTrainer with one of our objectives as its loss.

    TrustRegionTrainer(model, reward_funcs, args, train_dataset=..., objective="cppo", params={"delta": 0.15},
                       divergence={"estimator": "binary", "kind": "tv"}, aggregation="token-mean")

Generation, rewards and advantages stay TRL's. Differences from GRPOTrainer: 1. the loss is `cppo.loss.policy_loss`.
2. ratios and divergences always refer to mu, the policy that sampled: its recorded log-probabilities, and where TRL has
none (generation with transformers) those of the weights that sampled, computed before the first update. 3. the
denominator is that of the optimiser step, exactly (TRL's own is the average step of the generation batch).

Left out, and refused instead of ignored: TRL's reference-policy KL, entropy bonus and masks of its own, and sampling
from a truncated distribution (top_p, top_k, min_p, repetition_penalty), whose log-probabilities would not be mu's.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from cppo.integrations import SampledTokenLoss
from cppo.loss import Aggregation, batch_denominator, check_aggregation

IGNORED = [
    "loss_type",
    "epsilon",
    "epsilon_high",
    "delta",
    "importance_sampling_level",
    "beta",
    "use_bias_correction_kl",
    "sync_ref_model",
    "entropy_coef",
    "use_adaptive_entropy",
    "top_entropy_quantile",
    "off_policy_mask_threshold",
    "sapo_temperature_pos",
    "sapo_temperature_neg",
    "vespo_k_pos",
    "vespo_k_neg",
    "vespo_lambda_pos",
    "vespo_lambda_neg",
]
"""Settings of TRL's own loss, which is not used."""
TRUNCATING = ("top_p", "top_k", "min_p", "repetition_penalty")
"""Settings that truncate or distort the sampling distribution."""
MULTIMODAL = [
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
]
"""Keys of TRL's batch that a model of images takes besides token ids."""


class TrustRegionTrainer(GRPOTrainer):  # type: ignore[misc]
    """A GRPOTrainer whose loss is one of our objectives, anchored on the rollout policy.

    objective, params: a name of `cppo.objectives.names()` or "module:function", and its hyper-parameters.
    divergence: {"estimator": "binary", "kind": "tv" or "kl"}; needed by the divergence rules.
    aggregation: a mode of `cppo.loss.policy_loss`; its denominator is that of the whole optimiser step on all ranks.
    horizon: for seq-mean-token-sum-norm; None = `max_completion_length`.

    Raises ValueError for an unknown parameter, an estimator other than binary, a setting of `args` that belongs to the
    replaced loss, a truncated sampling distribution, and optimiser steps that span two generations.
    """

    _name = "TrustRegion"

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        *others: Any,
        objective: str = "cppo",
        params: Mapping[str, object] | None = None,
        divergence: Mapping[str, object] | None = None,
        aggregation: Aggregation = "token-mean",
        horizon: int | None = None,
        **keywords: Any,
    ) -> None:
        self.rule = SampledTokenLoss.of(objective, params, divergence)
        args = GRPOConfig("trust-region") if args is None else args
        check_arguments(args)
        if aggregation == "seq-mean-token-sum-norm" and horizon is None:
            horizon = args.max_completion_length
        check_aggregation(aggregation, horizon)
        self.aggregation, self.horizon = aggregation, horizon
        # name -> (sum, count) since the last logged line, over this rank's micro-batches.
        self._totals: dict[str, dict[str, Tensor]] = {"train": defaultdict(zeros), "eval": defaultdict(zeros)}
        super().__init__(model, reward_funcs, args, *others, **keywords)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's batch plus `rollout_logp` [B, T], the anchor of every update of this rollout."""
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        sampled = batch.get("sampling_per_token_logps")
        mask = trained(batch)
        missing = mask if sampled is None else mask & sampled.isnan()  # vLLM gives NaN where it could not score
        now = batch.get("old_per_token_logps")  # TRL's, where it has computed them: also of the weights that sampled
        if now is None and self.accelerator.reduce(missing.sum(), "sum") > 0:
            args = self.args
            rows = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
            with torch.no_grad():
                now, _, _ = self._token_logprobs(self.model, batch, batch_size=rows)
        if sampled is None:
            batch["rollout_logp"] = now
        else:
            batch["rollout_logp"] = sampled if now is None else torch.where(missing, now, sampled)
        return batch

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """TRL's micro-batch plus `denominator`, that of the optimiser step it belongs to, on all ranks."""
        batch: dict[str, Any] = super()._prepare_inputs(generation_batch)
        parts = [batch]
        if self.model.training:
            window, slices = self.args.gradient_accumulation_steps, self._buffered_inputs
            first = self._step - self._step % window
            parts = [slices[step % len(slices)] for step in range(first, first + window)]
        share = sum(batch_denominator(trained(part), self.aggregation) for part in parts)
        total = self.accelerator.reduce(torch.tensor(share, device=batch["completion_ids"].device), "sum")
        return {**batch, "denominator": float(total) or None}  # no trained token at all: the loss is 0

    def _token_logprobs(self, model: Any, batch: dict[str, Any], **options: Any) -> tuple[Tensor, Any, Any]:
        """TRL's (log-probabilities [B, T], entropies, MoE auxiliary loss) of a batch's completions."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        images = {key: batch[key] for key in MULTIMODAL if key in batch}
        width = batch["completion_ids"].shape[1]
        computed: tuple[Tensor, Any, Any] = self._get_per_token_logps_and_entropies(
            model, ids, attention, width, **images, **options
        )
        return computed

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        logp, entropy, auxiliary = self._token_logprobs(
            model, inputs, compute_entropy=True, compute_aux_loss=self.aux_loss_enabled
        )
        mask, advantages = trained(inputs), inputs["advantages"]
        advantages = (advantages.unsqueeze(1) if advantages.dim() == 1 else advantages).expand_as(mask)
        loss, metrics = self.rule(
            logp, inputs["rollout_logp"], advantages, mask, self.aggregation, self.horizon, inputs["denominator"]
        )
        ranks: int = self.accelerator.num_processes
        loss = loss * ranks  # gradients are averaged over the ranks
        mode = "train" if self.model.training else "eval"
        if self.aux_loss_enabled:  # the load-balancing loss of a mixture of experts, as in TRL
            parts = self.current_gradient_accumulation_steps if mode == "train" else 1
            balance: Tensor = self.router_aux_loss_coef * auxiliary / parts
            loss = loss + balance
            metrics["aux_loss"] = (float(auxiliary.detach()), 1.0)
        metrics["entropy"] = (float(torch.where(mask, entropy.detach(), 0).sum()), float(mask.sum()))
        for name, value in metrics.items():
            self._totals[mode][name] = self._totals[mode][name] + torch.tensor(value, dtype=torch.float64)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log line with our metrics: sums over all micro-batches and ranks, divided once."""
        mode = "train" if self.model.training else "eval"
        for name, value in sorted(self._totals[mode].items()):  # the same order on every rank
            total, count = self.accelerator.reduce(value.to(self.accelerator.device), "sum").tolist()
            self._metrics[mode][name] = [total / count if count else float("nan")]  # TRL logs NaN as null
        self._totals[mode].clear()
        super().log(logs, start_time)


def zeros() -> Tensor:
    """(sum, count) = (0, 0)."""
    return torch.zeros(2, dtype=torch.float64)


def trained(batch: dict[str, Any]) -> Tensor:
    """bool [B, T]: completion tokens that are trained; tool output is not."""
    mask: Tensor = batch["completion_mask"].bool()
    return mask & batch["tool_mask"].bool() if "tool_mask" in batch else mask


def check_arguments(args: Any) -> None:
    """Raise ValueError for a setting of GRPOConfig that this trainer would ignore, or that makes its numbers wrong."""
    defaults = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    for name in IGNORED:
        if getattr(args, name) != defaults[name]:
            raise ValueError(f"args.{name}: belongs to TRL's own loss; leave it out, the objective's params replace it")
    sampling = {name: getattr(args, name) for name in TRUNCATING} | dict(args.generation_kwargs or {})
    if sampling.get("temperature", args.temperature) != args.temperature:
        raise ValueError(
            "args.generation_kwargs: give temperature as args.temperature, for sampling and training alike"
        )
    for name in TRUNCATING:
        if sampling[name] != defaults[name]:
            raise ValueError(
                f"args.{name}: {sampling[name]} truncates the sampling distribution; mu would be another one"
            )
    window, generation = args.gradient_accumulation_steps, args.steps_per_generation * args.num_iterations
    if generation % window:
        raise ValueError(
            f"args.gradient_accumulation_steps: {window} must divide steps_per_generation * num_iterations = {generation}"
        )
