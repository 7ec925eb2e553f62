"""What a task family is, and what a problem is: one schema for every source.

A family is one file. It holds a frozen class of settings with methods that make or read problems, word a prompt and verify a
response. There are two kinds of families. A `GeneratedTask` makes its problems by seed and has an alphabet of its own, so
that models are created and warm-started for it. A `TextTask` asks a published checkpoint in words.
"""

import hashlib
import json
import sys
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator
from tqdm import tqdm

from cppo.rewards import Judge
from cppo.suite.schema import Config, Count, Name, unique
from cppo.system.files import write_atomic
from cppo.system.seeds import numpy_generator

if TYPE_CHECKING:  # loading a suite must not wait for transformers
    from transformers import PreTrainedTokenizerFast

TRAIN = "train"
"""Name of the training problems among a task's sets."""
BOXED = "\\boxed{"
SPECIAL = ("<pad>", "<eos>", "<unk>")
"""The first tokens of every alphabet."""
Report = dict[str, Any]
"""For people: what was found and dropped while problems were read."""
Axes = tuple[str | int, ...]
"""What a random draw depends on (`cppo.system.seeds`)."""


@dataclass(frozen=True)
class Problem:
    """One problem of any source."""

    id: str
    """Twelve hex digits: the hash of question and answer."""
    question: str
    """The bare question; `Task.wording` makes the prompt's text."""
    answer: str
    """The gold answer."""
    source: str
    """The data set or split."""
    difficulty: int
    """The size of a generated problem, the level of a problem of MATH-500, 0 elsewhere."""


def problem(question: str, answer: str, source: str, difficulty: int) -> Problem:
    """A problem with its content id. The source is not part of the id, so that duplicates across splits have the same one."""
    digest = hashlib.sha256(json.dumps([question, answer]).encode()).hexdigest()
    return Problem(digest[:12], question, answer, source, difficulty)


class Benchmark(Config):
    """A held-out set of problems; it is scored by itself, as one year of AIME is."""

    name: Name
    """Its name, which is also that of its lm-eval task."""
    problems: Count
    """How many problems it has."""


class Task(Config):
    """A task family with its settings: where problems come from, how they are asked, how responses are verified."""

    family: str
    """Which family this is."""
    benchmarks: tuple[Benchmark, ...] = Field(min_length=1)
    """Held-out sets."""

    @model_validator(mode="after")
    def _distinct(self) -> "Task":
        unique([b.name for b in self.benchmarks], "benchmarks: name")
        if TRAIN in (b.name for b in self.benchmarks):
            raise ValueError(f"benchmarks: the name '{TRAIN}' is taken by the training problems")
        return self

    @abstractmethod
    def load(self, setting_name: str) -> tuple[dict[str, tuple[Problem, ...]], Report]:
        """The problems of every benchmark by its name and the training problems under "train", and a report.

        Raises ValueError, one line, for problems that cannot be made or read.
        """

    def wording(self, question: str) -> str:
        """What the model is asked, as text; also lm-eval's `doc_to_text`."""
        return question

    def encode(self, tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
        """The token ids of the prompt whose `wording` is `text`."""
        ids: list[int] = tokenizer(text).input_ids
        return ids

    def prompt_ids(self, tokenizer: "PreTrainedTokenizerFast", question: str) -> list[int]:
        """The token ids of the prompt for a question."""
        return self.encode(tokenizer, self.wording(question))

    def short_enough(self, tokenizer: "PreTrainedTokenizerFast", problems: tuple[Problem, ...]) -> tuple[Problem, ...]:
        """The problems whose prompts are short enough to be trained on."""
        return problems

    def verify(self, response: str, asked: Problem, judge: Judge) -> float | None:
        """1.0 for a right response, 0.0 for a wrong one, None where there is no verdict.

        By default the judge compares what is in the box with the gold answer. A family with several right answers, or with
        a checker of its own, overrides this; training, warm start and evaluation all ask here.
        """
        return judge.verdict(response, asked.answer)

    def accepts_gold(self, asked: Problem, judge: Judge) -> bool:
        """Whether the problem's own gold answer, put in a box, is judged right."""
        return self.verify(f"{BOXED}{asked.answer}}}", asked, judge) == 1.0

    def first_seeds(self, setting_name: str) -> list[Axes]:
        """The axes of the first random draw of each kind that the problems depend on."""
        return []


class SizedBenchmark(Benchmark):
    """Held-out problems of one size."""

    size: Count
    """The size of every problem in it."""


class GeneratedTask(Task):
    """A family whose problems are made by seed over an alphabet of its own, for models that are created for it.

    A subclass sets `alphabet` and `largest`, and writes `draw`, `demonstrations` and `response_tokens`.
    """

    alphabet: ClassVar[tuple[str, ...]]
    """The texts of all tokens but the special ones, in the order of their ids. A longer text is matched first."""
    smallest: ClassVar[int] = 1
    """The smallest size that makes a problem."""
    largest: ClassVar[int]
    """The largest size that the family can write down."""
    sizes: tuple[Count, ...] = Field(min_length=1)
    """Sizes of the training problems. Each is equally frequent."""
    problems: Count
    """Number of training problems. When all are used, they are used again in a new order."""
    benchmarks: tuple[SizedBenchmark, ...] = Field(min_length=1)
    """Held-out sets, disjoint from the training problems."""

    @model_validator(mode="after")
    def _possible(self) -> "GeneratedTask":
        for key, size in (*(("sizes", s) for s in self.sizes), *(("benchmarks", b.size) for b in self.benchmarks)):
            if not self.smallest <= size <= self.largest:
                raise ValueError(
                    f"{key}: size {size} is not in {self.smallest}..{self.largest}, those of family {self.family}"
                )
        return self

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Token texts in the order of their ids."""
        return (*SPECIAL, *self.alphabet)

    @abstractmethod
    def draw(self, size: int, rng: np.random.Generator) -> tuple[str, str]:
        """A random (question, answer) of this size."""

    @abstractmethod
    def demonstrations(self, setting_name: str) -> Iterator[tuple[str, str]]:
        """Endless (question, response) pairs for the warm start. Some responses are wrong on purpose."""

    @abstractmethod
    def response_tokens(self, size: int) -> int:
        """Tokens of the longest well-formed response to a problem of this size, its end token included."""

    @property
    def longest_response(self) -> tuple[int, int]:
        """(size, tokens) of the longest response that any problem of the task needs."""
        sizes = {*self.sizes, *(b.size for b in self.benchmarks)}
        return max(((size, self.response_tokens(size)) for size in sizes), key=lambda pair: pair[1])

    def load(self, setting_name: str) -> tuple[dict[str, tuple[Problem, ...]], Report]:
        """See `Task.load`. No two problems have the same id; the sizes of training problems take turns."""
        taken: set[str] = set()
        sets = {
            b.name: self._distinct_problems((b.size,), b.problems, setting_name, b.name, taken) for b in self.benchmarks
        }
        sets[TRAIN] = self._distinct_problems(self.sizes, self.problems, setting_name, TRAIN, taken)
        return sets, {name: {"problems": len(problems)} for name, problems in sets.items()}

    def _distinct_problems(
        self, sizes: Sequence[int], count: int, setting_name: str, source: str, taken: set[str]
    ) -> tuple[Problem, ...]:
        rng = numpy_generator("problems", setting_name, source)
        made: list[Problem] = []
        for _ in range(100 * count):
            if len(made) == count:
                break
            size = sizes[len(made) % len(sizes)]
            new = problem(*self.draw(size, rng), source, size)
            if new.id not in taken:
                taken.add(new.id)
                made.append(new)
        if len(made) < count:
            raise ValueError(
                f"task: {source}: there are only {len(made)} distinct problems of sizes {', '.join(map(str, sizes))}, "
                f"{count} are asked for"
            )
        return tuple(made)

    def first_seeds(self, setting_name: str) -> list[Axes]:
        """See `Task.first_seeds`."""
        return [("weights", setting_name), ("problems", setting_name, TRAIN), ("demonstrations", setting_name)]


class TextTask(Task):
    """A family whose questions are asked in words, for published checkpoints.

    The instruction follows the question. For a chat model both are the user's message, which the tokenizer's chat template
    wraps; for a base model they are the whole prompt.
    """

    prompt: Literal["chat", "base"]
    """chat = the tokenizer's chat template; base = plain text for a model that knows no chat."""
    enable_thinking: bool | None = None
    """The chat template's flag of this name (Qwen3: think before answering); None = the template's own default."""
    instruction: str
    """The text after the question, on a line of its own, such as a request for a boxed answer."""
    max_prompt_tokens: Count
    """A training problem with a longer prompt is left out, and counted."""

    @model_validator(mode="after")
    def _askable(self) -> "TextTask":
        if self.enable_thinking is not None and self.prompt != "chat":
            raise ValueError("enable_thinking is for prompt chat")
        if any(mark in self.instruction for mark in ("{{", "{%", "{#")):
            raise ValueError("instruction: {{, {% and {# have a meaning in lm-eval's task files; write { { instead")
        return self

    def wording(self, question: str) -> str:
        """See `Task.wording`."""
        return f"{question}\n{self.instruction}"

    def encode(self, tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
        """See `Task.encode`."""
        if self.prompt == "base":
            return super().encode(tokenizer, text)
        flag = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        message = [{"role": "user", "content": text}]
        ids: list[int] = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False, **flag)
        return ids

    def short_enough(self, tokenizer: "PreTrainedTokenizerFast", problems: tuple[Problem, ...]) -> tuple[Problem, ...]:
        """The problems whose prompts have at most `max_prompt_tokens` tokens; says how many have more.

        Raises ValueError when none is left.
        """
        limit = self.max_prompt_tokens
        kept = tuple(p for p in problems if len(self.prompt_ids(tokenizer, p.question)) <= limit)
        if not kept:
            raise ValueError(f"task.max_prompt_tokens: every training prompt is longer than {limit} tokens; raise it")
        if len(kept) < len(problems):
            left_out = len(problems) - len(kept)
            tqdm.write(
                f"{left_out} of {len(problems)} training problems are left out: their prompts have more than {limit} tokens",
                file=sys.stderr,
            )
        return kept


def write_problems(problems: Sequence[Problem], path: Path) -> None:
    """Write one JSON object per line. The file appears whole or not at all."""
    write_atomic(path, "".join(json.dumps(asdict(p)) + "\n" for p in problems))


def read_problems(path: str | Path) -> tuple[Problem, ...]:
    """The problems in a file of `write_problems`. Raises ValueError naming file, line and field for anything else."""
    path, problems = Path(path), []
    types = {f.name: f.type for f in fields(Problem)}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"{path}: cannot be read as UTF-8 text; `python -m cppo data` makes it") from None
    # Not splitlines(): JSON may hold other line separators inside a string.
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"{where}: not a JSON object; make the file again with `python -m cppo data`") from None
        if not isinstance(row, dict) or set(row) != set(types):
            raise ValueError(f"{where}: a problem has exactly the fields {', '.join(types)}")
        for name, kind in types.items():
            if type(row[name]) is not kind:
                raise ValueError(f"{where}: {name}: expected {getattr(kind, '__name__', kind)}, got {row[name]!r:.60}")
        made = Problem(**row)
        if made != problem(made.question, made.answer, made.source, made.difficulty):
            raise ValueError(f"{where}: id {made.id!r:.60} is not the hash of question and answer: the row was edited")
        problems.append(made)
    if not problems:
        raise ValueError(f"{path}: holds no problem; make it again with `python -m cppo data`")
    return tuple(problems)
