"""Family `file`: problems in words from files of the user's own, for a published checkpoint.

    task:
      family: file
      train: {path: data/train.jsonl}
      benchmarks:
        - {name: mine, path: data/held_out.parquet, problems: 50}
      columns: {question: prompt, answer: solution}

A file is JSON lines, Parquet or CSV with a column of questions and a column of gold answers. A gold answer is what should
stand in the box. What makes a set of problems whole is told in `cppo.tasks.reading`.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from cppo.rewards import Judge
from cppo.suite.schema import Config, Count
from cppo.system.files import sha256
from cppo.tasks.reading import held_out, read_rows, training, without_overlap
from cppo.tasks.types import TRAIN, Benchmark, Problem, Report, TextTask


class Columns(Config):
    """Names of the columns that are read; a file may have others."""

    question: str = "question"
    """The column of questions."""
    answer: str = "answer"
    """The column of gold answers: text or whole numbers."""


class TrainingFile(Config):
    """A file of training problems. Problems that are empty, repeated, contradictory or held out are dropped and counted."""

    path: str
    """The file, .jsonl, .parquet or .csv; relative to the folder where the command runs."""


class HeldOutFile(Benchmark):
    """A file of held-out problems. An empty or repeated problem is an error."""

    path: str
    """The file, .jsonl, .parquet or .csv; relative to the folder where the command runs."""
    problems: Count
    """How many problems are scored: the first ones of the file, which must hold at least as many."""


class FileTask(TextTask):
    """Problems in words from files of the user's own."""

    family: Literal["file"]
    """Kind of problem."""
    train: TrainingFile
    """The training problems."""
    benchmarks: tuple[HeldOutFile, ...] = Field(min_length=1)
    """Held-out sets."""
    columns: Columns = Columns()
    """Names of the columns, the same in every file."""

    def load(self, setting_name: str) -> tuple[dict[str, tuple[Problem, ...]], Report]:
        """See `Task.load`. Raises ValueError, one line that names the file, the row and the column, for what is wrong."""
        sets: dict[str, tuple[Problem, ...]] = {}
        report: Report = {}
        with Judge() as judge:
            judgeable = partial(self.accepts_gold, judge=judge)
            for wanted in self.benchmarks:
                rows, origin = self._rows(wanted.path)
                problems, counts = held_out(wanted.name, rows, judgeable, wanted.path)
                if len(problems) < wanted.problems:
                    raise ValueError(
                        f"{wanted.path}: holds {len(problems)} problems, benchmark {wanted.name} of the suite asks for "
                        f"{wanted.problems}"
                    )
                sets[wanted.name] = problems[: wanted.problems]
                report[wanted.name] = origin | counts
            rows, origin = self._rows(self.train.path)
            kept, counts = training(TRAIN, rows, judgeable)
        sets[TRAIN], left = without_overlap(self.train.path, kept, sets)
        report[TRAIN] = origin | counts | left
        return sets, report

    def _rows(self, name: str) -> tuple[Iterator[tuple[str, str, int]], Report]:
        """(question, answer, 0) of each row, blanks around them removed, and where they come from."""
        path = Path(name)
        if not path.is_file():
            raise ValueError(
                f"{path}: there is no such file; task paths are relative to the folder where the command runs"
            )

        def rows() -> Iterator[tuple[str, str, int]]:
            for where, row in read_rows(path):
                read = [self._value(row, key, f"{path}: {where}") for key in ("question", "answer")]
                yield read[0], read[1], 0

        return rows(), {"file": name, "sha256": sha256(path)}

    def _value(self, row: dict[str, Any], key: Literal["question", "answer"], where: str) -> str:
        """The question or the answer of a row, without blanks around it; nothing at all is an empty text."""
        column = self.columns.question if key == "question" else self.columns.answer
        if column not in row:
            raise ValueError(
                f"{where}: there is no column {column}; the file has {', '.join(row)}: "
                f"name the right one as task.columns.{key}"
            )
        value = row[column]
        if not (value is None or isinstance(value, str) or type(value) is int):
            raise ValueError(
                f"{where}: column {column}: {value!r:.60} is neither text nor a whole number; write it as text"
            )
        return "" if value is None else str(value).strip()
