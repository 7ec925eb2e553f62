"""Avg@k of checkpoints on the held-out sets, through lm-eval with our rollout engine as its model.

All checkpoints of a run are scored in one process. The sampling noise depends on (setting, seed, benchmark, problem,
sample) only, so it is the same at every checkpoint and for every objective.
"""

import csv
import io
import json
import logging
import shutil
from collections import Counter
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager

from cppo.evaluation.lm_eval_task import judge
from cppo.models.load import load_tokenizer
from cppo.rollout.engines import engine
from cppo.suite.config import BaseConfig, MathTask, RunConfig, Scale, Task
from cppo.system.files import write_whole
from cppo.system.seeds import uniforms
from cppo.tasks.prompts import encode


@dataclass(frozen=True)
class Score:
    """One problem at one checkpoint: a row of the scores table."""

    run: str
    """Run id; the base model's id for label "base"."""
    label: str
    setting: str
    seed: int
    step: int
    """Iterations of training before the checkpoint."""
    benchmark: str
    problem: str
    """Problem id."""
    correct: int
    """Right samples."""
    samples: int
    """All samples, the k of Avg@k."""
    unjudged: int
    """Samples without a verdict; Avg@k is over the others."""
    mean_length: float
    """Tokens a response."""
    truncated: int
    """Samples that reached the longest length."""


@register_model("cppo")
class CheckpointLM(LM):  # type: ignore[misc]
    """A checkpoint folder as an lm-eval model, sampled by the engine of `scale` with named seeds."""

    def __init__(
        self, pretrained: str, task: Task | MathTask, setting: str, seed: int, scale: Scale | None = None
    ) -> None:
        super().__init__()
        self.engine, self.tokenizer = engine(scale, pretrained), load_tokenizer(pretrained)
        self.task, self.setting, self.seed_axis = task, setting, seed
        self.lengths: dict[tuple[str, str], list[tuple[int, bool]]] = {}
        """(task, problem id) -> (tokens, truncated) of each sample."""

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """One text a request; a request that occurs k times is the same prompt with samples 0..k-1."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps([request.task_name, request.args[1]], sort_keys=True), []).append(i)
        texts = [""] * len(requests)
        for key, rows in groups.items():
            options = json.loads(key)[1]
            if options.get("until"):
                raise ValueError(f"generation_kwargs.until: {options['until']!r}: responses end at the end token only")
            seen: Counter[str] = Counter()
            noise = []
            for i in rows:
                problem = requests[i].doc["id"]
                axes = ("evaluate", self.setting, self.seed_axis, requests[i].task_name, problem, seen[problem])
                noise.append(uniforms(1, options["max_gen_toks"], *axes))
                seen[problem] += 1
            prompts = [encode(self.task, self.tokenizer, requests[i].args[0]) for i in rows]
            rollouts = self.engine.generate(prompts, torch.cat(noise), options["temperature"], options["top_p"])
            decoded = self.tokenizer.batch_decode(rollouts.token_lists(), skip_special_tokens=True)
            for row, i in enumerate(rows):
                texts[i] = decoded[row]
                name = (requests[i].task_name, requests[i].doc["id"])
                sizes = (int(rollouts.lengths[row]), bool(rollouts.truncated[row]))
                self.lengths.setdefault(name, []).append(sizes)
        return texts

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise ValueError("model cppo generates only; score log-likelihoods with lm-eval's own hf model")

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise ValueError("model cppo generates only; score log-likelihoods with lm-eval's own hf model")


def evaluate(config: RunConfig | BaseConfig, folder: Path, data: Path) -> None:
    """Score every checkpoint under `folder` and write scores.csv; checkpoints but the best and the last are deleted.

    Each checkpoint's rows are kept under scores/ as they come, so an interrupted evaluation continues.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    judge().start()  # before anything is sampled: it may be impossible
    tasks = TaskManager(include_path=str(data / "lm_eval"), include_defaults=False)
    for checkpoint in _checkpoints(folder):
        step = _step(checkpoint)
        part = folder / "scores" / f"step-{step}.csv"
        if not part.exists():
            write_scores(part, _score(config, checkpoint, step, tasks))
    parts = sorted((folder / "scores").glob("step-*.csv"), key=_step)
    scores = [score for part in parts for score in read_scores(part)]
    if not scores and not (folder / "DONE").is_file():  # a run may collapse before its first checkpoint
        raise ValueError(f"{folder}: no checkpoint to score; train it first")
    write_scores(folder / "scores.csv", scores)
    means = checkpoint_means(scores)
    for checkpoint in _checkpoints(folder):
        if means and _step(checkpoint) not in (max(means), max(means, key=means.__getitem__)):
            shutil.rmtree(checkpoint)


def _checkpoints(folder: Path) -> list[Path]:
    found = (folder / "checkpoints").glob("step-*")
    return sorted((p for p in found if not p.name.endswith(".partial")), key=_step)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _score(config: RunConfig | BaseConfig, checkpoint: Path, step: int, tasks: TaskManager) -> list[Score]:
    model = CheckpointLM(str(checkpoint), config.plan.task, config.setting, config.seed, config.plan.scale)
    names = [benchmark.name for benchmark in config.plan.task.benchmarks]
    # Not simple_evaluate, which also describes the machine: with `pip list`, a second a checkpoint.
    loaded = tasks.load(names)
    with closing(model.engine):
        found: dict[str, Any] | None = lm_eval.evaluate(model, loaded, bootstrap_iters=0, log_samples=True)
    assert found is not None
    scores = []
    for name in names:
        for sample in found["samples"][name]:
            sizes = model.lengths[name, sample["doc"]["id"]]
            count = len(sizes)
            unjudged = round(sample["unjudged"] * count)
            scores.append(
                Score(
                    run=config.id,
                    label=config.label,
                    setting=config.setting,
                    seed=config.seed,
                    step=step,
                    benchmark=name,
                    problem=sample["doc"]["id"],
                    correct=round(sample["avg"] * (count - unjudged)),
                    samples=count,
                    unjudged=unjudged,
                    mean_length=sum(length for length, _ in sizes) / count,
                    truncated=sum(truncated for _, truncated in sizes),
                )
            )
    return scores


def checkpoint_means(scores: list[Score]) -> dict[int, float]:
    """Step -> unweighted mean over benchmarks of Avg@k, the paper's score; over the judged samples of judged problems."""
    sums: dict[int, dict[str, list[float]]] = {}
    for score in scores:
        if score.unjudged < score.samples:
            rate = score.correct / (score.samples - score.unjudged)
            sums.setdefault(score.step, {}).setdefault(score.benchmark, []).append(rate)
    return {step: sum(sum(rates) / len(rates) for rates in sets.values()) / len(sets) for step, sets in sums.items()}


def write_scores(path: Path, scores: list[Score]) -> None:
    """Rows as CSV, whole or not at all."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [f.name for f in fields(Score)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(score) for score in scores)
    write_whole(path, out.getvalue())


def read_scores(path: Path) -> list[Score]:
    """The rows of `write_scores`. Raises ValueError naming the file, and line and column where one is wrong."""
    types = {f.name: f.type for f in fields(Score)}
    remedy = "delete it and evaluate again"
    found = []
    try:
        with path.open(newline="", encoding="utf-8") as source:
            reader = csv.reader(source, strict=True)
            if next(reader, None) != list(types):
                raise ValueError(f"{path}: columns are not {', '.join(types)}; {remedy}")
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if len(row) != len(types):
                    raise ValueError(f"{where}: {len(row)} values for {len(types)} columns; {remedy}")
                values = {}
                for (name, kind), text in zip(types.items(), row, strict=True):
                    try:
                        values[name] = kind(text)  # type: ignore[operator]
                    except ValueError:
                        raise ValueError(f"{where}: {name}: {text!r:.60} is not a number; {remedy}") from None
                found.append(Score(**values))
    except (csv.Error, UnicodeDecodeError):
        raise ValueError(f"{path}: not a CSV table; {remedy}") from None
    return found
