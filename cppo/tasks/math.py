r"""Family `math`: competition mathematics in words, from published problem sets; the paper's task.

Every name stands for one file of one repository of the Hugging Face hub at the commit that the suite names, or for the same
file in a local folder, <data_dir>/<name>/*.parquet (.jsonl, .csv). What makes a set of problems whole is told in
`cppo.tasks.reading`.

The file of DAPO-Math-17k repeats about 17 thousand problems a hundred times and wraps each question in a request for a last
line "Answer: ...". The wrapping is removed; the suite's `instruction` says what is asked of the model.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cppo.rewards import Judge
from cppo.suite.schema import LATER, Commit, Config, Count
from cppo.system.files import sha256
from cppo.system.hub import fetch
from cppo.tasks.reading import ENDINGS, held_out, read_rows, training, without_overlap
from cppo.tasks.types import TRAIN, Benchmark, Problem, Report, TextTask

DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
    "(without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'


class Row(BaseModel):
    """A row as published: the columns that are needed, with their types. Other columns are ignored."""

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


Published = Literal["dapo_math_17k", "aime24", "aime25", "aime26", "math500", "gsm8k", "gsm8k_train"]
"""Names of the sets in `SOURCES`."""


class TrainingSet(Config):
    """Published training problems. Problems that are empty, repeated, contradictory or held out are dropped and counted."""

    name: Published
    """Which set."""
    revision: Commit | None = None
    """The hub's commit; needed unless `data_dir` holds the file."""
    rows: Count
    """Rows that its file must hold, repeats included; another number is an error."""


class HeldOutSet(Benchmark):
    """A published benchmark. It must be whole, so an empty or repeated problem is an error."""

    name: Published
    """Which set; also the lm-eval task's name."""
    revision: Commit | None = None
    """The hub's commit; needed unless `data_dir` holds the file."""
    problems: Count
    """How many problems are scored. Without `rows` the file must hold exactly as many."""
    rows: Annotated[Count | None, LATER] = None
    """Problems that the file must hold, where only the first `problems` of them are scored; None = all are scored."""

    @model_validator(mode="after")
    def _cut(self) -> "HeldOutSet":
        if self.rows is not None and self.rows < self.problems:
            raise ValueError(
                f"rows {self.rows} is below problems {self.problems}: a file cannot give more than it holds"
            )
        return self


class MathTask(TextTask):
    """Competition mathematics in words: published training problems and benchmarks."""

    family: Literal["math"]
    """Kind of problem."""
    train: TrainingSet
    """The training problems."""
    benchmarks: tuple[HeldOutSet, ...] = Field(min_length=1)
    """Held-out sets."""
    data_dir: str | None = None
    """Folder with the files of the data sets, <data_dir>/<name>/*.parquet, .jsonl or .csv; None = they are had from the hub."""

    @model_validator(mode="after")
    def _reachable(self) -> "MathTask":
        if self.train.name in (b.name for b in self.benchmarks):
            raise ValueError(f"benchmarks: {self.train.name} is the training set")
        wanted_sets: tuple[TrainingSet | HeldOutSet, ...] = (self.train, *self.benchmarks)
        for wanted in wanted_sets:
            if self.data_dir is None and wanted.revision is None:
                raise ValueError(f"{wanted.name}: revision is missing: the hub needs a commit; or set data_dir")
        return self

    def load(self, setting_name: str) -> tuple[dict[str, tuple[Problem, ...]], Report]:
        """See `Task.load`. Raises ValueError, one line that names data set, row and column, for what is not as published."""
        sets: dict[str, tuple[Problem, ...]] = {}
        report: Report = {}
        with Judge() as judge:
            judgeable = partial(self.accepts_gold, judge=judge)
            for wanted in self.benchmarks:
                rows, origin = self._rows(wanted)
                problems, counts = held_out(wanted.name, rows, judgeable, wanted.name)
                expected = wanted.rows or wanted.problems
                if len(problems) != expected:
                    raise ValueError(
                        f"{wanted.name}: {len(problems)} problems, the suite says {expected}: another file or another revision"
                    )
                sets[wanted.name] = problems[: wanted.problems]
                report[wanted.name] = origin | counts
            rows, origin = self._rows(self.train)
            kept, counts = training(self.train.name, rows, judgeable)
        if counts["rows"] != self.train.rows:
            raise ValueError(
                f"{self.train.name}: {counts['rows']} rows, the suite says {self.train.rows}: the file is cut or another "
                "revision"
            )
        sets[TRAIN], left = without_overlap(self.train.name, kept, sets)
        report[TRAIN] = origin | counts | left
        return sets, report

    def _rows(self, wanted: TrainingSet | HeldOutSet) -> tuple[Iterator[tuple[str, str, int]], Report]:
        """(question, answer, difficulty) of each row, blanks around them removed, and where they come from."""
        source = SOURCES[wanted.name]
        path = self._file(wanted, source)
        if self.data_dir is None:
            origin: Report = {"repository": source.repo, "revision": wanted.revision}
        else:
            origin = {"local": True}

        def rows() -> Iterator[tuple[str, str, int]]:
            for where, raw in read_rows(path):
                try:
                    # CSV knows text only.
                    question, answer, difficulty = source.row.model_validate(raw, strict=path.suffix != ".csv").read()
                except ValidationError as error:
                    first = error.errors()[0]
                    column = ".".join(str(part) for part in first["loc"] if part not in ("str", "int"))
                    raise ValueError(
                        f"{wanted.name}: {where} of {path.name}: column {column}: {first['msg'].lower()}; the columns must be "
                        f"those of {source.file} in {source.repo}; this file has {', '.join(raw)}"
                    ) from None
                yield question.strip(), answer.strip(), difficulty

        return rows(), {**origin, "file": path.name, "sha256": sha256(path)}

    def _file(self, wanted: TrainingSet | HeldOutSet, source: Source) -> Path:
        if self.data_dir is None:
            assert wanted.revision is not None  # checked when the suite was read
            remedy = (
                f"with a copy at hand, put {source.file} into <folder>/{wanted.name}/ and set task.data_dir: <folder>"
            )
            folder = fetch(source.repo, "dataset", wanted.revision, [source.file], remedy)
            return folder / source.file
        folder = Path(self.data_dir) / wanted.name
        files = sorted(path for path in folder.glob("*") if path.suffix in ENDINGS)
        if len(files) != 1:
            raise ValueError(
                f"{folder}: {len(files)} files of {wanted.name}, expected one .parquet, .jsonl or .csv: "
                f"{source.file} of {source.repo}"
            )
        return files[0]
