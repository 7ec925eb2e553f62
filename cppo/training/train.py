"""The training loop: rollout -> reward -> advantage -> minibatch updates -> checkpoint.

It follows section 4.1 of the paper (arXiv:2606.10968). Left out on purpose: a Kullback-Leibler (KL) penalty towards a
reference model and an entropy bonus (the paper uses neither), and more than one pass over a rollout. How several processes
share the work: `cppo.training.distributed`. What a run leaves behind: `cppo.results.run_folder`. metrics.jsonl holds no
clock, host or path, because two runs on one machine are compared bit for bit.

Legend: P prompts, G responses per prompt, B = P G rows of a rollout, b rows of a micro-batch, T tokens, K top-K.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cppo.diagnostics import (
    QUANTILES,
    Stopwatch,
    add,
    by_position,
    by_token,
    most_masked,
    probability_shift,
    token_metrics,
)
from cppo.loss import Metrics, batch_denominator, loss_metrics, reduce_terms
from cppo.models.load import save_pretrained
from cppo.models.logprobs import token_logprobs
from cppo.objectives import Objective, Tokens, objective
from cppo.results.checkpoint import load_latest, save_state
from cppo.results.run_folder import RunFolder
from cppo.rewards import Judge
from cppo.rollout.types import Engine, Rollouts
from cppo.suite.config import RunConfig
from cppo.tasks.types import Problem
from cppo.training.batches import Batch, BatchBuilder, MicroBatch, estimate, recorded
from cppo.training.critic import ValueModel, value_loss
from cppo.training.distributed import Learner, all_gather

POSITION_BINS = 16
"""Bins into which the positions of the longest response are divided for the drift by position."""
DUMPED_ROWS = 8
"""Responses whose tokens are dumped at a checkpoint: those with most masked tokens."""


@dataclass
class StepMetrics:
    """Metrics accumulated over one iteration's updates."""

    common: Metrics
    """Metrics of the whole step: identical on every rank, so counted once."""
    of_rank: Metrics = field(default_factory=dict)
    """Metrics of this rank's rows, which are added up over ranks."""
    shifts: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(drift, mask) of this rank's rows, each [b, T]."""
    dumped: list[dict[str, Any]] = field(default_factory=list)
    """Token dumps of this rank's rows in the last minibatch."""

    def all_ranks(self) -> "StepMetrics":
        """The same over all ranks' rows. Each rank must call it."""
        total = StepMetrics(dict(self.common))
        for of_rank, shifts, dumped in all_gather((self.of_rank, self.shifts, self.dumped)):
            add(total.common, of_rank)
            total.shifts += shifts
            total.dumped += dumped
        return total


@dataclass
class Trainer:
    """A run in progress: its models and optimisers, and the counters that are saved with them."""

    run: RunConfig
    folder: RunFolder
    problems: tuple[Problem, ...]
    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    value_model: ValueModel | None
    judge: Judge
    accelerator: Accelerator
    engine: Engine
    iteration: int = 0
    updates: int = 0
    nonfinite_in_a_row: int = 0

    def __post_init__(self) -> None:
        optimizer, factor = self.run.setting.optimizer, self.run.setting.critic.lr_factor
        self.rule: Objective = objective(self.run.rule.objective, **self.run.rule.params)
        self.actor = Learner(self.accelerator, self.policy, optimizer.lr, optimizer)
        self.critic = (
            Learner(self.accelerator, self.value_model, optimizer.lr * factor, optimizer) if self.value_model else None
        )
        self.clock = Stopwatch()
        self.compared = False
        self.builder = BatchBuilder(
            self.run,
            self.rule,
            self.problems,
            self.actor,
            self.tokenizer,
            self.critic,
            self.judge,
            self.clock,
            self.engine,
        )

    # One iteration ---------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Make one rollout and its updates, and append to the streams."""
        self.clock.restart()
        self.iteration += 1
        graded = self.builder.collect(self.iteration)
        with self.clock.timed("advantage"):
            batch = self.builder.batch(self.iteration, graded)
        rollout = self.run.setting.rollout
        metrics = StepMetrics(batch.metrics(rollout.responses), self.mismatch(graded.rollouts))
        with self.clock.timed("update"):
            for first in range(0, rollout.prompts, rollout.minibatch):
                self.update(batch, first, metrics)
            metrics = metrics.all_ranks()
        means = {name: total / count if count else None for name, (total, count) in sorted(metrics.common.items())}
        self.append("metrics", [means])
        self.append("positions", self.positions(metrics.shifts))
        self.append("tokens", most_masked(metrics.dumped, DUMPED_ROWS))
        self.append("timings", [self.clock.account(int(batch.rollouts.mask.sum()))])
        self.accelerator.log({name: mean for name, mean in means.items() if mean is not None}, step=self.iteration)

    def mismatch(self, rollouts: Rollouts) -> Metrics:
        """The engine's error in this rank's rows of a rollout. The main process prints it once."""
        metrics = self.builder.mismatch(rollouts)
        if metrics and not self.compared and self.accelerator.is_main_process:
            self.compared = True
            lines = [
                f"{sign} " + ", ".join(f"{label} {metrics[f'{name}/{label}'][0]:.1e}" for label in QUANTILES)
                for sign, name in (("|log pi - log mu|", "mismatch_logp"), ("|pi - mu|", "mismatch_prob"))
            ]
            tqdm.write(
                f"{self.folder.path}: engine against trainer at the same weights: {'; '.join(lines)}; these must stay well "
                f"below the rule's thresholds, which are among its parameters: {self.run.rule.params}",
                file=sys.stderr,
            )
        return metrics

    def update(self, batch: Batch, first: int, metrics: StepMetrics) -> None:
        """One optimiser step on the minibatch that begins at prompt number `first` of the rollout."""
        self.updates += 1
        setting, aggregation = self.run.setting, self.run.rule.aggregation
        count, group = setting.rollout.minibatch, setting.rollout.responses
        rows = slice(first * group, (first + count) * group)
        if not bool((batch.advantages[rows] != 0).any()):
            add(metrics.common, {"skipped_updates": (1.0, 1.0), "nonfinite_updates": (0.0, 1.0)})
            return
        pieces = self.builder.micro_batches(self.builder.rank_rows(first, count), count)
        # Each is moved to the device only when its loss is computed: otherwise all micro-batches would be there at once.
        parts = [partial(batch.micro_batch, piece, self.accelerator.device) for piece in pieces]
        share = min(1.0, self.updates / max(setting.optimizer.warmup_updates, 1))
        # Not reduced over ranks: every rank has the mask of the whole step.
        denominator = batch_denominator(batch.rollouts.mask[rows], aggregation)
        last = first + count == setting.rollout.prompts
        dumps = last and self.iteration % setting.checkpoint_every == 0

        def loss(part: Callable[[], MicroBatch]) -> Tensor:
            return self.policy_loss(part(), denominator, metrics, dumps)

        value, norm = self.actor.optimizer_step([partial(loss, part) for part in parts], share)
        if self.critic is not None:
            judged = float(batch.judged[rows].sum())

            def error(part: Callable[[], MicroBatch]) -> Tensor:
                return self.value_loss(part(), judged)

            critic_loss, _ = self.critic.optimizer_step([partial(error, part) for part in parts], share)
            add(metrics.common, {"value_loss": (critic_loss, 1.0)})
        finite = math.isfinite(norm)
        self.nonfinite_in_a_row = 0 if finite else self.nonfinite_in_a_row + 1
        add(metrics.common, {"skipped_updates": (0.0, 1.0), "nonfinite_updates": (float(not finite), 1.0)})
        add(metrics.common, {"loss": (value, 1.0), "grad_norm": (norm, 1.0)} if finite else {})

    def policy_loss(self, part: MicroBatch, denominator: float, metrics: StepMetrics, dumps: bool) -> Tensor:
        """A micro-batch's share of the loss."""
        rule, rollout, rollouts = self.run.rule, self.run.setting.rollout, part.rollouts
        now = self.actor(
            lambda policy: token_logprobs(
                policy,
                rollouts.prompts,
                rollouts.responses,
                rollouts.mask,
                rollout.temperature,
                topk_ids=rollouts.topk_ids,
                full=recorded(rule.divergence).full,
            )
        )
        divergence = None if rule.divergence is None else estimate(rule.divergence, now, rollouts)
        tokens = Tokens(now.logp, rollouts.logp, part.advantages, rollouts.mask, divergence, part.position)
        horizon = rollout.max_response_tokens if rule.aggregation == "seq-mean-token-sum-norm" else None
        terms = self.rule(tokens)
        add(metrics.of_rank, loss_metrics(tokens, terms))
        add(metrics.of_rank, token_metrics(tokens, now.entropy))
        metrics.shifts.append((probability_shift(tokens).to("cpu"), rollouts.mask.to("cpu")))
        if dumps and self.rule.spec.traces:
            rows = (part.rows % (rollout.minibatch * rollout.responses)).tolist()
            metrics.dumped += by_token(tokens, terms, rollouts.responses, rows, self.tokenizer.decode, DUMPED_ROWS)
        return reduce_terms(terms, tokens.mask, rule.aggregation, horizon, denominator)

    def value_loss(self, part: MicroBatch, count: float) -> Tensor:
        """A micro-batch's share of the critic's loss."""
        assert self.critic is not None and part.values is not None and part.returns is not None
        values = self.critic(lambda critic: critic(part.rollouts.prompts, part.rollouts.responses))
        clip = self.run.setting.critic.value_clip
        return value_loss(values, part.values, part.returns, part.judged, clip, count)

    # What is written -------------------------------------------------------------------------------------------------

    def positions(self, shifts: list[tuple[Tensor, Tensor]]) -> list[dict[str, float]]:
        """The iteration's drift by position: a row per bin of positions."""
        if not shifts:
            return []
        longest = self.run.setting.rollout.max_response_tokens
        width = max(mask.shape[1] for _, mask in shifts)
        pad = torch.nn.functional.pad
        shift = torch.cat([pad(s, (0, width - s.shape[1])) for s, _ in shifts])
        mask = torch.cat([pad(m, (0, width - m.shape[1])) for _, m in shifts])
        return by_position(shift, mask, -(-longest // POSITION_BINS))

    def append(self, stream: str, rows: list[dict[str, Any]]) -> None:
        """Add rows of this iteration to a stream, in the main process."""
        if self.accelerator.is_main_process:
            self.folder.append(stream, [{"iteration": self.iteration, **row} for row in rows])

    # Saving and resuming ---------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Save the training state, and before it the weights where this iteration is one to score."""
        tensors = {"policy": self.actor.weights(), "optimizer": self.actor.optimizer_state()}
        if self.critic is not None:
            tensors |= {"critic": self.critic.weights(), "critic_optimizer": self.critic.optimizer_state()}
        if not self.accelerator.is_main_process:
            return
        if self.iteration % self.run.setting.checkpoint_every == 0:
            with self.folder.new_checkpoint(self.iteration) as folder:
                save_pretrained(self.policy, folder, self.tokenizer, tensors["policy"])
        info = {name: getattr(self, name) for name in ("iteration", "updates", "nonfinite_in_a_row")}
        save_state(self.folder.state, self.iteration, tensors, info, self.folder.streams)

    def resume(self) -> None:
        """Continue from the newest saved state, if there is one, and cut the streams back to what belongs to it."""
        saved = load_latest(self.folder.state, self.folder.streams)
        if saved is None:
            return
        tensors, info, damaged = saved
        self.actor.load(tensors["policy"], tensors["optimizer"])
        if self.critic is not None:
            self.critic.load(tensors["critic"], tensors["critic_optimizer"])
        for name, value in info.items():
            setattr(self, name, value)
        if self.accelerator.is_main_process:
            for line in (*damaged, f"{self.folder.path}: continuing after iteration {self.iteration}"):
                tqdm.write(line, file=sys.stderr)
