"""Task families: the second generated one, `reduce`, and what every family promises, verification of its own included."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tiny import smoke

from cppo.__main__ import main
from cppo.models.create import UNK, create_tokenizer
from cppo.rewards import Judge
from cppo.suite.suite import load_suite
from cppo.tasks.chain import ChainTask
from cppo.tasks.noise import NoisyTable
from cppo.tasks.reduce import ReduceTask, add, response
from cppo.tasks.types import GeneratedTask, Problem, SizedBenchmark

TASK = ReduceTask(
    family="reduce",
    sizes=(5, 6, 8),
    problems=100,
    weak=0.35,
    benchmarks=(SizedBenchmark(name="small", size=4, problems=20), SizedBenchmark(name="large", size=20, problems=5)),
)
CHAIN = ChainTask(
    family="chain", sizes=(2, 4), problems=20, weak=0.25, benchmarks=(SizedBenchmark(name="c", size=3, problems=5),)
)


def right_table() -> NoisyTable[tuple[int, int]]:
    """A table without slips."""
    table = TASK.table("reduce")
    return NoisyTable(add, dict.fromkeys(table.right, 1.0), table.wrong)


def steps_of(question: str, text: str) -> list[tuple[int, int, int]]:
    """(a, b, claimed sum) of each step of a response, read from its text alone; every step must be possible.

    The two digits are taken from those that remain, their claimed sum goes to the end, and what is boxed is the last digit.
    """
    digits = [int(d) for d in question.removesuffix(">")]
    body, boxed = re.fullmatch(r"(.*)\\boxed\{(\d)\}", text).groups()  # type: ignore[union-attr]
    found = []
    for step in body.split("-"):
        written = re.fullmatch(r"(\d)\+(\d)=(\d)(?:>(\d+))?", step)
        assert written is not None, text
        a, b, c = (int(d) for d in written.groups()[:3])
        found.append((a, b, c))
        assert len(digits) > 1
        following = [
            [d for k, d in enumerate(digits) if k not in (i, j)] + [c]
            for i, j in itertools.permutations(range(len(digits)), 2)
            if (digits[i], digits[j]) == (a, b)
        ]
        rest = [int(d) for d in written[4] or str(c)]
        assert rest in following and (written[4] is None) == (len(rest) == 1), text
        digits = rest
    assert digits == [int(boxed)]
    return found


def test_the_documented_example() -> None:
    assert steps_of("51784>", "1+4=5>5785-8+5=3>573-5+3=8>78-7+8=5\\boxed{5}") == [
        (1, 4, 5),
        (8, 5, 3),
        (5, 3, 8),
        (7, 8, 5),
    ]


@pytest.mark.parametrize(("size", "tokens"), [(5, 39), (6, 51), (7, 64), (8, 78)])
def test_lengths_are_those_of_the_specification(size: int, tokens: int) -> None:
    """By the tokenizer, the end token included; every response to a problem of one size is as long."""
    assert TASK.response_tokens(size) == tokens == 7 * size - 6 + size * (size - 1) // 2
    tokenizer, rng = create_tokenizer(TASK.vocabulary), np.random.default_rng(size)
    for _ in range(20):
        question, _ = TASK.draw(size, rng)
        assert len(tokenizer(question).input_ids) == size + 1
        assert len(tokenizer(response(question, TASK.table("reduce"), rng)).input_ids) + 1 == tokens


@pytest.mark.parametrize("size", [2, 5, 8, 20])
def test_every_way_leads_to_the_one_answer(size: int) -> None:
    """Without slips; different ways are taken, and what the question asks is the sum of its digits modulo 10."""
    rng = np.random.default_rng(size)
    question, answer = TASK.draw(size, rng)
    assert answer == str(sum(map(int, question[:-1])) % 10)
    ways = {response(question, right_table(), rng) for _ in range(30)}
    assert {way[-2] for way in ways} == {answer}
    assert all(c == (a + b) % 10 for way in ways for a, b, c in steps_of(question, way))
    assert len(ways) > 25 or size == 2


def test_demonstrations_are_well_formed_and_slip_as_the_table_says() -> None:
    """Each pair is shown right at its rate (five standard deviations), else as its one wrong digit; any two are taken."""
    table = TASK.table("reduce")
    right: Counter[tuple[int, int]] = Counter()
    shown: Counter[tuple[int, int]] = Counter()
    sizes: Counter[int] = Counter()
    for question, text in itertools.islice(TASK.demonstrations("reduce"), 3000):
        steps = steps_of(question, text)
        sizes[len(question) - 1] += 1
        assert len(steps) == len(question) - 2
        for a, b, c in steps:
            assert c in ((a + b) % 10, table.wrong[a, b])
            shown[a, b] += 1
            right[a, b] += c == (a + b) % 10
    assert len(shown) == 100 and min(shown.values()) > 20
    for pair, count in shown.items():
        rate = table.right[pair]
        assert abs(right[pair] / count - rate) < 5 * (rate * (1 - rate) / count) ** 0.5 + 0.5 / count, pair
    assert sizes.keys() == {5, 6, 8} and all(abs(n - 1000) < 5 * (3000 * 2 / 9) ** 0.5 for n in sizes.values())


def test_the_share_of_weak_sums() -> None:
    """A share `weak` of the 100 entries; what is shown wrongly is wrong."""
    table = TASK.table("reduce")
    assert table.right.keys() == table.wrong.keys() == set(itertools.product(range(10), repeat=2))
    weak = [rate for rate in table.right.values() if rate != 0.99]
    assert abs(len(weak) - 35) < 4 * (100 * 0.35 * 0.65) ** 0.5 and all(0.2 <= rate < 0.7 for rate in weak)
    assert all(0 <= digit <= 9 and digit != (a + b) % 10 for (a, b), digit in table.wrong.items())


# What every generated family promises ---------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [CHAIN, TASK], ids=["chain", "reduce"])
def test_sets_are_distinct_and_of_the_sizes_asked_for(task: GeneratedTask) -> None:
    sets, report = task.load("any")
    assert sets.keys() == {b.name for b in task.benchmarks} | {"train"} == report.keys()
    for benchmark in task.benchmarks:
        assert [p.difficulty for p in sets[benchmark.name]] == [benchmark.size] * benchmark.problems
    assert Counter(p.difficulty for p in sets["train"]).keys() == set(task.sizes)
    everything = [p for found in sets.values() for p in found]
    assert len({p.question for p in everything}) == len({p.id for p in everything}) == len(everything)
    assert task.load("any")[0] == sets != task.load("other")[0]


@pytest.mark.parametrize("task", [CHAIN, TASK], ids=["chain", "reduce"])
def test_the_alphabet_writes_every_demonstration(task: GeneratedTask) -> None:
    """No unknown token, the same text back, and no response longer than the family says."""
    tokenizer = create_tokenizer(task.vocabulary)
    assert len(set(task.vocabulary)) == len(task.vocabulary)
    for question, text in itertools.islice(task.demonstrations("any"), 200):
        for part in (question, text):
            ids = tokenizer(part).input_ids
            assert UNK not in ids and tokenizer.decode(ids) == part
        assert len(tokenizer(text).input_ids) + 1 <= max(task.response_tokens(size) for size in task.sizes)
    largest = max(*task.sizes, *(b.size for b in task.benchmarks))
    assert task.longest_response == (largest, task.response_tokens(largest))


@pytest.mark.parametrize("task", [CHAIN, TASK], ids=["chain", "reduce"])
def test_right_answers_are_judged_right(task: GeneratedTask) -> None:
    asked = task.load("any")[0]["train"][0]
    with Judge() as judge:
        assert task.verify(f"x\\boxed{{{asked.answer}}}", asked, judge) == 1.0
        assert task.verify(f"x\\boxed{{{(int(asked.answer) + 1) % 10}}}", asked, judge) == 0.0
        assert task.verify(asked.answer, asked, judge) == 0.0  # not in a box


# A family with several right answers ----------------------------------------------------------------------------------


def reduce_suite(folder: Path) -> Any:
    """The smoke suite's setting with a small task of family reduce and one rule."""
    tiny = smoke(folder).model_dump(mode="json")["settings"]["tiny"]
    benchmarks = [{"name": "reduce3", "size": 3, "problems": 4}]
    tiny["task"] = {"family": "reduce", "sizes": [2, 3], "problems": 64, "weak": 0.3, "benchmarks": benchmarks}
    tiny["warm_start"] |= {"target_accuracy": 0.2, "max_steps": 20, "check_every": 20}
    tiny |= {"iterations": 1, "checkpoint_every": 1}
    return smoke(folder, settings={"tiny": tiny}, seeds=[0], rules=[{"name": "grpo", "objective": "grpo"}])


def test_a_family_may_verify_in_its_own_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many right answers, judged without the judge: base model, training, evaluation and tables follow `verify` alone.

    Right is any response in which the last digit of the answer stands; an empty one has no verdict.
    """
    verdicts: list[tuple[str, float | None]] = []

    def verify(self: ReduceTask, response: str, asked: Problem, judge: Judge) -> float | None:
        verdict = float(asked.answer in response) if response else None
        verdicts.append((asked.id, verdict))
        return verdict

    def refuse(*_: object) -> None:
        raise AssertionError("the judge was asked")

    monkeypatch.setattr(ReduceTask, "verify", verify)
    monkeypatch.setattr(Judge, "verdict", refuse)
    suite = reduce_suite(tmp_path)
    (run,) = suite.runs()
    root = tmp_path / "runs"
    common = ["--suite", str(tmp_path / "suite.yaml"), "--root", str(root)]
    for command in ("data", "base"):
        assert main([command, *common, "--setting", "tiny"]) == 0
    verdicts.clear()
    assert main(["train", *common, "--run", run.id]) == 0
    (metrics,) = [json.loads(line) for line in (root / run.folder / "metrics.jsonl").read_text().splitlines()]
    judged = [verdict for _, verdict in verdicts if verdict is not None]
    assert metrics["accuracy"] == pytest.approx(sum(judged) / len(judged)) and 0 < metrics["accuracy"] < 1
    assert metrics["grad_norm"] > 0
    verdicts.clear()
    assert main(["evaluate", str(root / run.folder)]) == 0
    scores = pd.read_csv(root / run.folder / "scores.csv")
    right = Counter(problem for problem, verdict in verdicts if verdict)
    assert {row.problem: row.correct for row in scores.itertuples() if row.correct} == right and right
    assert len(verdicts) == 4 * 4 == scores["samples"].sum()
    assert sum(verdict is None for _, verdict in verdicts) == scores["unjudged"].sum()


def test_the_suite_of_the_second_family() -> None:
    """Its thresholds are the paper's, and a response of the longest problem just fits."""
    suite = load_suite("reduce")
    setting = suite.settings["reduce"]
    assert isinstance(setting.task, ReduceTask) and setting.task.longest_response == (7, 64)
    assert setting.rollout.max_response_tokens == 64 and setting.rollout.updates == 8
    rules = {run.rule_name: run.rule.params for run in suite.runs()}
    assert rules["cppo"]["delta"] == rules["dppo"]["delta"] == 0.15 and rules["cppo"]["delta_b"] == 0.02
    assert setting.model.parameters(len(setting.task.vocabulary)) == (99_904, 99_904)
