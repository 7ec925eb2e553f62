"""Rows of problem files, streamed and checked: Parquet, JSON lines or CSV; and what makes a set of problems whole.

A benchmark must be whole: an empty or repeated problem is an error. Of training problems, those that are empty, repeated,
contradictory or part of a benchmark are dropped and counted.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from cppo.tasks.types import Problem, Report, problem

ENDINGS = (".parquet", ".jsonl", ".csv")
"""Endings of files that may hold problems."""
ENCODING = "utf-8-sig"
"""UTF-8, with or without the byte order mark that spreadsheets write."""
CSV_FIELD_CHARACTERS = 2**24
"""Longest field of a CSV file that is read."""

Rows = Iterable[tuple[str, str, int]]
"""(question, answer, difficulty) of each row."""


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands in the file, column -> value) of each row.

    Raises ValueError, one line naming the file and the row, for a file that cannot be read.
    """
    if path.suffix not in ENDINGS:
        raise ValueError(f"{path}: a file of problems ends in {', '.join(ENDINGS)}")
    reader = {".parquet": _parquet, ".jsonl": _json_lines, ".csv": _csv}[path.suffix]
    try:
        yield from reader(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}); copy it again") from None
    except (pyarrow.ArrowException, UnicodeDecodeError, csv.Error) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path}: cannot be read as {path.suffix.removeprefix('.')} ({reason}); copy it again"
        ) from None


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding=ENCODING) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"{path}: {where}: not a JSON object; copy the file again")
            yield where, row


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(CSV_FIELD_CHARACTERS)
    with path.open(encoding=ENCODING, newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        for row in reader:
            where = f"line {reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"{path}: {where}: not as many values as the header has columns; copy the file again")
            yield where, row


def held_out(
    name: str, rows: Rows, judgeable: Callable[[Problem], bool], place: str
) -> tuple[tuple[Problem, ...], Report]:
    """A benchmark's problems and its part of the report. Raises ValueError for an empty or repeated problem.

    judgeable: whether a problem's own gold answer is judged right; others are counted, not dropped. place: what errors name.
    """
    found: dict[str, Problem] = {}
    for number, (question, answer, difficulty) in enumerate(rows, start=1):
        where = f"{place}: row {number}"
        if not (question and answer):
            raise ValueError(f"{where}: the {'answer' if question else 'question'} is empty; a benchmark must be whole")
        if _spaced(question) in found:
            raise ValueError(f"{where}: the question stands in an earlier row too; a benchmark must not repeat one")
        found[_spaced(question)] = problem(question, answer, name, difficulty)
    problems = tuple(found.values())
    return problems, {"problems": len(problems), "unjudgeable": sum(not judgeable(p) for p in problems)}


def training(name: str, rows: Rows, judgeable: Callable[[Problem], bool]) -> tuple[tuple[Problem, ...], Report]:
    """The training problems that are whole, unique and judgeable, and how many rows were not."""
    counts: Counter[str] = Counter(dict.fromkeys(("rows", "empty", "repeated", "contradictory"), 0))
    found: dict[str, Problem] = {}
    contradictory: set[str] = set()
    for question, answer, difficulty in rows:
        counts["rows"] += 1
        key = _spaced(question)
        if not (question and answer):
            counts["empty"] += 1
        elif key not in found:
            found[key] = problem(question, answer, name, difficulty)
        else:
            counts["repeated"] += 1
            if found[key].answer != answer:
                contradictory.add(key)
    counts["contradictory"] = len(contradictory)
    once = tuple(p for key, p in found.items() if key not in contradictory)
    kept = tuple(p for p in once if judgeable(p))
    return kept, {**counts, "unjudgeable": len(once) - len(kept)}


def without_overlap(
    name: str, kept: tuple[Problem, ...], benchmarks: Mapping[str, tuple[Problem, ...]]
) -> tuple[tuple[Problem, ...], Report]:
    """The training problems that no benchmark holds, and how many it does, by benchmark.

    Raises ValueError when none is left.
    """
    exact = {held: {_spaced(p.question) for p in problems} for held, problems in benchmarks.items()}
    plain = {held: {_plain(p.question) for p in problems} for held, problems in benchmarks.items()}
    overlap = {
        held: {
            "exact": sum(_spaced(p.question) in exact[held] for p in kept),
            "normalised": sum(_plain(p.question) in plain[held] for p in kept),
        }
        for held in benchmarks
    }
    known = set().union(*plain.values())
    left = tuple(p for p in kept if _plain(p.question) not in known)
    report: Report = {"overlap": overlap, "problems": len(left)}
    if not left:
        raise ValueError(f"{name}: no training problem is left; dropped: {report}")
    return left, report


def _spaced(text: str) -> str:
    """The text with single blanks."""
    return " ".join(text.split())


def _plain(text: str) -> str:
    """Letters, digits and operators only, in lower case: equal for two ways to set one problem in LaTeX."""
    return re.sub(r"[^\w+\-*/^=<>!|()\[\]]|_", "", text).casefold()
