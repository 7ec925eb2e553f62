"""Avg@k of checkpoints on the held-out sets, through lm-eval with a rollout engine of this package as its model.

Avg@k is the share of right responses among k samples per problem. All checkpoints of a run are scored in one process. The
sampling noise depends on (setting, seed, benchmark, problem, sample) only, so it is the same at every checkpoint and for
every rule.
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

from cppo import statistics
from cppo.evaluation.lm_eval_task import judge
from cppo.models.load import load_tokenizer
from cppo.results.run_folder import RunFolder
from cppo.rollout.start import start_engine
from cppo.suite.config import BaseConfig, RunConfig, Scale
from cppo.system.files import write_atomic
from cppo.system.seeds import uniforms
from cppo.tasks.types import Task


@dataclass(frozen=True)
class Score:
    """One problem at one checkpoint: a row of the scores table."""

    run: str
    """The run's id; the base model's id for rule "base"."""
    rule: str
    setting: str
    seed: int
    iteration: int
    """Iterations of training before the checkpoint."""
    benchmark: str
    problem: str
    """Problem id."""
    correct: int
    """How many samples are right."""
    samples: int
    """How many samples there are, the k of Avg@k."""
    unjudged: int
    """How many samples have no verdict; Avg@k is over the others."""
    mean_length: float
    """Tokens per response."""
    truncated: int
    """How many samples reached the longest length without an end token."""


@register_model("cppo")
class CheckpointLM(LM):  # type: ignore[misc]
    """A checkpoint folder as an lm-eval model, sampled from by the engine of `scale` with named seeds."""

    def __init__(self, pretrained: str, task: Task, setting_name: str, seed: int, scale: Scale | None = None) -> None:
        super().__init__()
        self.engine, self.tokenizer = start_engine(scale, pretrained), load_tokenizer(pretrained)
        self.task, self.setting_name, self.seed_axis = task, setting_name, seed
        self.lengths: dict[tuple[str, str], list[tuple[int, bool]]] = {}
        """(task, problem id) -> (tokens, truncated) of each sample."""

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """One completion per request. The k repeats of a request are samples 0..k-1 of the same prompt."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps([request.task_name, request.args[1]], sort_keys=True), []).append(i)
        texts = [""] * len(requests)
        for key, rows in groups.items():
            options = json.loads(key)[1]
            if options.get("until"):
                raise ValueError(f"generation_kwargs.until: {options['until']!r}: responses end at the end token only")
            samples: Counter[str] = Counter()
            noise = []
            for i in rows:
                problem = requests[i].doc["id"]
                axes = ("evaluate", self.setting_name, self.seed_axis, requests[i].task_name, problem, samples[problem])
                noise.append(uniforms(1, options["max_gen_toks"], *axes))
                samples[problem] += 1
            prompts = [self.task.encode(self.tokenizer, requests[i].args[0]) for i in rows]
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


def evaluate(path: Path) -> None:
    """Score every checkpoint of the run or base model at `path` and write scores.csv. All checkpoints but the best and the last
    are deleted then.

    The rows of each checkpoint are kept once it is scored, so an interrupted evaluation continues with the next. Raises
    ValueError for a folder of another numerics version, and for one without anything to score.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = RunFolder(path)
    config = folder.config()
    folder.check_numerics()
    judge().start()  # before anything is sampled, because it may fail
    base = config.base if isinstance(config, RunConfig) else config
    tasks = TaskManager(include_path=str(path.resolve().parents[2] / base.data / "lm_eval"), include_defaults=False)
    for iteration, checkpoint in folder.checkpoints().items():
        part = folder.scores_of(iteration)
        if not part.exists():
            write_scores(part, _score(config, checkpoint, iteration, tasks))
    scores = [score for part in folder.scored() for score in read_scores(part)]
    if not scores and not folder.done:  # a run may collapse before its first checkpoint
        raise ValueError(f"{path}: no checkpoint to score; train it first")
    write_scores(folder.scores, scores)
    means = checkpoint_means(scores)
    for iteration, checkpoint in folder.checkpoints().items():
        if means and iteration not in (max(means), max(means, key=means.__getitem__)):
            shutil.rmtree(checkpoint)


def _score(config: RunConfig | BaseConfig, checkpoint: Path, iteration: int, tasks: TaskManager) -> list[Score]:
    setting = config.setting
    model = CheckpointLM(str(checkpoint), setting.task, config.setting_name, config.seed, setting.scale)
    names = [benchmark.name for benchmark in setting.task.benchmarks]
    # simple_evaluate would also describe the machine with `pip list`, which takes a second per checkpoint.
    loaded = tasks.load(names)
    with closing(model.engine):
        results: dict[str, Any] | None = lm_eval.evaluate(model, loaded, bootstrap_iters=0, log_samples=True)
    assert results is not None
    scores = []
    for name in names:
        for sample in results["samples"][name]:
            sizes = model.lengths[name, sample["doc"]["id"]]
            count = len(sizes)
            # lm-eval's metrics are shares per problem, from which the counts are recovered.
            unjudged = round(sample["unjudged"] * count)
            scores.append(
                Score(
                    run=config.id,
                    rule=config.rule_name,
                    setting=config.setting_name,
                    seed=config.seed,
                    iteration=iteration,
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
    """Iteration -> the paper's score (`cppo.statistics.score`); a checkpoint without any judged sample is left out."""
    means = {}
    for iteration in sorted({score.iteration for score in scores}):
        rows = [score for score in scores if score.iteration == iteration and score.unjudged < score.samples]
        if rows:
            names = sorted({score.benchmark for score in rows})
            means[iteration] = float(
                statistics.score(
                    [score.correct for score in rows],
                    [score.samples - score.unjudged for score in rows],
                    [names.index(score.benchmark) for score in rows],
                )
            )
    return means


def write_scores(path: Path, scores: list[Score]) -> None:
    """Write rows as a table of comma-separated values (CSV), complete or not at all."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [f.name for f in fields(Score)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(score) for score in scores)
    write_atomic(path, out.getvalue())


def read_scores(path: Path) -> list[Score]:
    """The rows that `write_scores` wrote. Raises ValueError naming the file, and line and column where a value is wrong."""
    types = {f.name: f.type for f in fields(Score)}
    remedy = "delete it and evaluate again"
    scores = []
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
                scores.append(Score(**values))
    except (csv.Error, UnicodeDecodeError):
        raise ValueError(f"{path}: not a CSV table; {remedy}") from None
    return scores
