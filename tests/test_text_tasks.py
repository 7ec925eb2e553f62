"""Problems in words, published or of one's own: how they look, what is dropped and counted, and what is refused in one line."""

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from mathematics import (
    AIME24,
    INSTRUCTION,
    QUESTIONS,
    SETS,
    TRAIN,
    aime,
    dapo,
    make_tokenizer,
    math500,
    write_data,
    write_rows,
)

from cppo.tasks.file import FileTask
from cppo.tasks.math import SOURCES, HeldOutSet, MathTask, TrainingSet
from cppo.tasks.types import Problem, Report

COMMIT = "0123456789" * 4


def task(folder: Path | None, rows: int, **benchmarks: int) -> MathTask:
    return MathTask(
        family="math",
        train=TrainingSet(name="dapo_math_17k", rows=rows, revision=COMMIT),
        benchmarks=tuple(HeldOutSet(name=k, problems=v, revision=COMMIT) for k, v in benchmarks.items()),  # type: ignore[arg-type]
        data_dir=None if folder is None else str(folder),
        prompt="chat",
        instruction=INSTRUCTION,
        max_prompt_tokens=100,
    )


def load_problems(task: MathTask) -> tuple[dict[str, tuple[Problem, ...]], Report]:
    return task.load("any")


def test_repeats_are_dropped_and_the_wrapping_is_removed(tmp_path: Path) -> None:
    """Each of the twelve problems stands three times in the file; questions come out bare, answers as they are."""
    sets, report = load_problems(task(write_data(tmp_path), 36, aime24=2, aime25=1, math500=2))
    assert [p.question for p in sets["train"]] == QUESTIONS
    assert [p.answer for p in sets["train"]] == [row["reward_model"]["ground_truth"] for row in TRAIN]
    assert {p.source for p in sets["train"]} == {"dapo_math_17k"}
    expected = {"rows": 36, "empty": 0, "repeated": 24, "contradictory": 0, "unjudgeable": 0, "problems": 12}
    assert expected.items() <= report["train"].items()
    assert [(p.answer, p.difficulty) for p in sets["math500"]] == [("\\frac{6}{2}", 3), ("\\text{Evelyn}", 3)]
    assert [p.question for p in sets["aime24"]] == [row["problem"] for row in AIME24]
    assert len(report["aime24"]["sha256"]) == 64 and report["aime24"]["local"]


def test_defects_of_the_training_set_are_dropped_and_counted(tmp_path: Path) -> None:
    """One empty question, one empty answer, one contradiction, one gold that no verifier reads, two benchmark problems."""
    rows = [
        *TRAIN,
        dapo(" ", "3"),
        dapo("Unanswered?", ""),
        dapo(QUESTIONS[0], "17"),
        dapo("Which fraction?", "\\frac{1}{"),
        dapo(AIME24[0]["problem"], "3"),
        dapo("BOB has  $5$ hats, \\,how many?", "5"),
        dapo("Bob has $5 - 1$ hats. How many?", "4"),
    ]
    folder = write_data(tmp_path, dapo_math_17k=rows)
    sets, report = load_problems(task(folder, len(rows), aime24=2, aime25=1))
    questions = [p.question for p in sets["train"]]
    assert questions == [*QUESTIONS[1:], "Bob has $5 - 1$ hats. How many?"]
    counts = {k: report["train"][k] for k in ("empty", "repeated", "contradictory", "unjudgeable", "problems")}
    assert counts == {"empty": 2, "repeated": 1, "contradictory": 1, "unjudgeable": 1, "problems": 12}
    assert report["train"]["overlap"] == {
        "aime24": {"exact": 1, "normalised": 2},
        "aime25": {"exact": 0, "normalised": 0},
    }


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_every_kind_of_file_gives_the_same_problems(kind: str, tmp_path: Path) -> None:
    """CSV turns answers into integers; GSM8K's answer is what follows ####, without thousands separators."""
    write_rows(tmp_path, "dapo_math_17k", TRAIN)
    write_rows(tmp_path, "aime26", [aime("Count, please.", "277"), aime("Again:\n$1 < 2$?", "62")], kind)
    write_rows(
        tmp_path, "gsm8k", [{"question": "How much?", "answer": "500 + 700 = <<500+700=1200>>1,200\n#### 1,200"}], kind
    )
    sets, _ = load_problems(task(tmp_path, 12, aime26=2, gsm8k=1))
    assert [(p.question, p.answer) for p in sets["aime26"]] == [("Count, please.", "277"), ("Again:\n$1 < 2$?", "62")]
    assert [(p.question, p.answer) for p in sets["gsm8k"]] == [("How much?", "1200")]


def without(rows: list[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != column} for row in rows]


BROKEN: dict[str, tuple[dict[str, list[dict[str, Any]]], str]] = {
    "a missing column": (
        {"aime24": without(AIME24, "answer")},
        r"aime24: line 1 of data.jsonl: column answer: field required; the columns must be those of "
        r"data/train-00000-of-00001.parquet in HuggingFaceH4/aime_2024; this file has id, problem, solution, year",
    ),
    "a missing inner column": (
        {"dapo_math_17k": [{**row, "reward_model": {"style": "rule"}} for row in TRAIN]},
        r"dapo_math_17k: row 1 of data.parquet: column reward_model.ground_truth: field required; .*DAPO-Math-17k",
    ),
    "a wrong type": (
        {"math500": [{**row, "level": "Level 3"} for row in SETS["math500"]]},
        r"math500: line 1 of data.jsonl: column level: input should be a valid integer",
    ),
    "too few problems": (
        {"aime24": AIME24[:1]},
        r"aime24: 1 problems, the suite says 2: another file or another revision",
    ),
    "too few rows": ({"dapo_math_17k": TRAIN}, r"dapo_math_17k: 12 rows, the suite says 36: the file is cut"),
    "an empty question": ({"aime24": [*AIME24[:1], aime("", "3")]}, r"aime24: row 2: the question is empty"),
    "an empty answer": ({"aime24": [*AIME24[:1], aime("What?", " ")]}, r"aime24: row 2: the answer is empty"),
    "a repeat": ({"aime24": [*AIME24[:1], AIME24[0]]}, r"aime24: row 2: the question stands in an earlier row too"),
    "no training problem": (
        {"dapo_math_17k": [dapo(AIME24[0]["problem"], "3")] * 36},
        r"dapo_math_17k: no training problem is left",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_as_published_is_one_line(case: str, tmp_path: Path) -> None:
    changes, says = BROKEN[case]
    with pytest.raises(ValueError, match=says) as caught:
        load_problems(task(write_data(tmp_path, **changes), 36, aime24=2, aime25=1, math500=2))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    cases = {
        "parquet": (b"PAR1 no", r"cannot be read as parquet \(.*\); copy it again"),
        "jsonl": (b'\n{"problem": ', r"line 2: not a JSON object; copy the file again"),
        "csv": (b"problem,answer\nx\n", r"line 2: not as many values as the header has columns; copy the file again"),
    }
    for kind, (content, says) in cases.items():
        for old in (folder / "aime24").iterdir():
            old.unlink()
        (folder / "aime24" / f"data.{kind}").write_bytes(content)
        with pytest.raises(ValueError, match=rf"/aime24/data\.{kind}: {says}$") as caught:
            load_problems(task(folder, 36, aime24=2))
        assert "\n" not in str(caught.value)
    (folder / "aime24" / "more.jsonl").write_text("problem,answer\n")
    with pytest.raises(ValueError, match=r"aime24: 2 files of aime24, expected one \.parquet, \.jsonl or \.csv"):
        load_problems(task(folder, 36, aime24=2))
    with pytest.raises(
        ValueError, match=r"aime26: 0 files of aime26, expected one .*: aime2026.jsonl of math-ai/aime26"
    ):
        load_problems(task(folder, 36, aime26=30))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """No name resolves."""

    def refuse(*args: object, **kwargs: object) -> object:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
def test_a_missing_hub_is_one_line_and_quick() -> None:
    """It names the data set, the commit and how to point at a local copy, without half a minute of retries."""
    start = time.monotonic()
    says = (
        r"HuggingFaceH4/aime_2024: this dataset at commit 0123456789 is not in the local cache and could not be fetched "
        r"from the hub \(.*\); with a copy at hand, put data/train-00000-of-00001.parquet into <folder>/aime24/ and set "
        r"task.data_dir"
    )
    with pytest.raises(ValueError, match=says) as caught:
        load_problems(task(None, 36, aime24=2))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 15  # retries alone would take 23 s


def test_a_benchmark_may_be_cut_to_its_first_problems(tmp_path: Path) -> None:
    """The file must still be whole; the report counts all of it."""
    folder = write_data(tmp_path, aime24=[*AIME24, aime("Dave has $9$ hats. How many?", "9")])
    cut = task(folder, 36, aime24=2)
    with pytest.raises(ValueError, match="aime24: 3 problems, the suite says 2"):
        load_problems(cut)
    benchmark = cut.benchmarks[0].model_copy(update={"rows": 3})
    sets, report = load_problems(cut.model_copy(update={"benchmarks": (benchmark,)}))
    assert [p.question for p in sets["aime24"]] == [row["problem"] for row in AIME24]
    assert report["aime24"]["problems"] == 3
    with pytest.raises(ValueError, match="rows 2 is below problems 3"):
        HeldOutSet(name="aime24", problems=3, rows=2, revision=COMMIT)


def test_every_set_that_a_suite_may_name_has_a_source() -> None:
    named = HeldOutSet.model_fields["name"].annotation.__args__  # type: ignore[union-attr]
    assert set(named) == set(SOURCES)
    assert math500("x", "1").keys() >= SOURCES["math500"].row.model_fields.keys()


# Family file ----------------------------------------------------------------------------------------------------------


OWN = [{"prompt": f"Take {n} from {n + 3}.", "solution": 3, "note": "x"} for n in range(6)]
HELD = [{"prompt": f"Double {n}, please.", "solution": str(2 * n)} for n in range(4)]


def own(folder: Path, train: str = "train.jsonl", held: str = "held.parquet", **changes: Any) -> FileTask:
    """A task on two files of a folder, with columns of unusual names."""
    return FileTask.model_validate(
        {
            "family": "file",
            "train": {"path": str(folder / train)},
            "benchmarks": [{"name": "mine", "path": str(folder / held), "problems": 4}],
            "columns": {"question": "prompt", "answer": "solution"},
            "prompt": "base",
            "instruction": INSTRUCTION,
            "max_prompt_tokens": 100,
        }
        | changes,
        strict=False,
    )


def write_own(folder: Path, kind: str, train: list[dict[str, Any]], held: list[dict[str, Any]]) -> None:
    for name, rows in (("train", train), ("held", held)):
        write_rows(folder, name, rows, kind).rename(folder / f"{name}.{kind}")


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_files_of_ones_own(kind: str, tmp_path: Path) -> None:
    """Named columns, numbers or text as answers, other columns ignored; whole numbers come out as text."""
    write_own(tmp_path, kind, OWN, HELD)
    sets, report = own(tmp_path, f"train.{kind}", f"held.{kind}").load("any")
    assert [(p.question, p.answer, p.source, p.difficulty) for p in sets["train"]] == [
        (row["prompt"], "3", "train", 0) for row in OWN
    ]
    assert [(p.question, p.answer, p.source) for p in sets["mine"]] == [
        (row["prompt"], row["solution"], "mine") for row in HELD
    ]
    assert report["train"]["file"] == str(tmp_path / f"train.{kind}") and len(report["mine"]["sha256"]) == 64


def test_what_is_dropped_of_ones_own_training_file(tmp_path: Path) -> None:
    """Empty, repeated, contradictory, without a readable answer, or held out: each is counted; blank lines are no rows."""
    rows: list[dict[str, Any]] = [
        *OWN,
        OWN[0],
        {"prompt": OWN[1]["prompt"], "solution": 9},
        {"prompt": " ", "solution": 1},
        {"prompt": "No answer?", "solution": None},
        {"prompt": "Which fraction?", "solution": "\\frac{1}{"},
        {"prompt": "double 2  please", "solution": 4},
    ]
    (tmp_path / "train.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HELD))
    sets, report = own(tmp_path, held="held.jsonl").load("any")
    assert [p.question for p in sets["train"]] == [row["prompt"] for row in (OWN[0], *OWN[2:])]
    counts = {key: report["train"][key] for key in ("rows", "empty", "repeated", "contradictory", "unjudgeable")}
    assert counts == {"rows": 12, "empty": 2, "repeated": 2, "contradictory": 1, "unjudgeable": 1}
    assert report["train"]["overlap"] == {"mine": {"exact": 0, "normalised": 1}}


def test_a_benchmark_of_ones_own_is_its_first_problems(tmp_path: Path) -> None:
    write_own(tmp_path, "jsonl", OWN, HELD)
    benchmarks = [{"name": "mine", "path": str(tmp_path / "held.jsonl"), "problems": 2}]
    sets, report = own(tmp_path, benchmarks=benchmarks).load("any")
    assert [p.question for p in sets["mine"]] == [row["prompt"] for row in HELD[:2]]
    assert report["mine"]["problems"] == 4


WRONG: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]], str]] = {
    "a missing column": (
        [{"prompt": "Why?", "text": "3"}],
        HELD,
        r"train.jsonl: line 1: there is no column solution; the file has prompt, text: name the right one as "
        r"task.columns.answer$",
    ),
    "no question column": (
        OWN,
        [{"question": "Why?", "solution": "3"}],
        r"held.jsonl: line 1: there is no column prompt; the file has question, solution: .* task.columns.question$",
    ),
    "a fraction": (
        [*OWN, {"prompt": "Half?", "solution": 0.5}],
        HELD,
        r"train.jsonl: line 7: column solution: 0.5 is neither text nor a whole number; write it as text$",
    ),
    "a truth value": (OWN, [{"prompt": "Half?", "solution": True}], r"held.jsonl: line 1: column solution: True is"),
    "too few": (OWN, HELD[:3], r"held.jsonl: holds 3 problems, benchmark mine of the suite asks for 4$"),
    "no problem": (OWN, [], r"held.jsonl: holds 0 problems, benchmark mine of the suite asks for 4$"),
    "no training problem": ([], HELD, r"train.jsonl: no training problem is left; dropped: "),
    "an empty answer": (OWN, [*HELD[:2], {"prompt": "x", "solution": ""}], r"held.jsonl: row 3: the answer is empty"),
    "a repeat": (OWN, [*HELD, HELD[0]], r"held.jsonl: row 5: the question stands in an earlier row too"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_ones_own_files_is_one_line(case: str, tmp_path: Path) -> None:
    """File, row, column and remedy."""
    train, held, says = WRONG[case]
    for name, rows in (("train", train), ("held", held)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=says) as caught:
        own(tmp_path, held="held.jsonl").load("any")
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def test_missing_and_unknown_files_are_one_line(tmp_path: Path) -> None:
    write_own(tmp_path, "jsonl", OWN, HELD)
    (tmp_path / "train.txt").write_text("x")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "größe"}'.encode("latin-1"))
    for train, says in (
        (
            "nope.jsonl",
            r"nope.jsonl: there is no such file; task paths are relative to the folder where the command runs",
        ),
        ("train.txt", r"train.txt: a file of problems ends in \.parquet, \.jsonl, \.csv$"),
        ("latin.jsonl", r"latin.jsonl: cannot be read as jsonl \(.*utf-8.*\); copy it again$"),
    ):
        with pytest.raises(ValueError, match=says) as caught:
            own(tmp_path, train, "held.jsonl").load("any")
        assert "\n" not in str(caught.value)


def test_prompts_of_ones_own_problems_follow_the_style(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    text = {
        style: tokenizer.decode(own(tmp_path, prompt=style).prompt_ids(tokenizer, "Why?")) for style in ("base", "chat")
    }
    asked = f"Why?\n{INSTRUCTION}"
    assert text == {"base": asked, "chat": f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"}
