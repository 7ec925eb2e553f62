r"""Published problem sets, read with the `datasets` library and checked, in the one schema of `cppo.tasks.types`.

Every name stands for one file of one repository of the Hugging Face hub at the commit that the suite names, or for the same
file in a local folder, <data_dir>/<name>/*.parquet (.jsonl, .csv). A benchmark must be whole: a wrong number of rows, an
empty or repeated problem is an error. Of the training set only the number of rows must be right; empty, repeated and
contradictory problems are dropped, and so are those that a benchmark holds too; everything dropped is counted in a report.

The file of DAPO-Math-17k repeats about 17 thousand problems a hundred times and wraps each question in a request for a last
line "Answer: ...". The wrapping is removed: what is asked of the model is the suite's `instruction`.
"""

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from pydantic import BaseModel, ConfigDict, ValidationError

from cppo.rewards import Judge
from cppo.suite.config import Dataset, MathTask, TrainingSet
from cppo.system.files import sha256
from cppo.system.hub import fetch
from cppo.tasks.types import Problem, problem

DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
    "(without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'
KINDS = {".parquet": "parquet", ".jsonl": "json", ".csv": "csv"}
"""Endings of files that may hold a set, and the reader of each."""


class Row(BaseModel):
    """A row as published: the columns that are needed, with their types; others are ignored."""

    model_config = ConfigDict(frozen=True, strict=True)

    @abstractmethod
    def read(self) -> tuple[str, str, int]:
        """(question, answer, difficulty)."""


class Aime(Row):
    """Answers are integers from 0 to 999."""

    problem: str
    answer: str | int

    def read(self) -> tuple[str, str, int]:
        return self.problem, str(self.answer), 0


class Math500(Row):
    """Answers are LaTeX; the difficulty is the level from 1 to 5."""

    problem: str
    answer: str | int
    level: int

    def read(self) -> tuple[str, str, int]:
        return self.problem, str(self.answer), self.level


class Gsm8k(Row):
    """The answer is what follows #### in the worked solution."""

    question: str
    answer: str

    def read(self) -> tuple[str, str, int]:
        return self.question, self.answer.rpartition("####")[2].replace(",", ""), 0


class Message(BaseModel):
    """A turn of a chat."""

    content: str


class Truth(BaseModel):
    """What verl's rewards compare with."""

    ground_truth: str | int


class Dapo(Row):
    """A chat of one message; the answer is an integer."""

    prompt: list[Message]
    reward_model: Truth

    def read(self) -> tuple[str, str, int]:
        text = self.prompt[-1].content.strip() if self.prompt else ""
        return text.removeprefix(DAPO_BEFORE).removesuffix(DAPO_AFTER), str(self.reward_model.ground_truth), 0


@dataclass(frozen=True)
class Source:
    """Where a set is published."""

    repo: str
    file: str
    row: type[Row]


SOURCES = {
    "dapo_math_17k": Source("BytedTsinghua-SIA/DAPO-Math-17k", "data/dapo-math-17k.parquet", Dapo),
    "aime24": Source("HuggingFaceH4/aime_2024", "data/train-00000-of-00001.parquet", Aime),
    "aime25": Source("math-ai/aime25", "test.jsonl", Aime),
    "aime26": Source("math-ai/aime26", "aime2026.jsonl", Aime),
    "math500": Source("HuggingFaceH4/MATH-500", "test.jsonl", Math500),
    "gsm8k": Source("openai/gsm8k", "main/test-00000-of-00001.parquet", Gsm8k),
    "gsm8k_train": Source("openai/gsm8k", "main/train-00000-of-00001.parquet", Gsm8k),
}

Report = dict[str, Any]


def load_problems(task: MathTask) -> tuple[dict[str, tuple[Problem, ...]], Report]:
    """The benchmarks by name and the training set under "train", and a report on what was found and dropped.

    Raises ValueError, one line naming data set, row and column, for anything that is not as published.
    """
    sets: dict[str, tuple[Problem, ...]] = {}
    report: Report = {}
    for wanted in task.benchmarks:
        sets[wanted.name], report[wanted.name] = _held_out(wanted.name, *_rows(wanted, task.data_dir))
        if len(sets[wanted.name]) != wanted.problems:
            raise ValueError(
                f"{wanted.name}: {len(sets[wanted.name])} problems, the suite says {wanted.problems}: "
                "another file or another revision"
            )
    kept, report["train"] = _training(task.train, *_rows(task.train, task.data_dir))
    exact = {name: {_spaced(p.question) for p in held} for name, held in sets.items()}
    plain = {name: {_plain(p.question) for p in held} for name, held in sets.items()}
    report["train"]["overlap"] = {
        name: {
            "exact": sum(_spaced(p.question) in exact[name] for p in kept),
            "normalised": sum(_plain(p.question) in plain[name] for p in kept),
        }
        for name in sets
    }
    known = set().union(*plain.values())
    sets["train"] = tuple(p for p in kept if _plain(p.question) not in known)
    report["train"]["problems"] = len(sets["train"])
    if not sets["train"]:
        raise ValueError(f"{task.train.name}: no training problem is left; dropped: {report['train']}")
    return sets, report


def _held_out(name: str, rows: Iterator[tuple[str, str, int]], report: Report) -> tuple[tuple[Problem, ...], Report]:
    found: dict[str, Problem] = {}
    for number, (question, answer, difficulty) in enumerate(rows, start=1):
        where = f"{name}: row {number}"
        if not (question and answer):
            raise ValueError(f"{where}: the {'answer' if question else 'question'} is empty; a benchmark must be whole")
        if _spaced(question) in found:
            raise ValueError(f"{where}: the question stands in an earlier row too; a benchmark must not repeat one")
        found[_spaced(question)] = problem(question, answer, name, difficulty)
    problems = tuple(found.values())
    return problems, {**report, "problems": len(problems), "unjudgeable": len(problems) - len(_judgeable(problems))}


def _training(
    wanted: TrainingSet, rows: Iterator[tuple[str, str, int]], report: Report
) -> tuple[tuple[Problem, ...], Report]:
    counts: Counter[str] = Counter(dict.fromkeys(("rows", "empty", "repeated", "contradictory"), 0))
    found: dict[str, Problem] = {}
    contradictory: set[str] = set()
    for question, answer, difficulty in rows:
        counts["rows"] += 1
        key = _spaced(question)
        if not (question and answer):
            counts["empty"] += 1
        elif key not in found:
            found[key] = problem(question, answer, wanted.name, difficulty)
        else:
            counts["repeated"] += 1
            if found[key].answer != answer:
                contradictory.add(key)
    if counts["rows"] != wanted.rows:
        raise ValueError(
            f"{wanted.name}: {counts['rows']} rows, the suite says {wanted.rows}: the file is cut or another revision"
        )
    counts["contradictory"] = len(contradictory)
    once = tuple(p for key, p in found.items() if key not in contradictory)
    kept = _judgeable(once)
    return kept, {**report, **counts, "unjudgeable": len(once) - len(kept)}


def _judgeable(problems: tuple[Problem, ...]) -> tuple[Problem, ...]:
    """Those whose own answer, put in a box, is judged right."""
    with Judge() as judge:
        return tuple(p for p in problems if judge.verdict(f"\\boxed{{{p.answer}}}", p.answer) == 1.0)


def _rows(wanted: Dataset, data_dir: str | None) -> tuple[Iterator[tuple[str, str, int]], Report]:
    """(question, answer, difficulty) of each row, blanks around them removed, and where they come from."""
    source = SOURCES[wanted.name]
    path = _file(wanted, source, data_dir)
    digest = sha256(path)
    origin = {"repository": source.repo, "revision": wanted.revision} if data_dir is None else {"local": True}

    def rows() -> Iterator[tuple[str, str, int]]:
        for number, raw in enumerate(_read(wanted.name, path), start=1):
            try:
                question, answer, difficulty = source.row.model_validate(raw).read()
            except ValidationError as error:
                first = error.errors()[0]
                column = ".".join(str(part) for part in first["loc"] if part not in ("str", "int"))
                raise ValueError(
                    f"{wanted.name}: row {number} of {path.name}: column {column}: {first['msg'].lower()}; the columns must be "
                    f"those of {source.file} in {source.repo}; this file has {', '.join(raw)}"
                ) from None
            yield question.strip(), answer.strip(), difficulty

    return rows(), {**origin, "file": path.name, "sha256": digest}


def _file(wanted: Dataset, source: Source, data_dir: str | None) -> Path:
    if data_dir is None:
        assert wanted.revision is not None  # cppo.suite.config checks it
        remedy = f"with a copy at hand, put {source.file} into <folder>/{wanted.name}/ and set task.data_dir: <folder>"
        folder = fetch(source.repo, "dataset", wanted.revision, [source.file], remedy)
        return folder / source.file
    folder = Path(data_dir) / wanted.name
    found = sorted(path for path in folder.glob("*") if path.suffix in KINDS)
    if len(found) != 1:
        raise ValueError(
            f"{folder}: {len(found)} files of {wanted.name}, expected one .parquet, .jsonl or .csv: "
            f"{source.file} of {source.repo}"
        )
    return found[0]


def _read(name: str, path: Path) -> Iterator[dict[str, Any]]:
    """The file's rows, streamed: nothing is copied into the library's cache."""
    try:
        yield from datasets.load_dataset(KINDS[path.suffix], data_files=str(path), split="train", streaming=True)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name}: {path} cannot be read as {KINDS[path.suffix]} ({reason}); copy it again") from None


def _spaced(text: str) -> str:
    """The text with single blanks."""
    return " ".join(text.split())


def _plain(text: str) -> str:
    """Letters, digits and operators only, in lower case: equal for two ways to set one problem in LaTeX."""
    return re.sub(r"[^\w+\-*/^=<>!|()\[\]]|_", "", text).casefold()
