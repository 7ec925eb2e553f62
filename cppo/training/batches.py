"""A rollout and everything its updates need: sampled, judged, anchored, with advantages.

Legend: P prompts, G responses a prompt, B = P G rows (a prompt's rows are neighbours), T tokens, K top-K.
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
from cppo.models.logprobs import Statistics, statistics
from cppo.rewards import Judge, overlong_penalty
from cppo.rollout.types import Engine, Record, Rollouts, concatenate, widen
from cppo.suite.config import Divergence, RunConfig, Scale
from cppo.system.seeds import torch_generator, uniforms
from cppo.tasks.prompts import prompt_ids
from cppo.tasks.types import Problem
from cppo.training.critic import ValueModel
from cppo.training.distributed import Learner, gather, most, own

PROBED_ROWS = 16
"""Responses of a rollout on which the engine's log-probabilities are compared with the trainer's."""


@dataclass(frozen=True)
class Sampled:
    """Responses with their verdicts."""

    problems: tuple[Problem, ...]
    """B problems."""
    rollouts: Rollouts
    """Log-probabilities are mu's as sampled; in a `Batch` the anchor's, which may be the recomputed old policy."""
    verdicts: Tensor
    """[B]: 1 right, 0 wrong, NaN without a verdict."""
    rewards: Tensor
    """[B]: the verdict and any shaping, NaN without a verdict."""

    def groups(self, keep: Tensor, group: int) -> "Sampled":
        """The groups (prompts) at these indices."""
        rows = (keep.unsqueeze(1) * group + torch.arange(group)).view(-1)
        problems = tuple(self.problems[i] for i in rows.tolist())
        return Sampled(problems, self.rollouts.rows(rows), self.verdicts[rows], self.rewards[rows])


@dataclass(frozen=True)
class Part:
    """b rows of a batch, trimmed to their longest, where they are trained on."""

    rows: Tensor
    """[b] their places in the batch."""
    rollouts: Rollouts
    advantages: Tensor
    """[b, T]"""
    judged: Tensor
    """bool [b, T]: trained tokens of rows with a verdict."""
    position: Tensor | None
    values: Tensor | None
    returns: Tensor | None


@dataclass(frozen=True)
class Batch(Sampled):
    """A sample with everything its updates need; the same on every rank, in main memory."""

    advantages: Tensor
    """[B, T]."""
    position: Tensor | None = None
    """[B, T] shuffled positions; None = own order."""
    values: Tensor | None = None
    """[B, T] the critic's values."""
    returns: Tensor | None = None
    """[B, T] what the critic is fitted to."""

    @property
    def judged(self) -> Tensor:
        """bool [B, T]: trained tokens of rows with a verdict."""
        return self.rollouts.mask & ~self.rewards.isnan().unsqueeze(1)

    def part(self, rows: Tensor, device: torch.device) -> Part:
        """These rows [b] on the device; without any, a row that trains nothing, for ranks must keep step."""
        rows, spare = (rows, False) if len(rows) else (torch.zeros(1, dtype=torch.int64), True)
        rollouts = self.rollouts.rows(rows)
        if spare:
            rollouts = replace(rollouts, mask=torch.zeros_like(rollouts.mask))
        width = rollouts.mask.shape[1]

        def pick(x: Tensor) -> Tensor:
            return x[rows, :width].to(device)

        position, values, returns = (None if x is None else pick(x) for x in (self.position, self.values, self.returns))
        judged = pick(self.judged) & rollouts.mask.to(device)
        return Part(rows, rollouts.to(device), pick(self.advantages), judged, position, values, returns)

    def metrics(self, group: int) -> Metrics:
        """What is known before the updates."""
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
class Collector:
    """Makes the batches of a run."""

    run: RunConfig
    problems: tuple[Problem, ...]
    policy: Learner[PreTrainedModel]
    tokenizer: PreTrainedTokenizerFast
    critic: Learner[ValueModel] | None
    judge: Judge
    clock: Stopwatch
    engine: Engine

    def own_rows(self, first: int, prompts: int) -> Tensor:
        """This rank's rows [b] of so many prompts from the first-th on: whole groups."""
        group = self.run.plan.rollout.responses
        share = own(self.policy.accelerator, prompts)
        return torch.arange((first + share.start) * group, (first + share.stop) * group)

    def micro_batches(self, rows: Tensor, prompts: int) -> list[Tensor]:
        """A rank's rows of so many prompts, cut to `scale.micro_rows`; as many pieces on every rank, empty ones last."""
        largest = most(self.policy.accelerator, prompts) * self.run.plan.rollout.responses
        size = (self.run.plan.scale or Scale()).micro_rows or largest
        return [rows[start : start + size] for start in range(0, largest, size)]

    def sample(self, iteration: int, attempt: int = 0) -> Sampled:
        """P prompts, each G times, with their responses and verdicts."""
        run, plan = self.run, self.run.plan.rollout
        draw = (iteration - 1) * (1 + plan.resample) + attempt
        order = problem_order(len(self.problems), plan.prompts, draw, run.setting, run.seed)
        asked = tuple(self.problems[i] for i in order for _ in range(plan.responses))
        prompts = [prompt_ids(run.plan.task, self.tokenizer, p.question) for p in asked]
        noise = uniforms(len(asked), plan.max_response_tokens, "rollout", run.setting, run.seed, draw)
        record, rows = recorded(run.objective.divergence), self.own_rows(0, plan.prompts)
        own_prompts = [prompts[i] for i in rows.tolist()]

        def generate() -> Rollouts | None:
            if not own_prompts:
                return None  # fewer prompts than ranks
            return self.engine.generate(own_prompts, noise[rows], plan.temperature, record=record)

        with self.clock.timed("rollout"):
            mine = generate() if self.engine.separate else self.policy.whole(lambda _: generate())
        with self.clock.timed("reward"):
            texts = self.tokenizer.batch_decode(mine.token_lists(), skip_special_tokens=True) if mine else []
            judged = [self.judge.verdict(text, asked[i].answer) for text, i in zip(texts, rows.tolist(), strict=True)]
            everyone = gather((mine, judged))
        rollouts = concatenate([theirs for theirs, _ in everyone if theirs is not None])
        verdicts = torch.tensor([math.nan if v is None else v for _, found in everyone for v in found])
        rewards = verdicts
        if plan.overlong_buffer:
            lengths = rollouts.lengths.tolist()
            limits = (plan.max_response_tokens, plan.overlong_buffer)
            rewards = verdicts + torch.tensor([overlong_penalty(length, *limits) for length in lengths])
        return Sampled(asked, rollouts, verdicts, rewards)

    def gather(self, iteration: int) -> Sampled:
        """The iteration's sample; with `resample`, prompts of zero variance are replaced by later ones while any are left."""
        plan = self.run.plan.rollout
        with self.clock.timed("sync"):
            self.engine.sync(self.policy)
        found = self.sample(iteration)
        for attempt in range(1, plan.resample + 1):
            flat = advantages.zero_variance(found.rewards, plan.responses)[:: plan.responses]
            if not bool(flat.any()):
                break
            more = self.sample(iteration, attempt)
            useful = ~advantages.zero_variance(more.rewards, plan.responses)[:: plan.responses]
            new = more.groups(useful.nonzero().squeeze(1)[: int(flat.sum())], plan.responses)
            old = torch.cat([(~flat).nonzero(), flat.nonzero()]).squeeze(1)  # informative prompts first
            kept = found.groups(old[: plan.prompts - len(new.rewards) // plan.responses], plan.responses)
            found = Sampled(
                kept.problems + new.problems,
                concatenate([kept.rollouts, new.rollouts]),
                torch.cat([kept.verdicts, new.verdicts]),
                torch.cat([kept.rewards, new.rewards]),
            )
        with self.clock.timed("sync"):
            self.engine.sleep()
        return found

    def mismatch(self, rollouts: Rollouts) -> Metrics:
        """What separates vLLM's log-probabilities from the trainer's, on some of this rank's rows before any update of them.

        The very responses that are trained on are compared, so whatever goes wrong on the way is seen: weights that did not
        arrive, old keys and values, another temperature. Nothing for the torch engine, which has the trainer's weights.
        Raises ValueError when the 99% quantile is above `scale.vllm_tolerance`.
        """
        scale, plan = self.run.plan.scale, self.run.plan.rollout
        if scale is None or scale.engine != "vllm":
            return {}
        rows = self.own_rows(0, plan.prompts)
        probed = min(PROBED_ROWS, len(rows))
        part = rollouts.rows(rows[torch.arange(probed) * len(rows) // max(probed, 1)]).to(
            self.policy.accelerator.device
        )
        with self.clock.timed("sync"):
            now = self.policy.whole(
                lambda policy: statistics(policy, part.prompts, part.responses, part.mask, plan.temperature)
            )
        if not probed:
            return {}
        found = mismatch_metrics(now.logp, part.logp, part.mask)
        error, _ = found["mismatch_logp/q99"]
        if not error <= scale.tolerance:  # NaN is no agreement
            raise ValueError(
                f"scale.engine vllm: its log-probabilities are not the trainer's: 99% quantile of the difference {error:.2g}, "
                f"allowed {scale.tolerance:g}; on a CPU vLLM takes over weights of dense untied models only: take engine torch"
            )
        return found

    def batch(self, iteration: int, sampled: Sampled) -> Batch:
        """Anchor and advantages of a sample."""
        run, entry, rewards = self.run, self.run.objective, sampled.rewards
        rollouts, weight = self.anchored(sampled.rollouts)
        mask, group = rollouts.mask, run.plan.rollout.responses
        position = values = returns = None
        if entry.settings.get("shuffle", False):
            position = shuffled_positions(mask, run.setting, run.seed, iteration)
        if entry.advantage == "gae":
            assert self.critic is not None
            (seen,) = self.everywhere(self.critic, rollouts, lambda critic, x: (critic(x.prompts, x.responses),))
            values = torch.where(mask, seen, 0)
            plan = run.plan.critic
            token_rewards = advantages.at_last_token(rewards, mask)
            raw, returns = advantages.gae(token_rewards, values, mask, plan.gamma, plan.lam)
            found = advantages.whiten(raw, mask & ~rewards.isnan().unsqueeze(1))
        else:
            found = advantages.from_outcomes(entry.advantage, rewards, group, mask)
        if weight is not None:
            found = found * weight
        return Batch(sampled.problems, rollouts, sampled.verdicts, rewards, found, position, values, returns)

    def anchored(self, rollouts: Rollouts) -> tuple[Rollouts, Tensor | None]:
        """The rollout with the anchor's log-probabilities, and anchor decoupled's truncated weight [B, T]."""
        entry, plan = self.run.objective, self.run.plan.rollout
        if entry.anchor == "rollout":
            return rollouts, None
        record = recorded(entry.divergence)

        def again(model: PreTrainedModel, part: Rollouts) -> Statistics:
            options: dict[str, Any] = {"top_k": record.top_k, "full": record.full}
            return statistics(model, part.prompts, part.responses, part.mask, plan.temperature, **options)

        old = Statistics(*self.everywhere(self.policy, rollouts, again))
        new = replace(rollouts, logp=old.logp, topk_ids=old.topk_ids, topk_logp=old.topk_logp, logp_all=old.logp_all)
        if entry.anchor == "recomputed":
            return new, None
        return new, (old.logp - rollouts.logp).exp().clamp(max=entry.tis_cap)

    def everywhere(
        self,
        learner: Learner[Any],
        rollouts: Rollouts,
        function: Callable[[Any, Rollouts], tuple[Tensor | None, ...]],
    ) -> tuple[Any, ...]:
        """function(module, rows) without gradient on each rank's own rows, joined: tensors [B, T, ...] or None."""
        prompts = len(rollouts.prompts) // self.run.plan.rollout.responses
        pieces = [rows for rows in self.micro_batches(self.own_rows(0, prompts), prompts) if len(rows)]
        device = learner.accelerator.device

        def work(module: Any) -> list[tuple[Tensor | None, ...]]:
            found = [function(module, rollouts.rows(rows).to(device)) for rows in pieces]
            return [tuple(None if x is None else x.to("cpu") for x in columns) for columns in found]

        columns = zip(*(piece for theirs in gather(learner.whole(work)) for piece in theirs), strict=True)
        width = rollouts.mask.shape[1]
        return tuple(None if c[0] is None else torch.cat([widen(x, width) for x in c]) for c in columns)


def problem_order(count: int, prompts: int, draw: int, setting: str, seed: int) -> list[int]:
    """Indices of the prompts of the draw-th rollout (from 0): a new permutation of all problems in each epoch."""
    order: list[int] = []
    for place in range(draw * prompts, (draw + 1) * prompts):
        epoch, offset = divmod(place, count)
        if not order or offset == 0:
            permutation = torch.randperm(count, generator=torch_generator("order", setting, seed, epoch))
        order.append(int(permutation[offset]))
    return order


def shuffled_positions(mask: Tensor, setting: str, seed: int, iteration: int) -> Tensor:
    """A random permutation of 1..T_i for the trained tokens of each row [B, T]; kept over the rollout's updates."""
    noise = uniforms(*mask.shape, "shuffle", setting, seed, iteration)
    order = torch.where(mask, noise, torch.inf).argsort(-1)
    return order.argsort(-1) + 1


def recorded(divergence: Divergence | None) -> Record:
    """What a rollout must keep of mu for this estimator."""
    if divergence is None or divergence.estimator == "binary":
        return Record()
    return Record(full=True) if divergence.estimator == "exact" else Record(top_k=divergence.k or 0)


def estimate(divergence: Divergence, now: Statistics, part: Rollouts) -> Tensor:
    """D_t [b, T] of the estimator, from what the rollout stored."""
    if divergence.estimator == "binary":
        return divergences.binary(now.logp, part.logp, divergence.kind)
    if divergence.estimator == "exact":
        assert now.logp_all is not None and part.logp_all is not None
        return divergences.exact(now.logp_all, part.logp_all, divergence.kind)
    assert now.topk_logp is not None and part.topk_logp is not None and part.topk_ids is not None
    return divergences.top_k(
        now.logp,
        part.logp,
        now.topk_logp,
        part.topk_logp,
        part.topk_ids,
        part.responses,
        divergence.kind,
        divergence.support or "union",
    )
