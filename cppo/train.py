"""The training loop: rollout -> reward -> advantage -> minibatch updates -> checkpoint.

Follows CPPO (arXiv:2606.10968) section 4.1. Left out on purpose: KL to a reference model and an entropy bonus (the paper
uses neither), more than one pass over a rollout, and anything distributed.

A run directory holds config.json and provenance.json (written first), metrics.jsonl (no clock, host or path: two runs on
one machine are compared bit for bit), timings.jsonl, positions.jsonl, tokens.jsonl, state/ (to resume from),
checkpoints/step-N (to score) and DONE (last).

Legend: P prompts, G responses a prompt, B = P G rows of a rollout, b rows of a minibatch, T tokens, K top-K.
"""

import json
import math
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cppo import divergences
from cppo.batches import Batch, Collector
from cppo.checkpoint import load_latest, optimizer_tensors, restore_optimizer, save_state
from cppo.config import Divergence, RunConfig
from cppo.critic import ValueModel, value_loss
from cppo.diagnostics import QUANTILES, Stopwatch, add, by_position, probability_shift, token_metrics
from cppo.files import read_json, whole_folder, write_whole, writing
from cppo.interrupts import Interrupted, Terminated, enough_memory
from cppo.loss import Metrics, batch_denominator, policy_loss
from cppo.objectives import Objective, Reason, Tokens, objective
from cppo.objectives.divergence import CPPO, prefix_sums
from cppo.objectives.ratio import ratio
from cppo.policy import Statistics, load_pretrained, load_tokenizer, save_pretrained, statistics
from cppo.problems import Problem
from cppo.provenance import provenance
from cppo.rewards import Judge
from cppo.rollout import Engine, EngineDied, Rollouts, engine

POSITION_BINS = 16
"""Bins of the drift by position over the longest response."""
DUMPED_ROWS = 8
"""Responses whose tokens are dumped at a checkpoint, those with most masked tokens."""
STREAMS = ("metrics", "timings", "positions", "tokens")


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
    engine: Engine
    iteration: int = 0
    updates: int = 0
    nonfinite_in_a_row: int = 0

    def __post_init__(self) -> None:
        plan = self.run.plan.optimizer
        options: dict[str, Any] = {"betas": plan.betas, "weight_decay": plan.weight_decay}
        self.rule: Objective = objective(self.run.objective.objective, **self.run.objective.settings)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=plan.lr, **options)
        self.critic_optimizer = (
            torch.optim.AdamW(self.critic.parameters(), lr=plan.lr * self.run.plan.critic.lr_factor, **options)
            if self.critic
            else None
        )
        self.clock = Stopwatch()
        self.compared = False
        self.collector = Collector(
            self.run, self.problems, self.policy, self.tokenizer, self.critic, self.judge, self.clock, self.engine
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
        metrics: Metrics = batch.metrics(plan.responses) | self.mismatch(sampled.rollouts)
        shifts: list[tuple[Tensor, Tensor]] = []
        with self.clock.timed("update"):
            rows = plan.minibatch * plan.responses
            for first in range(0, len(batch.rewards), rows):
                last = first + rows == len(batch.rewards)
                self.update(batch, torch.arange(first, first + rows), metrics, shifts, last)
        means = {name: total / count if count else None for name, (total, count) in sorted(metrics.items())}
        self.append("metrics", [{"iteration": self.iteration, **means}])
        self.append("positions", self.positions(shifts))
        account = self.clock.account(int(batch.rollouts.mask.sum()))
        self.append("timings", [{"iteration": self.iteration, **account}])

    def mismatch(self, rollouts: Rollouts) -> Metrics:
        """The engine's error in this rollout; told once, beside the thresholds that it must stay well below."""
        found = self.collector.mismatch(rollouts)
        if found and not self.compared:
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

    def update(
        self, batch: Batch, rows: Tensor, metrics: Metrics, shifts: list[tuple[Tensor, Tensor]], last: bool
    ) -> None:
        """One optimiser step on these rows; metrics are added up, `shifts` collects (drift, mask)."""
        self.updates += 1
        part = batch.rollouts.rows(rows)
        width = part.mask.shape[1]
        advantages = batch.advantages[rows, :width]
        if not bool((advantages != 0).any()):
            add(metrics, {"skipped_updates": (1.0, 1.0), "nonfinite_updates": (0.0, 1.0)})
            return
        plan, entry = self.run.plan, self.run.objective
        needs = entry.divergence
        now = statistics(
            self.policy,
            part.prompts,
            part.responses,
            part.mask,
            plan.rollout.temperature,
            topk_ids=part.topk_ids,
            full=needs is not None and needs.estimator == "exact",
        )
        position = None if batch.position is None else batch.position[rows, :width]
        divergence = estimate(needs, now, part) if needs else None
        tokens = Tokens(now.logp, part.logp, advantages, part.mask, divergence, position)
        horizon = plan.rollout.max_response_tokens if entry.aggregation == "seq-mean-token-sum-norm" else None
        denominator = batch_denominator(part.mask, entry.aggregation)
        loss, loss_metrics = policy_loss(self.rule, tokens, entry.aggregation, horizon, denominator)
        norm = self.descend(loss, self.optimizer, self.policy, plan.optimizer.lr)
        if self.critic is not None and self.critic_optimizer is not None:
            assert batch.values is not None and batch.returns is not None
            old, returns = batch.values[rows, :width], batch.returns[rows, :width]
            judged = part.mask & ~batch.rewards[rows].isnan().unsqueeze(1)
            values = self.critic(part.prompts, part.responses)
            error = value_loss(values, old, returns, judged, plan.critic.value_clip, float(judged.sum()))
            self.descend(error, self.critic_optimizer, self.critic, plan.optimizer.lr * plan.critic.lr_factor)
            add(metrics, {"value_loss": (error.item(), 1.0)})
        finite = math.isfinite(norm)
        self.nonfinite_in_a_row = 0 if finite else self.nonfinite_in_a_row + 1
        add(metrics, {"skipped_updates": (0.0, 1.0), "nonfinite_updates": (float(not finite), 1.0)})
        add(metrics, {"loss": (loss.item(), 1.0), "grad_norm": (norm, 1.0)} if finite else {})
        add(metrics, loss_metrics)
        add(metrics, token_metrics(self.rule, tokens, now.entropy))
        shifts.append((probability_shift(tokens), part.mask))
        if last and self.iteration % plan.checkpoint_every == 0 and isinstance(self.rule.settings, CPPO):
            self.append("tokens", self.dump(part, tokens))

    def descend(self, loss: Tensor, optimizer: torch.optim.Optimizer, module: torch.nn.Module, peak: float) -> float:
        """One clipped AdamW step with linear warm-up; returns the gradient norm. A non-finite gradient changes nothing."""
        plan = self.run.plan.optimizer
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(torch.nn.utils.clip_grad_norm_(module.parameters(), plan.grad_clip))
        if math.isfinite(norm) and math.isfinite(loss.item()):
            for group in optimizer.param_groups:
                group["lr"] = peak * min(1.0, self.updates / max(plan.warmup_updates, 1))
            optimizer.step()
            return norm
        return math.nan

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

    def dump(self, part: Rollouts, tokens: Tokens) -> list[dict[str, Any]]:
        """Tokens of the responses with most masked tokens, with CPPO's thresholds (Figure 3)."""
        assert isinstance(self.rule.settings, CPPO)
        detached = Tokens(tokens.logp.detach(), *(getattr(tokens, f) for f in list(Tokens.__annotations__)[1:]))
        terms, sums = self.rule(detached), prefix_sums(self.rule.settings, detached)
        masked = (terms.reason != int(Reason.KEPT)).sum(-1)
        found = []
        for row in masked.argsort(descending=True, stable=True)[:DUMPED_ROWS].tolist():
            length = int(part.mask[row].sum())

            def column(x: Tensor, row: int = row, length: int = length) -> list[float]:
                return x[row, :length].tolist()

            found.append(
                {
                    "iteration": self.iteration,
                    "row": row,
                    "delta": self.rule.settings.delta,
                    "token": [self.tokenizer.decode([i]) for i in part.responses[row, :length].tolist()],
                    "advantage": column(tokens.advantages),
                    "ratio": column(ratio(detached)),
                    "weighted": column(sums.weighted),
                    "prefix_threshold": column(self.rule.settings.delta + sums.allowed - sums.used),
                    "threshold": column(sums.threshold),
                    "reason": column(terms.reason),
                }
            )
        return found

    def append(self, stream: str, rows: list[dict[str, Any]]) -> None:
        """Add JSON lines to a stream."""
        path = self.folder / f"{stream}.jsonl"
        with writing(path), path.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(row, allow_nan=True) + "\n" for row in rows)

    # Saving and resuming ---------------------------------------------------------------------------------------------

    def save(self) -> None:
        """The training state, and before it evaluation weights where the iteration is one to score."""
        if self.iteration % self.run.plan.checkpoint_every == 0:
            with whole_folder(self.folder / "checkpoints" / f"step-{self.iteration}") as folder:
                save_pretrained(self.policy, folder, self.tokenizer)
        tensors = {"policy": self.policy.state_dict(), "optimizer": optimizer_tensors(self.optimizer)}
        if self.policy.config.tie_word_embeddings:
            tensors["policy"] = {k: v for k, v in tensors["policy"].items() if k != "lm_head.weight"}
        if self.critic is not None and self.critic_optimizer is not None:
            tensors["critic"] = {k: v for k, v in self.critic.state_dict().items() if k != "trunk.lm_head.weight"}
            tensors["critic_optimizer"] = optimizer_tensors(self.critic_optimizer)
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
        for line in damaged:
            tqdm.write(line, file=sys.stderr)
        _load(self.policy, tensors["policy"])
        restore_optimizer(self.optimizer, tensors["optimizer"])
        if self.critic is not None and self.critic_optimizer is not None:
            _load(self.critic, tensors["critic"])
            restore_optimizer(self.critic_optimizer, tensors["critic_optimizer"])
        for name, value in info.items():
            setattr(self, name, value)
        tqdm.write(f"{self.folder}: continuing after iteration {self.iteration}", file=sys.stderr)


def _load(module: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load weights; the only ones that may be absent are those shared with another parameter."""
    missing, unexpected = module.load_state_dict(tensors, strict=False)
    assert not unexpected and all(name.endswith("lm_head.weight") for name in missing), (missing, unexpected)


def train(run: RunConfig, base: Path, problems: tuple[Problem, ...], folder: Path) -> None:
    """Train `run` from the base model's checkpoint folder, or continue it, until its DONE file is written.

    SIGTERM (what Slurm sends before a time limit) ends it after the current iteration with its state saved, by
    `Interrupted`. Raises ValueError when the folder's saved state is of another version of the code or of a package.
    """
    if (folder / "DONE").is_file():
        return
    judge = Judge()
    judge.start()  # before anything is written or computed: without it some answers cannot be judged
    begin(run, folder, folder / "state", provenance())
    critic = ValueModel(load_pretrained(base)) if run.objective.advantage == "gae" else None
    total, status = run.plan.iterations, "finished"
    bar = tqdm(total=total, desc=f"{run.label} seed {run.seed}", unit="it", mininterval=5)
    policy, tokenizer = load_pretrained(base), load_tokenizer(base)
    with judge, Terminated() as terminated, closing(engine(run.plan.scale, base, policy)) as sampler, bar:
        trainer = Trainer(run, folder, problems, policy, tokenizer, critic, judge, sampler)
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
            if trainer.iteration % run.plan.checkpoint_every == 0 or terminated:
                trainer.save()
            if terminated and trainer.iteration < total:
                raise Interrupted(f"{folder}: stopped by SIGTERM after iteration {trainer.iteration}, which is saved")
    write_whole(folder / "DONE", json.dumps({"status": status, "iterations": trainer.iteration}) + "\n")


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
