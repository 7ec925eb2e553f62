"""Scores: every sample counted, the same noise at every checkpoint, and agreement with stock lm-eval on the same task."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import chain_tokenizer, smoke

from cppo.__main__ import main
from cppo.evaluation.evaluate import Score, checkpoint_means, evaluate, read_scores, write_scores
from cppo.models.load import load_pretrained, save_pretrained
from cppo.results.provenance import provenance
from cppo.results.run_folder import RunFolder
from cppo.suite.config import BaseConfig

SETTING = {
    "title": "Tiny",
    "model": {
        "hidden_size": 32,
        "layers": 1,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 16,
        "intermediate_size": 64,
    },
    "task": {
        "family": "chain",
        "sizes": [1],
        "problems": 32,
        "weak": 0.0,
        "benchmarks": [{"name": "one", "size": 1, "problems": 12}, {"name": "two", "size": 2, "problems": 6}],
    },
    "warm_start": {"max_steps": 600, "target_accuracy": 0.25, "check_every": 20, "batch": 64, "lr": 0.01},
    "rollout": {"prompts": 4, "responses": 2, "minibatch": 2, "max_response_tokens": 20},
    "optimizer": {"lr": 0.001},
    "iterations": 2,
    "checkpoint_every": 1,
}


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[BaseConfig, Path, Path]:
    """A base model that has learned something, made and scored by the command line: (config, its folder, its data)."""
    folder = tmp_path_factory.mktemp("scored")
    suite = smoke(folder, settings={"tiny": SETTING}, evaluation={"samples": 16})
    common = ["--suite", str(folder / "suite.yaml"), "--root", str(folder / "runs"), "--setting", "tiny"]
    base = suite.bases()[0]
    for command in (["data", *common], ["base", *common], ["evaluate", str(folder / "runs" / base.folder)]):
        assert main(command) == 0
    return base, folder / "runs" / base.folder, folder / "runs" / base.data


def beside(scored: tuple[BaseConfig, Path, Path], root: Path) -> RunFolder:
    """A folder of the same base model under another root with the same problems, without checkpoints."""
    config, _, data = scored
    shutil.copytree(data, root / config.data)
    folder = RunFolder(root / config.folder)
    folder.begin(config, provenance(), begun=False)
    return folder


def test_a_row_per_problem_with_all_samples(scored: tuple[BaseConfig, Path, Path]) -> None:
    config, folder, _ = scored
    rows = read_scores(folder / "scores.csv")
    assert [sum(r.benchmark == name for r in rows) for name in ("one", "two")] == [12, 6]
    assert len({(r.benchmark, r.problem) for r in rows}) == 18
    assert all(r.samples == 16 and 0 <= r.correct <= 16 and r.run == config.id and r.rule == "base" for r in rows)
    assert any(0 < r.correct < 16 for r in rows), "one repeat counted 16 times would give 0 or 16 only"


def test_same_weights_same_scores_and_noise_at_every_checkpoint(
    scored: tuple[BaseConfig, Path, Path], tmp_path: Path
) -> None:
    """Two copies of one checkpoint score alike, problem by problem; other weights do not."""
    _, folder, _ = scored
    other = beside(scored, tmp_path)
    model = load_pretrained(folder / "checkpoints" / "iteration-0")
    for iteration in (0, 1):
        save_pretrained(model, other.checkpoint(iteration), chain_tokenizer())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.05)
    save_pretrained(model, other.checkpoint(2), chain_tokenizer())
    evaluate(other.path)
    rows = read_scores(other.scores)
    by_iteration = {
        iteration: [(r.correct, r.mean_length) for r in rows if r.iteration == iteration] for iteration in (0, 1, 2)
    }
    assert by_iteration[0] == by_iteration[1] != by_iteration[2]
    assert by_iteration[0] == [(r.correct, r.mean_length) for r in read_scores(folder / "scores.csv")]
    means = checkpoint_means(rows)
    assert set(other.checkpoints()) == {2, max(means, key=means.__getitem__)}  # the last, and the best


def test_stock_lm_eval_agrees(scored: tuple[BaseConfig, Path, Path], tmp_path: Path) -> None:
    """`lm_eval --model hf` on our checkpoint and task gives our score within three standard errors of the difference.

    Three, not two: draws differ between kinds of processor, and two would fail on one kind in twenty by chance.
    """
    _, folder, data = scored
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--tasks",
        "one",
        "--device",
        "cpu",
        "--batch_size",
        "64",
    ]
    command += ["--model_args", f"pretrained={folder / 'checkpoints' / 'iteration-0'},dtype=float32"]
    command += ["--include_path", str(data / "lm_eval"), "--output_path", str(tmp_path)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = tmp_path.rglob("results_*.json")
    stock = json.loads(result.read_text())["results"]["one"]["avg,all"]
    rates = [r.correct / r.samples for r in read_scores(folder / "scores.csv") if r.benchmark == "one"]
    ours = sum(rates) / len(rates)
    # Both sample the same problems: only the 16 samples per problem are drawn anew.
    variance = 2 * sum(p * (1 - p) / 16 for p in rates) / len(rates) ** 2
    assert 0.1 < ours < 0.9
    assert abs(stock - ours) <= 3 * math.sqrt(variance), (stock, ours)


def test_interrupted_evaluation_keeps_what_it_has(scored: tuple[BaseConfig, Path, Path], tmp_path: Path) -> None:
    """A checkpoint with stored rows is not scored again."""
    _, folder, _ = scored
    other = beside(scored, tmp_path)
    model = load_pretrained(folder / "checkpoints" / "iteration-0")
    save_pretrained(model, other.checkpoint(0), chain_tokenizer())
    row = read_scores(folder / "scores.csv")[0]
    write_scores(other.scores_of(0), [row])
    evaluate(other.path)
    assert read_scores(other.scores) == [row]


def test_nothing_to_score_is_an_error(scored: tuple[BaseConfig, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint to score"):
        evaluate(beside(scored, tmp_path).path)


def test_scores_of_another_version_are_refused(tmp_path: Path) -> None:
    (tmp_path / "scores.csv").write_text("run,label,setting\n1,2,3\n")
    with pytest.raises(ValueError, match=r"scores\.csv: columns are not run, rule, setting, seed, iteration"):
        read_scores(tmp_path / "scores.csv")


def test_the_score_is_the_unweighted_mean_of_the_benchmarks() -> None:
    """Benchmark a: (4/4 + 0/4) / 2 = 0.5; b: 1/4; the mean is 0.375 though a has more problems."""
    rows = [("a", "p", 4), ("a", "q", 0), ("b", "r", 1)]
    scores = [Score("x", "cppo", "s", 0, 5, b, p, correct, 4, 0, 1.0, 0) for b, p, correct in rows]
    assert checkpoint_means(scores) == {5: 0.375}
