"""Problems with machine-checkable answers, in one schema for every source.

The embedded source is the noisy modular chain: step-by-step arithmetic modulo 10 where an early slip ruins the rest.

    prompt    3a-8b*9c+5>                      first digit, then (label, operator, operand) a step
    response  a3-8=5b5*9=5c5+5=0\\boxed{0}     (label, running digit, operator, operand, =, result) a step, the answer

Operators are +, - (operand 0-9) and * (operand 3, 7, 9): all bijective in the running digit, so a slip persists. The base
model is weak on purpose: its demonstrations follow a table of the 230 (operator, a, b) entries in which some are shown
wrongly most of the time, and reinforcement learning must repair those from the outcome alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cppo.suite.config import Task
from cppo.system.seeds import numpy_generator
from cppo.tasks.types import Problem, problem

OPERANDS = {"+": tuple(range(10)), "-": tuple(range(10)), "*": (3, 7, 9)}
LABELS = "abcdefghijklmnopqrst"
BOXED = "\\boxed{"
SPECIAL = ("<pad>", "<eos>", "<unk>")
VOCABULARY = (*SPECIAL, *"0123456789", *LABELS, *OPERANDS, "=", ">", BOXED, "}")
"""Token texts in the order of their ids."""


def apply(operator: str, a: int, b: int) -> int:
    """The result of one step, modulo 10."""
    return {"+": a + b, "-": a - b, "*": a * b}[operator] % 10


@dataclass(frozen=True)
class Chain:
    """A chain before it is written down."""

    start: int
    steps: tuple[tuple[str, int], ...]
    """(operator, operand) of each step."""

    @property
    def question(self) -> str:
        return str(self.start) + "".join(f"{LABELS[i]}{o}{b}" for i, (o, b) in enumerate(self.steps)) + ">"

    def response(self, results: Sequence[int]) -> str:
        """The worked solution that claims these results."""
        text, a = "", self.start
        for i, ((operator, b), result) in enumerate(zip(self.steps, results, strict=True)):
            text += f"{LABELS[i]}{a}{operator}{b}={result}"
            a = result
        return f"{text}{BOXED}{a}}}"

    def results(self) -> list[int]:
        """The true running digits."""
        values, a = [], self.start
        for operator, b in self.steps:
            a = apply(operator, a, b)
            values.append(a)
        return values


def random_chain(steps: int, rng: np.random.Generator) -> Chain:
    """A chain of this length; operators equally likely, then operands."""
    operators = [str(o) for o in rng.choice(list(OPERANDS), steps)]
    return Chain(int(rng.integers(10)), tuple((o, int(rng.choice(OPERANDS[o]))) for o in operators))


def make_problems(task: Task, setting: str) -> dict[str, tuple[Problem, ...]]:
    """The held-out sets by name and the training set under "train", all distinct by id.

    Training chains cycle through `task.steps`. Raises ValueError when the task has too few distinct chains.
    """
    taken: set[str] = set()
    sets: dict[str, tuple[Problem, ...]] = {}
    for benchmark in task.benchmarks:
        sets[benchmark.name] = _draw([benchmark.steps], benchmark.problems, setting, benchmark.name, taken)
    sets["train"] = _draw(task.steps, task.problems, setting, "train", taken)
    return sets


def _draw(steps: Sequence[int], count: int, setting: str, source: str, taken: set[str]) -> tuple[Problem, ...]:
    rng = numpy_generator("problems", setting, source)
    found: list[Problem] = []
    for _ in range(100 * count):
        if len(found) == count:
            break
        length = steps[len(found) % len(steps)]
        chain = random_chain(length, rng)
        new = problem(chain.question, str(chain.results()[-1]), source, length)
        if new.id not in taken:
            taken.add(new.id)
            found.append(new)
    if len(found) < count:
        raise ValueError(f"task: {source}: only {len(found)} distinct chains of {steps} steps, {count} asked for")
    return tuple(found)


@dataclass(frozen=True)
class NoisyTable:
    """How the warm start's demonstrations do arithmetic: per (operator, a, b), how often right, and the one wrong digit."""

    right: dict[tuple[str, int, int], float]
    wrong: dict[tuple[str, int, int], int]

    def results(self, chain: Chain, rng: np.random.Generator) -> list[int]:
        """Running digits of one demonstration; a slip is carried on."""
        values, a = [], chain.start
        for operator, b in chain.steps:
            entry = (operator, a, b)
            a = apply(*entry) if rng.random() < self.right[entry] else self.wrong[entry]
            values.append(a)
        return values


def noisy_table(weak: float, setting: str) -> NoisyTable:
    """An entry is weak with probability `weak` and then right with r ~ U(0.2, 0.7), else right with 0.99."""
    rng = numpy_generator("table", setting)
    right, wrong = {}, {}
    for operator, operands in OPERANDS.items():
        for a in range(10):
            for b in operands:
                entry = (operator, a, b)
                right[entry] = float(rng.uniform(0.2, 0.7)) if rng.random() < weak else 0.99
                wrong[entry] = int((apply(*entry) + rng.integers(1, 10)) % 10)
    return NoisyTable(right, wrong)


def demonstrations(task: Task, setting: str) -> Iterator[tuple[str, str]]:
    """Endless (question, response) pairs for the warm start."""
    table, rng = noisy_table(task.weak, setting), numpy_generator("demonstrations", setting)
    while True:
        chain = random_chain(int(rng.choice(task.steps)), rng)
        yield chain.question, chain.response(table.results(chain, rng))
