"""The chain task: what it means, how the noisy table corrupts it, and how its files are read and written."""

import hashlib
import itertools
import json
import os
import re
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cppo.models.create import UNK, create_tokenizer
from cppo.tasks import chain as module
from cppo.tasks.chain import OPERANDS, Chain, ChainTask, apply, random_chain
from cppo.tasks.noise import NoisyTable
from cppo.tasks.types import SPECIAL, Problem, SizedBenchmark, problem, read_problems, write_problems


def held_out(name: str, size: int, problems: int) -> SizedBenchmark:
    return SizedBenchmark(name=name, size=size, problems=problems)


TASK = ChainTask(
    family="chain",
    sizes=(3, 5, 8),
    problems=200,
    weak=0.25,
    benchmarks=(held_out("short", 1, 30), held_out("long", 20, 10)),
)
VOCABULARY = TASK.vocabulary


def make_problems(task: ChainTask, setting_name: str) -> dict[str, tuple[Problem, ...]]:
    return task.load(setting_name)[0]


def evaluate(question: str) -> list[int]:
    """The running digits of a prompt, read from its text: labels in order, each step by Python's own arithmetic."""
    assert re.fullmatch(r"\d([a-t][-+*]\d)*>", question)
    labels = re.findall(r"[a-t]", question)
    assert labels == list("abcdefghijklmnopqrst"[: len(labels)])
    values = [int(question[0])]
    for operator, operand in re.findall(r"[a-t]([-+*])(\d)", question):
        values.append(eval(f"({values[-1]} {operator} {operand}) % 10"))
    return values


def claims(response: str) -> tuple[list[tuple[str, int, str, int, int]], int]:
    """The steps (label, digit, operator, operand, result) that a response writes down, and what it boxes."""
    found = re.fullmatch(r"((?:[a-t]\d[-+*]\d=\d)*)\\boxed\{(\d)\}", response)
    assert found is not None, response
    steps = re.findall(r"([a-t])(\d)([-+*])(\d)=(\d)", found[1])
    return [(label, int(a), operator, int(b), int(c)) for label, a, operator, b, c in steps], int(found[2])


def chains(count: int, steps: int) -> list[Chain]:
    rng = np.random.default_rng(steps)
    return [random_chain(steps, rng) for _ in range(count)]


# Text and tokens ------------------------------------------------------------------------------------------------------


def test_the_documented_example() -> None:
    chain = Chain(3, (("-", 8), ("*", 9), ("+", 5)))
    assert chain.question == "3a-8b*9c+5>"
    assert chain.response(chain.results()) == "a3-8=5b5*9=5c5+5=0\\boxed{0}"


def test_vocabulary_is_distinct_and_has_the_special_tokens_first() -> None:
    assert len(set(VOCABULARY)) == len(VOCABULARY) == 40 and VOCABULARY[:3] == SPECIAL
    tokenizer = create_tokenizer(VOCABULARY)
    assert [tokenizer.convert_tokens_to_ids(text) for text in VOCABULARY] == list(range(len(VOCABULARY)))


@pytest.mark.parametrize("steps", [1, 2, 6, 20])
def test_questions_and_responses_survive_the_tokenizer(steps: int) -> None:
    """No unknown token, the same text back, and the lengths that the configuration counts on."""
    tokenizer = create_tokenizer(VOCABULARY)
    for chain in chains(20, steps):
        for text, length in ((chain.question, 3 * steps + 2), (chain.response(chain.results()), 6 * steps + 3)):
            ids = tokenizer(text).input_ids
            assert len(ids) == length and UNK not in ids
            assert tokenizer.decode(ids) == tokenizer.batch_decode([ids], skip_special_tokens=True)[0] == text


def test_foreign_characters_are_unknown_not_lost() -> None:
    ids = create_tokenizer(VOCABULARY)("a1?\\b\n").input_ids
    assert ids == [VOCABULARY.index("a"), VOCABULARY.index("1"), UNK, UNK, VOCABULARY.index("b"), UNK]


# Meaning --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_chains_mean_what_their_text_says(steps: int) -> None:
    """Against an evaluator that only reads the text; the worked solution repeats the question's steps."""
    for chain in chains(50, steps):
        values = evaluate(chain.question)
        assert chain.results() == values[1:]
        written, boxed = claims(chain.response(chain.results()))
        asked = re.findall(r"([a-t])([-+*])(\d)", chain.question)
        assert [(label, operator, str(b)) for label, _, operator, b, _ in written] == asked
        assert [a for _, a, _, _, _ in written] == values[:-1] and [c for *_, c in written] == values[1:]
        assert boxed == values[-1]


def test_steps_are_bijective_so_that_a_slip_persists() -> None:
    for operator, operands in OPERANDS.items():
        for operand in operands:
            assert sorted(evaluate(f"{a}a{operator}{operand}>")[-1] for a in range(10)) == list(range(10))


def test_random_chains_are_balanced() -> None:
    """Operators, and operands of one operator, equally often: within five standard deviations."""
    steps = [step for chain in chains(300, 20) for step in chain.steps]
    operators = Counter(operator for operator, _ in steps)
    assert operators.keys() == OPERANDS.keys()
    for operator, operands in OPERANDS.items():
        assert abs(operators[operator] - len(steps) / 3) < 5 * (len(steps) * 2 / 9) ** 0.5
        counts = Counter(b for o, b in steps if o == operator)
        share = 1 / len(operands)
        assert counts.keys() == set(operands)
        limit = 5 * (operators[operator] * share * (1 - share)) ** 0.5
        assert all(abs(count - operators[operator] * share) < limit for count in counts.values())


# Sets -----------------------------------------------------------------------------------------------------------------


def test_problem_sets() -> None:
    """Sizes, sources, lengths and answers; nothing is in two sets, or twice in one."""
    sets = make_problems(TASK, "base")
    assert {name: len(found) for name, found in sets.items()} == {"short": 30, "long": 10, "train": 200}
    for name, found in sets.items():
        for p in found:
            values = evaluate(p.question)
            assert p.source == name and p.difficulty == len(values) - 1 and p.answer == str(values[-1])
    everything = [p for found in sets.values() for p in found]
    assert len({p.id for p in everything}) == len({p.question for p in everything}) == len(everything)
    assert {p.difficulty for p in sets["short"]} == {1} and {p.difficulty for p in sets["long"]} == {20}


def test_training_lengths_are_equally_frequent() -> None:
    """In any window of the order in which they were made, not only over all."""
    lengths = [p.difficulty for p in make_problems(TASK, "base")["train"]]
    for count in (3, 20, 200):
        counts = Counter(lengths[:count])
        assert counts.keys() == {3, 5, 8} and max(counts.values()) - min(counts.values()) <= 1


def test_problems_depend_on_the_setting_and_on_nothing_else() -> None:
    one = make_problems(TASK, "base")
    assert make_problems(TASK, "base") == one
    other = make_problems(TASK, "moe")
    assert all({p.question for p in one[name]} != {p.question for p in other[name]} for name in one)
    more = make_problems(TASK.model_copy(update={"problems": 300, "weak": 0.5}), "base")
    assert more["short"] == one["short"] and more["long"] == one["long"] and more["train"][:200] == one["train"]


def test_ids_are_hashes_of_question_and_answer() -> None:
    """Computed here from the text alone; the source and the difficulty are no part of it."""
    p = problem("3a-8>", "5", "train", 1)
    assert p.id == hashlib.sha256(b'["3a-8>", "5"]').hexdigest()[:12]
    assert problem("3a-8>", "5", "other", 7).id == p.id
    assert len({p.id, problem("3a-8>", "6", "train", 1).id, problem("3a-7>", "5", "train", 1).id}) == 3


def test_too_few_distinct_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that names the set, instead of duplicates or a loop without end."""
    monkeypatch.setattr(module, "random_chain", lambda steps, rng: Chain(int(rng.integers(2)), (("+", 1),) * steps))
    task = ChainTask(family="chain", sizes=(1,), problems=2, weak=0.0, benchmarks=(held_out("held", 1, 1),))
    says = r"^task: train: there are only 1 distinct problems of sizes 1, 2 are asked for$"
    with pytest.raises(ValueError, match=says):
        make_problems(task, "base")


# The noisy table ------------------------------------------------------------------------------------------------------


def table_of(weak: float, setting_name: str) -> NoisyTable[module.Step]:
    return TASK.model_copy(update={"weak": weak}).table(setting_name)


def test_noisy_table() -> None:
    """All 230 entries; a share `weak` of them weak; what is shown wrongly is wrong, and spread over the other digits."""
    table = table_of(0.25, "base")
    entries = {(operator, a, b) for operator, operands in OPERANDS.items() for a in range(10) for b in operands}
    assert len(entries) == 230 and table.right.keys() == table.wrong.keys() == entries
    weak = [r for r in table.right.values() if r != 0.99]
    assert abs(len(weak) - 0.25 * 230) < 4 * (230 * 0.25 * 0.75) ** 0.5
    assert all(0.2 <= r < 0.7 for r in weak) and 0.4 < np.mean(weak) < 0.5
    truth = {(o, a, b): evaluate(f"{a}a{o}{b}>")[-1] for o, a, b in entries}
    assert all(0 <= table.wrong[e] <= 9 and table.wrong[e] != truth[e] for e in entries)
    assert {(table.wrong[e] - truth[e]) % 10 for e in entries} == set(range(1, 10))


def test_noisy_table_depends_on_setting_and_share() -> None:
    table = table_of(0.25, "base")
    assert table_of(0.25, "base") == table != table_of(0.25, "moe")
    assert set(table_of(0.0, "base").right.values()) == {0.99}
    assert all(r < 0.7 for r in table_of(1.0, "base").right.values())


def test_slips_are_carried_on() -> None:
    """With every entry always wrong, each step starts from the wrong result before it."""
    table = table_of(0.25, "base")
    wrong = NoisyTable(apply, dict.fromkeys(table.right, 0.0), table.wrong)
    for chain in chains(20, 6):
        a, expected = chain.start, []
        for operator, b in chain.steps:
            a = table.wrong[operator, a, b]
            expected.append(a)
        assert chain.results(partial(wrong.shown, rng=np.random.default_rng(0))) == expected


def test_demonstrations_follow_the_table() -> None:
    """Each entry is shown right at its rate (five standard deviations), else as its one wrong digit, and carried on."""
    table = TASK.table("base")
    right: Counter[tuple[str, int, int]] = Counter()
    shown: Counter[tuple[str, int, int]] = Counter()
    lengths: Counter[int] = Counter()
    for question, response in itertools.islice(TASK.demonstrations("base"), 3000):
        steps, boxed = claims(response)
        lengths[len(steps)] += 1
        asked = re.findall(r"([a-t])([-+*])(\d)", question)
        assert [(label, operator, str(b)) for label, _, operator, b, _ in steps] == asked
        digit = int(question[0])
        for _, a, operator, b, result in steps:
            assert a == digit
            truth = evaluate(f"{a}a{operator}{b}>")[-1]
            assert result in (truth, table.wrong[operator, a, b])
            shown[operator, a, b] += 1
            right[operator, a, b] += result == truth
            digit = result
        assert boxed == digit
    assert len(shown) == 230 and min(shown.values()) > 20
    for entry, count in shown.items():
        rate = table.right[entry]
        assert abs(right[entry] / count - rate) < 5 * (rate * (1 - rate) / count) ** 0.5 + 0.5 / count, entry
    assert lengths.keys() == {3, 5, 8} and all(abs(n - 1000) < 5 * (3000 * 2 / 9) ** 0.5 for n in lengths.values())


def test_demonstrations_are_reproducible() -> None:
    first, again, other = (list(itertools.islice(TASK.demonstrations(s), 5)) for s in ("base", "base", "moe"))
    assert first == again != other


# Files ----------------------------------------------------------------------------------------------------------------

ROWS = make_problems(TASK, "base")["short"][:3]


def test_files_hold_one_json_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "train.jsonl"
    write_problems(ROWS, path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [asdict(p) for p in ROWS]
    assert read_problems(path) == read_problems(str(path)) == ROWS
    assert [p.name for p in path.parent.iterdir()] == ["train.jsonl"]


def test_text_of_any_kind_survives_a_file(tmp_path: Path) -> None:
    """Line separators, quotes and lone surrogates stay inside their line."""
    rows = tuple(problem(text, "1", "x", 1) for text in ("a\nb", "\u2028\u2029\x85", '"\\', "\ud800", "日本"))
    write_problems(rows, tmp_path / "p.jsonl")
    assert read_problems(tmp_path / "p.jsonl") == rows


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    path = tmp_path / "train.jsonl"
    write_problems(ROWS, path)
    before = path.read_bytes()

    def refuse(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, broken, refuse)
    with pytest.raises(ValueError, match=r"train.jsonl: cannot be written .disk full."):
        write_problems(ROWS[:2], path)
    assert path.read_bytes() == before and read_problems(path) == ROWS


GOOD = asdict(ROWS[1])
BAD_ROWS: dict[str, tuple[str, str]] = {
    "truncated": (json.dumps(GOOD)[:-5], "not a JSON object"),
    "blank": ("", "not a JSON object"),
    "two objects": (json.dumps(GOOD) * 2, "not a JSON object"),
    "deep": ("[" * 100_000, "not a JSON object"),
    "list": ("[1]", "exactly the fields"),
    "number": ("3", "exactly the fields"),
    "missing field": (json.dumps({k: v for k, v in GOOD.items() if k != "source"}), "exactly the fields"),
    "extra field": (json.dumps(GOOD | {"hint": "x"}), "exactly the fields"),
    "answer is a number": (json.dumps(GOOD | {"answer": 5}), "answer: expected str, got 5"),
    "difficulty is text": (json.dumps(GOOD | {"difficulty": "1"}), "difficulty: expected int"),
    "difficulty is true": (json.dumps(GOOD | {"difficulty": True}), "difficulty: expected int"),
    "null": (json.dumps(GOOD | {"source": None}), "source: expected str, got None"),
    "edited answer": (json.dumps(GOOD | {"answer": str((int(ROWS[1].answer) + 1) % 10)}), "the row was edited"),
    "edited question": (json.dumps(GOOD | {"question": "9" + ROWS[1].question}), "the row was edited"),
    "edited id": (json.dumps(GOOD | {"id": "0" * 12}), "the row was edited"),
    "long": (json.dumps(GOOD | {"id": "x" * 10_000}), "the row was edited"),
}


@pytest.mark.parametrize(("line", "says"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_malformed_rows_name_file_and_line(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "train.jsonl"
    good = json.dumps(asdict(ROWS[0]))
    path.write_text(f"{good}\n{line}\n{json.dumps(asdict(ROWS[2]))}\n")
    with pytest.raises(ValueError) as caught:
        read_problems(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ") and says in message
    assert len(message.splitlines()) == 1 and len(message) < len(str(path)) + 200


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "holds no problem"), (b"\xff\xfe\x00", "cannot be read as UTF-8"), (None, "cannot be read")],
    ids=["empty", "binary", "missing"],
)
def test_unreadable_files(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "train.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_problems(path)
    assert str(caught.value).startswith(f"{path}: ") and says in str(caught.value)
    assert "python -m cppo data" in str(caught.value) and len(str(caught.value).splitlines()) == 1
