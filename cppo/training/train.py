"""The training loop: rollout -> reward -> advantage -> minibatch updates -> checkpoint.

Follows CPPO (arXiv:2606.10968) section 4.1. Left out on purpose: KL to a reference model and an entropy bonus (the paper
uses neither), and more than one pass over a rollout. What several processes share and split: `cppo.training.distributed`.

A run directory holds config.json and provenance.json (written first), metrics.jsonl (no clock, host or path: two runs on
one machine are compared bit for bit), timings.jsonl, positions.jsonl, tokens.jsonl, state/ (to resume from),
checkpoints/step-N (to score) and DONE (last).

Legend: P prompts, G responses a prompt, B = P G rows of a rollout, b rows of a micro-batch, T tokens, K top-K.
"""

import json
import math
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
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
from cppo.loss import Metrics, batch_denominator, policy_loss
from cppo.models.load import load_pretrained, load_tokenizer, save_pretrained
from cppo.models.logprobs import statistics
from cppo.objectives import Objective, Tokens, objective
from cppo.objectives.divergence import CPPO
from cppo.results.checkpoint import load_latest, save_state
from cppo.results.provenance import provenance
from cppo.rewards import Judge
from cppo.rollout.engines import engine
from cppo.rollout.types import Engine, EngineDied, Rollouts
from cppo.suite.config import RunConfig
from cppo.system.files import read_json, whole_folder, write_whole, writing
from cppo.system.interrupts import Interrupted, Terminated, enough_memory
from cppo.tasks.types import Problem
from cppo.training.batches import Batch, Collector, Part, estimate
from cppo.training.critic import ValueModel, value_loss
from cppo.training.distributed import Learner, gather, make_accelerator, start_trackers

POSITION_BINS = 16
"""Bins of the drift by position over the longest response."""
DUMPED_ROWS = 8
"""Responses whose tokens are dumped at a checkpoint, those with most masked tokens."""
STREAMS = ("metrics", "timings", "positions", "tokens")


@dataclass
class Measured:
    """What the updates of an iteration measure."""

    common: Metrics
    """Of the whole step: the same on every rank."""
    own: Metrics = field(default_factory=dict)
    """Of this rank's rows; ranks add up."""
    shifts: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(drift, mask) of this rank's rows, each [b, T]."""
    dumped: list[dict[str, Any]] = field(default_factory=list)
    """Tokens of this rank's rows in the last minibatch."""

    def everywhere(self) -> "Measured":
        """All ranks' rows; each rank must call it."""
        total = Measured(dict(self.common))
        for own, shifts, dumped in gather((self.own, self.shifts, self.dumped)):
            add(total.common, own)
            total.shifts += shifts
            total.dumped += dumped
        return total


@dataclass
class Trainer:
    """A run in progress: models, optimisers and the counters that are saved with them."""

    run: RunConfig
    folder: Path
    problems: tuple[Problem, ...]
    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    critic: ValueModel | None
    judge: Judge
    accelerator: Accelerator
    engine: Engine
    iteration: int = 0
    updates: int = 0
    nonfinite_in_a_row: int = 0

    def __post_init__(self) -> None:
        plan, factor = self.run.plan.optimizer, self.run.plan.critic.lr_factor
        self.rule: Objective = objective(self.run.objective.objective, **self.run.objective.settings)
        self.actor = Learner(self.accelerator, self.policy, plan.lr, plan)
        self.valuer = Learner(self.accelerator, self.critic, plan.lr * factor, plan) if self.critic else None
        self.clock = Stopwatch()
        self.compared = False
        self.collector = Collector(
            self.run, self.problems, self.actor, self.tokenizer, self.valuer, self.judge, self.clock, self.engine
        )

    # One iteration ---------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One rollout and its updates; appends to the streams."""
        self.clock.restart()
        self.iteration += 1
        sampled = self.collector.gather(self.iteration)
        with self.clock.timed("advantage"):
            batch = self.collector.batch(self.iteration, sampled)
        plan = self.run.plan.rollout
        measured = Measured(batch.metrics(plan.responses), self.mismatch(sampled.rollouts))
        with self.clock.timed("update"):
            for first in range(0, plan.prompts, plan.minibatch):
                self.update(batch, first, measured)
            measured = measured.everywhere()
        means = {name: total / count if count else None for name, (total, count) in sorted(measured.common.items())}
        self.append("metrics", [{"iteration": self.iteration, **means}])
        self.append("positions", self.positions(measured.shifts))
        self.append("tokens", [{"iteration": self.iteration, **x} for x in most_masked(measured.dumped, DUMPED_ROWS)])
        account = self.clock.account(int(batch.rollouts.mask.sum()))
        self.append("timings", [{"iteration": self.iteration, **account}])
        self.accelerator.log({name: mean for name, mean in means.items() if mean is not None}, step=self.iteration)

    def mismatch(self, rollouts: Rollouts) -> Metrics:
        """The engine's error in this rank's rows of a rollout; the main process tells it once, beside the thresholds that it
        must stay well below."""
        found = self.collector.mismatch(rollouts)
        if found and not self.compared and self.accelerator.is_main_process:
            self.compared = True
            lines = [
                f"{sign} " + ", ".join(f"{label} {found[f'{name}/{label}'][0]:.1e}" for label in QUANTILES)
                for sign, name in (("|log pi - log mu|", "mismatch_logp"), ("|pi - mu|", "mismatch_prob"))
            ]
            limits = [
                f"{name} {value:g}" for name, value in vars(self.rule.settings).items() if name.startswith("delta")
            ]
            tqdm.write(
                f"{self.folder}: engine against trainer at the same weights: {'; '.join(lines + limits)}",
                file=sys.stderr,
            )
        return found

    def update(self, batch: Batch, first: int, measured: Measured) -> None:
        """One optimiser step on the minibatch of prompts from the first-th on."""
        self.updates += 1
        plan, aggregation = self.run.plan, self.run.objective.aggregation
        count, group = plan.rollout.minibatch, plan.rollout.responses
        rows = slice(first * group, (first + count) * group)
        if not bool((batch.advantages[rows] != 0).any()):
            add(measured.common, {"skipped_updates": (1.0, 1.0), "nonfinite_updates": (0.0, 1.0)})
            return
        pieces = self.collector.micro_batches(self.collector.own_rows(first, count), count)
        parts = [partial(batch.part, piece, self.accelerator.device) for piece in pieces]
        share = min(1.0, self.updates / max(plan.optimizer.warmup_updates, 1))
        whole = batch_denominator(batch.rollouts.mask[rows], aggregation)
        dumps = first + count == plan.rollout.prompts and self.iteration % plan.checkpoint_every == 0

        def loss(part: Callable[[], Part]) -> Tensor:
            return self.policy_loss(part(), whole, measured, dumps)

        value, norm = self.actor.descend([partial(loss, part) for part in parts], share)
        if self.valuer is not None:
            judged = float(batch.judged[rows].sum())

            def error(part: Callable[[], Part]) -> Tensor:
                return self.value_loss(part(), judged)

            found, _ = self.valuer.descend([partial(error, part) for part in parts], share)
            add(measured.common, {"value_loss": (found, 1.0)})
        finite = math.isfinite(norm)
        self.nonfinite_in_a_row = 0 if finite else self.nonfinite_in_a_row + 1
        add(measured.common, {"skipped_updates": (0.0, 1.0), "nonfinite_updates": (float(not finite), 1.0)})
        add(measured.common, {"loss": (value, 1.0), "grad_norm": (norm, 1.0)} if finite else {})

    def policy_loss(self, part: Part, denominator: float, measured: Measured, dumps: bool) -> Tensor:
        """A micro-batch's share of the loss."""
        entry, plan, rollouts = self.run.objective, self.run.plan.rollout, part.rollouts
        needs = entry.divergence
        now = self.actor(
            lambda policy: statistics(
                policy,
                rollouts.prompts,
                rollouts.responses,
                rollouts.mask,
                plan.temperature,
                topk_ids=rollouts.topk_ids,
                full=needs is not None and needs.estimator == "exact",
            )
        )
        divergence = estimate(needs, now, rollouts) if needs else None
        tokens = Tokens(now.logp, rollouts.logp, part.advantages, rollouts.mask, divergence, part.position)
        horizon = plan.max_response_tokens if entry.aggregation == "seq-mean-token-sum-norm" else None
        loss, metrics = policy_loss(self.rule, tokens, entry.aggregation, horizon, denominator)
        add(measured.own, metrics)
        add(measured.own, token_metrics(self.rule, tokens, now.entropy))
        measured.shifts.append((probability_shift(tokens).to("cpu"), rollouts.mask.to("cpu")))
        if dumps and isinstance(self.rule.settings, CPPO):
            rows = (part.rows % (plan.minibatch * plan.responses)).tolist()
            decode = self.tokenizer.decode
            measured.dumped += by_token(self.rule, tokens, rollouts.responses, rows, decode, DUMPED_ROWS)
        return loss

    def value_loss(self, part: Part, count: float) -> Tensor:
        """A micro-batch's share of the critic's loss."""
        assert self.valuer is not None and part.values is not None and part.returns is not None
        values = self.valuer(lambda critic: critic(part.rollouts.prompts, part.rollouts.responses))
        return value_loss(values, part.values, part.returns, part.judged, self.run.plan.critic.value_clip, count)

    # What is written -------------------------------------------------------------------------------------------------

    def positions(self, shifts: list[tuple[Tensor, Tensor]]) -> list[dict[str, float]]:
        """The iteration's drift by position."""
        if not shifts:
            return []
        longest = self.run.plan.rollout.max_response_tokens
        width = max(mask.shape[1] for _, mask in shifts)
        pad = torch.nn.functional.pad
        shift = torch.cat([pad(s, (0, width - s.shape[1])) for s, _ in shifts])
        mask = torch.cat([pad(m, (0, width - m.shape[1])) for _, m in shifts])
        found = by_position(shift, mask, -(-longest // POSITION_BINS))
        return [{"iteration": self.iteration, **row} for row in found]

    def append(self, stream: str, rows: list[dict[str, Any]]) -> None:
        """Add JSON lines to a stream; the main process does."""
        if not self.accelerator.is_main_process:
            return
        path = self.folder / f"{stream}.jsonl"
        with writing(path), path.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(row, allow_nan=True) + "\n" for row in rows)

    # Saving and resuming ---------------------------------------------------------------------------------------------

    def save(self) -> None:
        """The training state, and before it evaluation weights where the iteration is one to score."""
        tensors = {"policy": self.actor.weights(), "optimizer": self.actor.optimizer_state()}
        if self.valuer is not None:
            tensors |= {"critic": self.valuer.weights(), "critic_optimizer": self.valuer.optimizer_state()}
        if not self.accelerator.is_main_process:
            return
        if self.iteration % self.run.plan.checkpoint_every == 0:
            with whole_folder(self.folder / "checkpoints" / f"step-{self.iteration}") as folder:
                save_pretrained(self.policy, folder, self.tokenizer, tensors["policy"])
        info = {name: getattr(self, name) for name in ("iteration", "updates", "nonfinite_in_a_row")}
        save_state(self.folder / "state", self.iteration, tensors, info, self.streams())

    def streams(self) -> list[Path]:
        """The files that grow with every iteration."""
        return [self.folder / f"{name}.jsonl" for name in STREAMS]

    def resume(self) -> None:
        """Continue from the newest saved state, if any; cut the streams back to what belongs to it."""
        found = load_latest(self.folder / "state", self.streams())
        if found is None:
            return
        tensors, info, damaged = found
        self.actor.load(tensors["policy"], tensors["optimizer"])
        if self.valuer is not None:
            self.valuer.load(tensors["critic"], tensors["critic_optimizer"])
        for name, value in info.items():
            setattr(self, name, value)
        if self.accelerator.is_main_process:
            for line in (*damaged, f"{self.folder}: continuing after iteration {self.iteration}"):
                tqdm.write(line, file=sys.stderr)


def train(
    run: RunConfig, base: Path, problems: tuple[Problem, ...], folder: Path, trackers: tuple[str, ...] = ()
) -> None:
    """Train `run` from the base model's checkpoint folder, or continue it, until its DONE file is written.

    Called in each of the processes that a launcher started, it trains in all of them together. trackers: names of
    `Suite.report_to`. SIGTERM (what Slurm sends before a time limit) ends it after the current iteration with its state
    saved, by `Interrupted`. Raises ValueError when the folder's saved state is of another version of the code or of a
    package.
    """
    if (folder / "DONE").is_file():
        return
    judge = Judge()
    judge.start()  # before anything is written or computed: without it some answers cannot be judged
    accelerator = make_accelerator(run.plan.scale, trackers, folder / "trackers")
    if accelerator.is_main_process:
        begin(run, folder, folder / "state", provenance())
    accelerator.wait_for_everyone()
    start_trackers(accelerator, run)
    critic = ValueModel(_trainable(run, base)) if run.objective.advantage == "gae" else None
    total, status = run.plan.iterations, "finished"
    title, quiet = f"{run.label} seed {run.seed}", not accelerator.is_main_process
    bar = tqdm(total=total, desc=title, unit="it", mininterval=5, disable=quiet)
    policy, tokenizer = _trainable(run, base), load_tokenizer(base)
    with judge, Terminated() as terminated, closing(engine(run.plan.scale, base, policy)) as sampler, bar:
        trainer = Trainer(run, folder, problems, policy, tokenizer, critic, judge, accelerator, sampler)
        trainer.resume()
        bar.update(trainer.iteration)
        while trainer.iteration < total:
            try:
                with enough_memory(folder, trainer.iteration + 1):
                    trainer.step()
            except EngineDied:
                if not terminated:
                    raise
                # Slurm sends SIGTERM to every process of a job, so to vLLM's too.
                raise Interrupted(
                    f"{folder}: stopped by SIGTERM in iteration {trainer.iteration}, before its updates"
                ) from None
            bar.update()
            if judge.unjudged:
                bar.set_postfix(unjudged=judge.unjudged, refresh=False)
            if trainer.nonfinite_in_a_row >= run.plan.collapse_after:
                status = f"collapsed at step {trainer.iteration}"
                break
            if terminated:
                accelerator.set_trigger()
            stop = accelerator.check_trigger()  # any rank's: the signal may reach one later than another
            if trainer.iteration % run.plan.checkpoint_every == 0 or stop:
                trainer.save()
            if stop and trainer.iteration < total:
                raise Interrupted(f"{folder}: stopped by SIGTERM after iteration {trainer.iteration}, which is saved")
    if accelerator.is_main_process:
        write_whole(folder / "DONE", json.dumps({"status": status, "iterations": trainer.iteration}) + "\n")
    accelerator.end_training()


def _trainable(run: RunConfig, base: Path) -> PreTrainedModel:
    """The base model, set up to be trained as the setting says."""
    model = load_pretrained(base)
    if run.plan.scale is not None and run.plan.scale.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # transformers recomputes in training mode only; the models have no dropout
    return model


def begin(run: RunConfig, folder: Path, state: Path, here: dict[str, str]) -> None:
    """Write config and provenance (`here`); ValueError when the work saved at `state`, if it exists, was made by other code,
    which would make the run a mixture."""
    path = folder / "provenance.json"
    if path.is_file() and state.exists():
        before = read_json(path)
        for name in here:
            if name != "commit" and before.get(name) != here[name]:
                raise ValueError(
                    f"{path}: {name}: the run was begun with {before.get(name)}, this is {here[name]}; go back to that "
                    "version to finish it, or delete the folder to start again"
                )
    write_whole(folder / "config.json", run.model_dump_json(indent=1))
    write_whole(path, json.dumps(here, indent=1))
