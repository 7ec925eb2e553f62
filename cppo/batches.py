"""A rollout and everything its updates need: sampled, judged, anchored, with advantages.

Legend: P prompts, G responses a prompt, B = P G rows (a prompt's rows are neighbours), T tokens, K top-K.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cppo import advantages
from cppo.config import Divergence, RunConfig
from cppo.critic import ValueModel
from cppo.diagnostics import Stopwatch, mismatch_metrics
from cppo.loss import Metrics
from cppo.policy import statistics
from cppo.problems import Problem
from cppo.prompts import prompt_ids
from cppo.rewards import Judge, overlong_penalty
from cppo.rollout import Engine, Record, Rollouts, concatenate
from cppo.seeds import torch_generator, uniforms

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
class Batch(Sampled):
    """A sample with everything its updates need."""

    advantages: Tensor
    """[B, T]."""
    position: Tensor | None = None
    """[B, T] shuffled positions; None = own order."""
    values: Tensor | None = None
    """[B, T] the critic's values."""
    returns: Tensor | None = None
    """[B, T] what the critic is fitted to."""

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
    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    critic: ValueModel | None
    judge: Judge
    clock: Stopwatch
    engine: Engine

    def sample(self, iteration: int, attempt: int = 0) -> Sampled:
        """P prompts, each G times, with their responses and verdicts."""
        run, plan = self.run, self.run.plan.rollout
        draw = (iteration - 1) * (1 + plan.resample) + attempt
        order = problem_order(len(self.problems), plan.prompts, draw, run.setting, run.seed)
        asked = tuple(self.problems[i] for i in order for _ in range(plan.responses))
        prompts = [prompt_ids(run.plan.task, self.tokenizer, p.question) for p in asked]
        noise = uniforms(len(asked), plan.max_response_tokens, "rollout", run.setting, run.seed, draw)
        record = recorded(run.objective.divergence)
        with self.clock.timed("rollout"):
            rollouts = self.engine.generate(prompts, noise, plan.temperature, record=record)
        with self.clock.timed("reward"):
            texts = self.tokenizer.batch_decode(rollouts.token_lists(), skip_special_tokens=True)
            found = [self.judge.verdict(text, p.answer) for text, p in zip(texts, asked, strict=True)]
        verdicts = torch.tensor([math.nan if v is None else v for v in found])
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
        """What separates vLLM's log-probabilities from the trainer's, on some rows of a rollout before any update of it.

        The very responses that are trained on are compared, so whatever goes wrong on the way is seen: weights that did not
        arrive, old keys and values, another temperature. Nothing for the torch engine, which has the trainer's weights.
        Raises ValueError when the 99% quantile is above `scale.vllm_tolerance`.
        """
        scale, count = self.run.plan.scale, len(rollouts.prompts)
        if scale is None or scale.engine != "vllm":
            return {}
        probed = min(PROBED_ROWS, count)
        part = rollouts.rows(torch.arange(probed) * count // probed)
        with self.clock.timed("sync"), torch.no_grad():
            now = statistics(self.policy, part.prompts, part.responses, part.mask, self.run.plan.rollout.temperature)
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
            with torch.no_grad():
                values = torch.where(mask, self.critic(rollouts.prompts, rollouts.responses), 0)
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
        with torch.no_grad():
            old = statistics(
                self.policy,
                rollouts.prompts,
                rollouts.responses,
                rollouts.mask,
                plan.temperature,
                top_k=record.top_k,
                full=record.full,
            )
        new = replace(rollouts, logp=old.logp, topk_ids=old.topk_ids, topk_logp=old.topk_logp, logp_all=old.logp_all)
        if entry.anchor == "recomputed":
            return new, None
        return new, (old.logp - rollouts.logp).exp().clamp(max=entry.tis_cap)


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
