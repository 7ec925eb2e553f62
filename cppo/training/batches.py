"""A rollout and everything that its updates need: sampled, graded, anchored, with advantages.

Legend: P prompts, G responses per prompt, B = P G rows (a prompt's rows are neighbours), T tokens, K top-K, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cppo import advantages, divergences
from cppo.diagnostics import Stopwatch, mismatch_metrics
from cppo.loss import Metrics
from cppo.models.logprobs import TokenLogprobs, token_logprobs
from cppo.objectives import Objective
from cppo.rewards import Judge, overlong_penalty
from cppo.rollout.types import Engine, Record, Rollouts, concatenate, widen
from cppo.suite.config import Divergence, RunConfig, Scale
from cppo.system.seeds import torch_generator, uniforms
from cppo.tasks.types import Problem
from cppo.training.critic import ValueModel
from cppo.training.distributed import Learner, all_gather, largest_slice, rank_slice

PROBED_ROWS = 16
"""Responses of a rollout on which the engine's log-probabilities are compared with the trainer's, on each rank."""


@dataclass(frozen=True)
class GradedRollouts:
    """Responses with their verdicts."""

    problems: tuple[Problem, ...]
    """B problems."""
    rollouts: Rollouts
    """The responses, with mu's log-probabilities as sampled; in a `Batch` with the anchor's, which may be recomputed."""
    verdicts: Tensor
    """[B]: 1 right, 0 wrong, NaN without a verdict."""
    rewards: Tensor
    """[B]: the verdict plus any shaping, NaN without a verdict."""

    def groups(self, keep: Tensor, group: int) -> "GradedRollouts":
        """The groups (prompts) at these indices."""
        rows = (keep.unsqueeze(1) * group + torch.arange(group)).view(-1)
        problems = tuple(self.problems[i] for i in rows.tolist())
        return GradedRollouts(problems, self.rollouts.rows(rows), self.verdicts[rows], self.rewards[rows])


@dataclass(frozen=True)
class MicroBatch:
    """b rows of a batch, trimmed after their last trained token, on the device of the update. Fields as in `Batch`."""

    rows: Tensor
    """[b] the places of the rows in the batch."""
    rollouts: Rollouts
    advantages: Tensor
    """[b, T]"""
    judged: Tensor
    """bool [b, T]: trained tokens of rows with a verdict."""
    position: Tensor | None
    values: Tensor | None
    returns: Tensor | None


@dataclass(frozen=True)
class Batch(GradedRollouts):
    """A graded rollout with everything that its updates need; the same on every rank, in main memory."""

    advantages: Tensor
    """[B, T]."""
    position: Tensor | None = None
    """[B, T] shuffled positions; None = the tokens' own order."""
    values: Tensor | None = None
    """[B, T] the critic's values."""
    returns: Tensor | None = None
    """[B, T] what the critic is fitted to."""

    @property
    def judged(self) -> Tensor:
        """bool [B, T]: trained tokens of rows with a verdict."""
        return self.rollouts.mask & ~self.rewards.isnan().unsqueeze(1)

    def micro_batch(self, rows: Tensor, device: torch.device) -> MicroBatch:
        """These rows [b] on the device.

        If `rows` is empty, returns one fully masked row: every rank must run the same number of forward and backward passes.
        """
        rows, spare = (rows, False) if len(rows) else (torch.zeros(1, dtype=torch.int64), True)
        rollouts = self.rollouts.rows(rows)
        if spare:
            rollouts = replace(rollouts, mask=torch.zeros_like(rollouts.mask))
        width = rollouts.mask.shape[1]

        def pick(x: Tensor) -> Tensor:
            return x[rows, :width].to(device)

        position, values, returns = (None if x is None else pick(x) for x in (self.position, self.values, self.returns))
        judged = pick(self.judged) & rollouts.mask.to(device)
        return MicroBatch(rows, rollouts.to(device), pick(self.advantages), judged, position, values, returns)

    def metrics(self, group: int) -> Metrics:
        """Metrics that are known before the updates. group: G."""
        rows, judged = float(len(self.rewards)), float((~self.rewards.isnan()).sum())
        return {
            "reward": (float(self.rewards.nansum()), judged),
            "accuracy": (float((self.verdicts == 1).sum()), judged),
            "unjudged": (rows - judged, rows),
            "response_length": (float(self.rollouts.mask.sum()), rows),
            "truncated": (float(self.rollouts.truncated.sum()), rows),
            "zero_variance": (float(advantages.zero_variance(self.rewards, group).sum()), rows),
        }


@dataclass(frozen=True)
class BatchBuilder:
    """Samples responses, grades them, and attaches the anchor's log-probabilities and the advantages."""

    run: RunConfig
    rule: Objective
    problems: tuple[Problem, ...]
    policy: Learner[PreTrainedModel]
    tokenizer: PreTrainedTokenizerFast
    critic: Learner[ValueModel] | None
    judge: Judge
    clock: Stopwatch
    engine: Engine

    def rank_rows(self, first: int, prompts: int) -> Tensor:
        """This rank's rows [b] among those of `prompts` prompts that begin at prompt number `first`: whole groups."""
        group = self.run.setting.rollout.responses
        share = rank_slice(self.policy.accelerator, prompts)
        return torch.arange((first + share.start) * group, (first + share.stop) * group)

    def micro_batches(self, rows: Tensor, prompts: int) -> list[Tensor]:
        """A rank's rows of `prompts` prompts, cut into pieces of `scale.micro_rows`.

        Every rank gets equally many pieces, of which the last ones may be empty.
        """
        largest = largest_slice(self.policy.accelerator, prompts) * self.run.setting.rollout.responses
        size = (self.run.setting.scale or Scale()).micro_rows or largest
        return [rows[start : start + size] for start in range(0, largest, size)]

    def sample(self, iteration: int, attempt: int = 0) -> GradedRollouts:
        """One rollout: P prompts, each G times, with their responses and verdicts.

        attempt: 0 for the iteration's own rollout, from 1 on for those that replace prompts of zero variance.
        """
        run, rollout, task = self.run, self.run.setting.rollout, self.run.setting.task
        # Draws are numbered over all iterations. Each has as many numbers as it may need, so that a replacement never
        # repeats another iteration's prompts or noise.
        draw = (iteration - 1) * (1 + rollout.resample) + attempt
        order = problem_order(len(self.problems), rollout.prompts, draw, run.setting_name, run.seed)
        problems = tuple(self.problems[i] for i in order for _ in range(rollout.responses))
        prompts = [task.prompt_ids(self.tokenizer, p.question) for p in problems]
        noise = uniforms(len(problems), rollout.max_response_tokens, "rollout", run.setting_name, run.seed, draw)
        record, rows = recorded(run.rule.divergence), self.rank_rows(0, rollout.prompts)
        rank_prompts = [prompts[i] for i in rows.tolist()]

        def generate() -> Rollouts | None:
            if not rank_prompts:
                return None  # fewer prompts than ranks
            return self.engine.generate(rank_prompts, noise[rows], rollout.temperature, record=record)

        with self.clock.timed("rollout"):
            sampled = generate() if self.engine.separate else self.policy.with_full_parameters(lambda _: generate())
        with self.clock.timed("reward"):
            texts = self.tokenizer.batch_decode(sampled.token_lists(), skip_special_tokens=True) if sampled else []
            graded = [task.verify(text, problems[i], self.judge) for text, i in zip(texts, rows.tolist(), strict=True)]
            ranks = all_gather((sampled, graded))
        rollouts = concatenate([of_rank for of_rank, _ in ranks if of_rank is not None])
        verdicts = torch.tensor([math.nan if v is None else v for _, of_rank in ranks for v in of_rank])
        rewards = verdicts
        if rollout.overlong_buffer:
            lengths = rollouts.lengths.tolist()
            limits = (rollout.max_response_tokens, rollout.overlong_buffer)
            rewards = verdicts + torch.tensor([overlong_penalty(length, *limits) for length in lengths])
        return GradedRollouts(problems, rollouts, verdicts, rewards)

    def collect(self, iteration: int) -> GradedRollouts:
        """The iteration's rollout. With `resample`, prompts of zero variance are replaced by later ones while any are left.

        Minibatches are cut from the result in its order, so the order is part of a run's numbers. Each replacement puts the
        prompts with variance first, then the remaining ones of zero variance, then the new ones.
        """
        rollout = self.run.setting.rollout
        with self.clock.timed("sync"):
            self.engine.sync(self.policy)
        graded = self.sample(iteration)
        for attempt in range(1, rollout.resample + 1):
            flat = advantages.zero_variance(graded.rewards, rollout.responses)[:: rollout.responses]
            if not bool(flat.any()):
                break
            later = self.sample(iteration, attempt)
            useful = ~advantages.zero_variance(later.rewards, rollout.responses)[:: rollout.responses]
            new = later.groups(useful.nonzero().squeeze(1)[: int(flat.sum())], rollout.responses)
            old = torch.cat([(~flat).nonzero(), flat.nonzero()]).squeeze(1)
            kept = graded.groups(old[: rollout.prompts - len(new.rewards) // rollout.responses], rollout.responses)
            graded = GradedRollouts(
                kept.problems + new.problems,
                concatenate([kept.rollouts, new.rollouts]),
                torch.cat([kept.verdicts, new.verdicts]),
                torch.cat([kept.rewards, new.rewards]),
            )
        with self.clock.timed("sync"):
            self.engine.sleep()
        return graded

    def mismatch(self, rollouts: Rollouts) -> Metrics:
        """How far a separate engine's log-probabilities are from the trainer's, on some of this rank's rows before any update.
        Empty for an engine that samples from the policy itself.

        The very responses that are trained on are compared, so whatever goes wrong on the way is seen: weights that did not
        arrive, keys and values of old weights, another temperature.
        Raises ValueError when the 99% quantile of the difference is above `scale.engine_tolerance`.
        """
        if not self.engine.separate:
            return {}
        scale, rollout = self.run.setting.scale or Scale(), self.run.setting.rollout
        rows = self.rank_rows(0, rollout.prompts)
        probed = min(PROBED_ROWS, len(rows))
        part = rollouts.rows(rows[torch.arange(probed) * len(rows) // max(probed, 1)]).to(
            self.policy.accelerator.device
        )
        with self.clock.timed("sync"):
            now = self.policy.with_full_parameters(
                lambda policy: token_logprobs(policy, part.prompts, part.responses, part.mask, rollout.temperature)
            )
        if not probed:
            return {}
        metrics = mismatch_metrics(now.logp, part.logp, part.mask)
        error, _ = metrics["mismatch_logp/q99"]
        if not error <= scale.tolerance:  # NaN does not agree
            raise ValueError(
                f"scale.engine {scale.engine}: its log-probabilities are not the trainer's: 99% quantile of the difference "
                f"{error:.2g}, allowed {scale.tolerance:g}: the weights did not arrive, or the engine computes another model "
                "(on a CPU vLLM is right for dense untied models only); take engine torch"
            )
        return metrics

    def batch(self, iteration: int, graded: GradedRollouts) -> Batch:
        """The graded rollout with its anchor and advantages."""
        run, rewards = self.run, graded.rewards
        rollouts, weight = self.with_anchor(graded.rollouts)
        mask, critic = rollouts.mask, run.setting.critic
        position = values = None
        if "position" in self.rule.needs:
            position = shuffled_positions(mask, run.setting_name, run.seed, iteration)
        if self.critic is not None:
            (predicted,) = self.map_rows(self.critic, rollouts, lambda model, x: (model(x.prompts, x.responses),))
            values = torch.where(mask, predicted, 0)
        outcomes = advantages.Outcomes(
            rewards, mask, run.setting.rollout.responses, values, critic.gamma, critic.gae_lambda
        )
        estimated, returns = advantages.estimator(run.rule.advantage)(outcomes)
        if weight is not None:
            estimated = estimated * weight
        return Batch(graded.problems, rollouts, graded.verdicts, rewards, estimated, position, values, returns)

    def with_anchor(self, rollouts: Rollouts) -> tuple[Rollouts, Tensor | None]:
        """The rollout with the anchor's log-probabilities, and for anchor decoupled the truncated weight [B, T]."""
        rule, temperature = self.run.rule, self.run.setting.rollout.temperature
        if rule.anchor == "rollout":
            return rollouts, None
        record = recorded(rule.divergence)

        def recompute(model: PreTrainedModel, part: Rollouts) -> TokenLogprobs:
            options: dict[str, Any] = {"top_k": record.top_k, "full": record.full}
            return token_logprobs(model, part.prompts, part.responses, part.mask, temperature, **options)

        old = TokenLogprobs(*self.map_rows(self.policy, rollouts, recompute))
        new = replace(rollouts, logp=old.logp, topk_ids=old.topk_ids, topk_logp=old.topk_logp, logp_all=old.logp_all)
        if rule.anchor == "recomputed":
            return new, None
        return new, (old.logp - rollouts.logp).exp().clamp(max=rule.tis_cap)

    def map_rows(
        self,
        learner: Learner[Any],
        rollouts: Rollouts,
        function: Callable[[Any, Rollouts], tuple[Tensor | None, ...]],
    ) -> tuple[Any, ...]:
        """function(module, rows) without gradient on each rank's rows, joined over ranks: tensors [B, T, ...] or None."""
        prompts = len(rollouts.prompts) // self.run.setting.rollout.responses
        pieces = [rows for rows in self.micro_batches(self.rank_rows(0, prompts), prompts) if len(rows)]
        device = learner.accelerator.device

        def work(module: Any) -> list[tuple[Tensor | None, ...]]:
            results = [function(module, rollouts.rows(rows).to(device)) for rows in pieces]
            return [tuple(None if x is None else x.to("cpu") for x in columns) for columns in results]

        gathered = all_gather(learner.with_full_parameters(work))
        columns = zip(*(piece for of_rank in gathered for piece in of_rank), strict=True)
        width = rollouts.mask.shape[1]
        return tuple(None if c[0] is None else torch.cat([widen(x, width) for x in c]) for c in columns)


def problem_order(count: int, prompts: int, draw: int, setting_name: str, seed: int) -> list[int]:
    """Indices of the prompts of the draw-th rollout (from 0): a new permutation of all problems in each epoch."""
    order: list[int] = []
    for place in range(draw * prompts, (draw + 1) * prompts):
        epoch, offset = divmod(place, count)
        if not order or offset == 0:
            permutation = torch.randperm(count, generator=torch_generator("order", setting_name, seed, epoch))
        order.append(int(permutation[offset]))
    return order


def shuffled_positions(mask: Tensor, setting_name: str, seed: int, iteration: int) -> Tensor:
    """A random permutation of 1..T_i for the trained tokens of each row [B, T]. It is kept over the rollout's updates."""
    noise = uniforms(*mask.shape, "shuffle", setting_name, seed, iteration)
    order = torch.where(mask, noise, torch.inf).argsort(-1)
    return order.argsort(-1) + 1


def recorded(divergence: Divergence | None) -> Record:
    """What a rollout must keep of mu for this divergence."""
    keeps = "sampled" if divergence is None else divergences.estimator(divergence.estimator).keeps
    if keeps == "top_k":
        assert divergence is not None and divergence.k is not None  # checked when the suite was resolved
        return Record(top_k=divergence.k)
    return Record(full=keeps == "full")


def estimate(divergence: Divergence, now: TokenLogprobs, part: Rollouts) -> Tensor:
    """The token divergence D_t [b, T] of a rule, from what the rollout recorded."""
    recorded_tokens = divergences.Recorded(
        tokens=part.responses,
        logp=now.logp,
        rollout_logp=part.logp,
        topk_ids=part.topk_ids,
        topk_logp=now.topk_logp,
        rollout_topk_logp=part.topk_logp,
        logp_all=now.logp_all,
        rollout_logp_all=part.logp_all,
    )
    options = {} if divergence.support is None else {"support": divergence.support}
    return divergences.estimator(divergence.estimator)(recorded_tokens, divergence.kind, **options)
