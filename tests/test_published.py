"""Published checkpoints on mathematics in words: data, base, train and evaluate by the command line, and what is refused."""

import importlib
import json
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from catalog import available, files
from lm_eval.tasks import TaskManager
from mathematics import (
    INSTRUCTION,
    QUESTIONS,
    TEMPLATE,
    TRAIN,
    dapo,
    make_checkpoint,
    make_tokenizer,
    raw_suite,
    write_data,
    write_rows,
    write_suite,
)
from safetensors.torch import load_file

from cppo.__main__ import main
from cppo.evaluation.evaluate import read_scores
from cppo.models.load import load_pretrained, load_tokenizer
from cppo.rollout.torch_engine import TorchEngine
from cppo.suite.suite import Suite
from cppo.system.seeds import uniforms
from cppo.tasks.math import MathTask
from cppo.tasks.types import Problem, read_problems
from cppo.training.base_model import make_base


def changed(raw: dict[str, Any], **task: Any) -> MathTask:
    return MathTask.model_validate(raw["settings"]["tiny"]["task"] | task, strict=False)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A suite as plain data, with its data sets and its checkpoint on the disk."""
    folder = tmp_path_factory.mktemp("published")
    data, checkpoint = write_data(folder / "data"), folder / "checkpoint"
    raw = raw_suite(data, checkpoint)
    task, tokenizer = changed(raw), make_tokenizer()
    asked = [*QUESTIONS, "Alice has $3$ hats. How many?", "Bob has $5$ hats. How many?", "Halve $6$."]
    make_checkpoint(checkpoint, [task.prompt_ids(tokenizer, question) for question in asked])
    return raw


@pytest.fixture(scope="module")
def trained(raw: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Suite, Path]:
    """The suite carried through every command: (suite, its root)."""
    folder = tmp_path_factory.mktemp("trained")
    suite, root = write_suite(folder / "suite.yaml", raw), folder / "runs"
    common = ["--suite", str(folder / "suite.yaml"), "--root", str(root)]
    for command in ("data", "base"):
        assert main([command, *common, "--setting", "tiny"]) == 0
    for run in suite.runs():
        assert main(["train", *common, "--run", run.id]) == 0
    for config in (*suite.bases(), *suite.runs()):
        assert main(["evaluate", str(root / config.folder)]) == 0
    assert main(["collect", *common]) == 0
    return suite, root


def test_the_base_is_the_checkpoint_itself(raw: dict[str, Any], trained: tuple[Suite, Path]) -> None:
    suite, root = trained
    folder = root / suite.bases()[0].folder
    link = folder / "checkpoints" / "iteration-0"
    assert link.is_symlink() and link.resolve() == Path(raw["settings"]["tiny"]["model"]["name"]).resolve()
    sums = json.loads((folder / "source.json").read_text())["sha256"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(sums)
    done = json.loads((folder / "DONE").read_text())
    assert done == {"iterations": 0, "collapsed_at": None, "problems": len(TRAIN), "too_long": 0}


def test_training_learns_from_right_and_wrong_answers_and_keeps_the_tokenizer(trained: tuple[Suite, Path]) -> None:
    suite, root = trained
    base = root / suite.bases()[0].folder / "checkpoints" / "iteration-0"
    for run in suite.runs():
        rows = [json.loads(line) for line in (root / run.folder / "metrics.jsonl").read_text().splitlines()]
        assert len(rows) == 2 and any(row["grad_norm"] for row in rows)
        assert all(0 < row["accuracy"] < 1 and row["unjudged"] == 0 for row in rows)
        last = root / run.folder / "checkpoints" / "iteration-2"
        before, after = load_tokenizer(base), load_tokenizer(last)
        assert before.get_vocab() == after.get_vocab() and after.chat_template == TEMPLATE
        assert after.eos_token == "<|im_end|>"
        old, new = load_file(base / "model.safetensors"), load_file(last / "model.safetensors")
        assert old.keys() == new.keys() and not all(torch.equal(old[name], new[name]) for name in old)


def test_scores_are_those_of_the_same_prompts_judged_by_eye(trained: tuple[Suite, Path]) -> None:
    """Sampled again without lm-eval, with the prompts of training; 6/2 is 3, and the text answer is never given."""
    suite, root = trained
    config = suite.bases()[0]
    folder, task = root / config.folder, config.setting.task
    model, tokenizer = (load(folder / "checkpoints" / "iteration-0") for load in (load_pretrained, load_tokenizer))
    expected = {}
    for benchmark in task.benchmarks:
        for problem in read_problems(root / config.data / f"{benchmark.name}.jsonl"):
            axes = ("evaluate", config.setting_name, 0, benchmark.name, problem.id)
            noise = torch.cat([uniforms(1, 8, *axes, n) for n in range(8)])
            prompts = [task.prompt_ids(tokenizer, problem.question)] * 8
            responses = TorchEngine(model).generate(prompts, noise, 0.7, 0.95).responses
            right = "\\boxed{3}" if problem.answer == "\\frac{6}{2}" else f"\\boxed{{{problem.answer}}}"
            texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
            expected[benchmark.name, problem.id] = sum(text == right for text in texts)
    found = {(row.benchmark, row.problem): row.correct for row in read_scores(folder / "scores.csv")}
    assert found == expected
    assert len(found) == 5 and 0 < sum(found.values()) < 8 * 5
    scores = pd.read_csv(root / "suite" / "scores.csv")
    assert len(scores) == 5 * (1 + 2 * 2) and set(scores["rule"]) == {"base", "cppo", "grpo"}
    assert (scores["unjudged"] == 0).all()


def test_lm_eval_asks_what_training_asks(trained: tuple[Suite, Path]) -> None:
    """The task file renders each question to the wording, whatever quotes, braces and backslashes stand in it."""
    suite, root = trained
    config = suite.bases()[0]
    manager = TaskManager(include_path=str(root / config.data / "lm_eval"), include_defaults=False)
    loaded = manager.load_task_or_group(["math500"])["math500"]
    docs = list(loaded.test_docs())
    assert [loaded.doc_to_text(doc) for doc in docs] == [config.setting.task.wording(doc["question"]) for doc in docs]
    assert loaded.doc_to_text(docs[0]) == f"Halve $6$.\n{INSTRUCTION}"


def test_prompts_follow_the_setting(raw: dict[str, Any]) -> None:
    tokenizer = make_tokenizer()

    def text(**task: Any) -> str:
        return str(tokenizer.decode(changed(raw, **task).prompt_ids(tokenizer, "Why?")))

    asked = f"Why?\n{INSTRUCTION}"
    assert text() == f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
    assert text(enable_thinking=True) == text()
    assert text(enable_thinking=False) == text() + "<think></think>"
    assert text(prompt="base") == asked


def test_longer_prompts_are_left_out(raw: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = make_tokenizer()
    problems = tuple(Problem(str(n), "apples " * n, "3", "x", 0) for n in range(1, 6))
    lengths = [len(changed(raw).prompt_ids(tokenizer, p.question)) for p in problems]
    assert lengths == sorted(set(lengths))
    assert changed(raw, max_prompt_tokens=lengths[2]).short_enough(tokenizer, problems) == problems[:3]
    assert "2 of 5 training problems are left out" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"max_prompt_tokens: every training prompt is longer than 3 tokens"):
        changed(raw, max_prompt_tokens=3).short_enough(tokenizer, problems)


def edit(folder: Path, file: str, **keys: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), r"not a Hugging Face checkpoint \(config.json is missing\)"),
    "pickled weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"holds no weights as safetensors but pytorch_model.bin",
    ),
    "a missing shard": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}'),
        r"model-2.safetensors is missing",
    ),
    "no language model": (
        lambda f: edit(f, "config.json", architectures=["Qwen3ForSequenceClassification"]),
        r"architectures \['Qwen3ForSequenceClassification'\] is not a causal language model",
    ),
    "no end token": (lambda f: edit(f, "tokenizer_config.json", eos_token=None), r"the tokenizer has no end token"),
    "no chat template": (
        lambda f: (f / "chat_template.jinja").unlink(),
        r"the tokenizer has no chat template; take task.prompt: base",
    ),
    "too short": (
        lambda f: edit(f, "config.json", max_position_embeddings=207),
        r"max_prompt_tokens \+ max_response_tokens are 208, the model's longest sequence is 207",
    ),
    "too few embeddings": (
        lambda f: edit(f, "config.json", vocab_size=100),
        r"the tokenizer has \d+ tokens, the model 100",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_checkpoint_that_cannot_be_trained_is_one_line(case: str, raw: dict[str, Any], tmp_path: Path) -> None:
    damage, says = BROKEN[case]
    good = Path(raw["settings"]["tiny"]["model"]["name"])
    damage(shutil.copytree(good, tmp_path / "model"))
    raw = raw | {"settings": {"tiny": raw["settings"]["tiny"] | {"model": {"name": str(tmp_path / "model")}}}}
    suite = write_suite(tmp_path / "suite.yaml", raw)
    with pytest.raises(ValueError, match=says) as caught:
        make_base(suite.bases()[0], (), tmp_path / "base")
    assert str(tmp_path / "model") in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "base" / "DONE").exists()


def test_a_missing_hub_is_one_line_and_quick(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object, **kwargs: object) -> object:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    model = {"name": "Qwen/Qwen3-1.7B", "revision": "0123456789" * 4}
    raw = raw | {"settings": {"tiny": raw["settings"]["tiny"] | {"model": model}}}
    write_suite(tmp_path / "suite.yaml", raw)
    common = ["--suite", str(tmp_path / "suite.yaml"), "--root", str(tmp_path), "--setting", "tiny"]
    assert main(["data", *common]) == 0
    capsys.readouterr()
    start = time.monotonic()
    assert main(["base", *common]) == 2
    assert time.monotonic() - start < 15
    error = capsys.readouterr().err
    assert error.startswith("cppo: error: Qwen/Qwen3-1.7B: this model at commit 0123456789 is not in the local cache")
    assert (
        error.endswith("with a copy at hand, name its folder as model: {name: /path/to/it}\n")
        and error.count("\n") == 1
    )


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("model",), {"name": "Qwen/Qwen3-1.7B"}, "model: revision: a hub name needs the commit"),
        (("model",), {"name": "/models/x", "revision": "0" * 40}, "model: revision: a hub name needs the commit"),
        (("model",), {"name": "Qwen"}, "model.name: String should match pattern"),
        (
            ("task", "data_dir"),
            None,
            "task: dapo_math_17k: revision is missing: the hub needs a commit; or set data_dir",
        ),
        (("task", "enable_thinking"), True, None),
        (
            ("task", "instruction"),
            "{{question}}",
            "task: instruction: {{, {% and {# have a meaning in lm-eval's task files",
        ),
    ],
)
def test_settings_that_cannot_work(
    place: tuple[str, ...], value: Any, says: str | None, raw: dict[str, Any], tmp_path: Path
) -> None:
    raw = json.loads(json.dumps(raw))
    target = raw["settings"]["tiny"]
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    if says is None:
        write_suite(tmp_path / "suite.yaml", raw)
        target["prompt"], says = "base", "task: enable_thinking is for prompt chat"
    with pytest.raises(ValueError) as caught:
        write_suite(tmp_path / "suite.yaml", raw)
    assert f"settings.tiny.{says}" in str(caught.value)


def test_a_training_problem_of_a_benchmark_is_not_trained_on(raw: dict[str, Any], tmp_path: Path) -> None:
    """By the command line: the report beside the data counts it, the training file lacks it."""
    data = shutil.copytree(raw["settings"]["tiny"]["task"]["data_dir"], tmp_path / "data")
    shutil.rmtree(data / "dapo_math_17k")
    write_rows(data, "dapo_math_17k", [*TRAIN * 3, dapo("alice has 3 hats how many", "3")])
    raw = json.loads(json.dumps(raw))
    raw["settings"]["tiny"]["task"] |= {"data_dir": str(data), "train": {"name": "dapo_math_17k", "rows": 37}}
    config = write_suite(tmp_path / "suite.yaml", raw).bases()[0]
    assert main(["data", "--suite", str(tmp_path / "suite.yaml"), "--root", str(tmp_path), "--setting", "tiny"]) == 0
    report = json.loads((tmp_path / config.data / "report.json").read_text())
    assert report["train"]["overlap"]["aime24"] == {"exact": 0, "normalised": 1}
    assert [p.question for p in read_problems(tmp_path / config.data / "train.jsonl")] == QUESTIONS


def test_a_suite_of_ones_own_files_runs_end_to_end(
    raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Family file from data to tables by the command line: JSON lines to train on, Parquet to score, chosen columns."""
    rows = [{"prompt": question, "solution": "35"[n % 2]} for n, question in enumerate(QUESTIONS)]
    train, held = (
        write_rows(tmp_path, name, part, kind)
        for name, part, kind in (("train", rows[:8], "jsonl"), ("held", rows[8:], "parquet"))
    )
    task = {
        "family": "file",
        "train": {"path": str(train)},
        "benchmarks": [{"name": "apples", "path": str(held), "problems": 3}],
        "columns": {"question": "prompt", "answer": "solution"},
        **{key: raw["settings"]["tiny"]["task"][key] for key in ("prompt", "instruction", "max_prompt_tokens")},
    }
    own = raw | {"settings": {"tiny": raw["settings"]["tiny"] | {"task": task}}, "rules": raw["rules"][:1]}
    suite, root = write_suite(tmp_path / "suite.yaml", own), tmp_path / "runs"
    common = ["--suite", str(tmp_path / "suite.yaml"), "--root", str(root)]
    (run,) = suite.runs()
    for command in ("data", "base"):
        assert main([command, *common, "--setting", "tiny"]) == 0
    assert main(["train", *common, "--run", run.id]) == 0
    for config in (*suite.bases(), run):
        assert main(["evaluate", str(root / config.folder)]) == 0
    assert main(["collect", *common]) == 0
    scores = pd.read_csv(root / "suite" / "scores.csv")
    assert len(scores) == 3 * 3 and set(scores["benchmark"]) == {"apples"} and 0 < scores["correct"].sum() < 8 * 9
    assert [p.question for p in read_problems(root / run.base.data / "apples.jsonl")] == QUESTIONS[8:11]

    # The same name with other problems: refused once there is a base model, because the run's id would not tell.
    assert main(["data", *common, "--setting", "tiny"]) == 0
    write_rows(tmp_path, "train", rows[:7], "jsonl")
    capsys.readouterr()
    assert main(["data", *common, "--setting", "tiny"]) == 2
    assert (
        "the file of train has changed since the base model was made; give the new one another"
        in capsys.readouterr().err
    )
    assert len(read_problems(root / run.base.data / "train.jsonl")) == 8


def test_tables_and_figures_can_be_drawn(trained: tuple[Suite, Path], tmp_path: Path) -> None:
    """Every item that the workflow would draw of such a suite, from the tables of a real run of it."""
    suite, root = trained
    items = available(suite.published())
    assert {"table1", "table3", "table4", "figure2", "figure3", "figure4", "figure7", "figure8"} <= set(items)
    for item in items:
        assert importlib.import_module(item).main([str(root / "suite"), "--out", str(tmp_path)]) == 0
        assert all((tmp_path / file).stat().st_size for file in files(suite.published(), item))
