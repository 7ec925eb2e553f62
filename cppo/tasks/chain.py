"""The noisy modular chain: step-by-step arithmetic modulo 10 in which an early slip ruins the rest.

    prompt    3a-8b*9c+5>                      first digit, then (letter, operator, operand) for each step
    response  a3-8=5b5*9=5c5+5=0\\boxed{0}     (letter, running digit, operator, operand, =, result) for each step, the answer

Operators are +, - (operand 0 to 9) and * (operand 3, 7 or 9). All are bijective in the running digit, so a slip persists.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np

from cppo.suite.schema import Share
from cppo.system.seeds import numpy_generator
from cppo.tasks.noise import NoisyTable, noisy_table
from cppo.tasks.types import BOXED, Axes, GeneratedTask

OPERANDS = {"+": tuple(range(10)), "-": tuple(range(10)), "*": (3, 7, 9)}
LETTERS = "abcdefghijklmnopqrst"
Step = tuple[str, int, int]
"""(operator, running digit, operand)."""


def apply(step: Step) -> int:
    """The result of one step, modulo 10."""
    operator, a, b = step
    return {"+": a + b, "-": a - b, "*": a * b}[operator] % 10


@dataclass(frozen=True)
class Chain:
    """A chain before it is written down."""

    start: int
    steps: tuple[tuple[str, int], ...]
    """(operator, operand) of each step."""

    @property
    def question(self) -> str:
        """The prompt."""
        return str(self.start) + "".join(f"{LETTERS[i]}{o}{b}" for i, (o, b) in enumerate(self.steps)) + ">"

    def response(self, results: Sequence[int]) -> str:
        """The worked solution that claims these results."""
        text, a = "", self.start
        for i, ((operator, b), result) in enumerate(zip(self.steps, results, strict=True)):
            text += f"{LETTERS[i]}{a}{operator}{b}={result}"
            a = result
        return f"{text}{BOXED}{a}}}"

    def results(self, result: Callable[[Step], int] = apply) -> list[int]:
        """The running digits when each step has this result: by default the true ones. A slip is carried on."""
        values, a = [], self.start
        for operator, b in self.steps:
            a = result((operator, a, b))
            values.append(a)
        return values


def random_chain(length: int, rng: np.random.Generator) -> Chain:
    """A chain of this length. All operators are equally likely, and so are the operands of each."""
    operators = [str(o) for o in rng.choice(list(OPERANDS), length)]
    return Chain(int(rng.integers(10)), tuple((o, int(rng.choice(OPERANDS[o]))) for o in operators))


class ChainTask(GeneratedTask):
    """The noisy modular chain: step-by-step arithmetic modulo 10 with a boxed answer. A problem's size is its length."""

    alphabet: ClassVar[tuple[str, ...]] = (*"0123456789", *LETTERS, *OPERANDS, "=", ">", BOXED, "}")
    largest: ClassVar[int] = len(LETTERS)
    family: Literal["chain"]
    """Kind of problem."""
    weak: Share
    """Probability that an entry of the arithmetic table is shown wrongly most of the time in the warm start."""

    def draw(self, size: int, rng: np.random.Generator) -> tuple[str, str]:
        """See `GeneratedTask.draw`."""
        chain = random_chain(size, rng)
        return chain.question, str(chain.results()[-1])

    def table(self, setting_name: str) -> NoisyTable[Step]:
        """The 230 entries of the arithmetic table that demonstrations follow."""
        entries = ((operator, a, b) for operator, operands in OPERANDS.items() for a in range(10) for b in operands)
        return noisy_table(entries, apply, self.weak, setting_name)

    def demonstrations(self, setting_name: str) -> Iterator[tuple[str, str]]:
        """See `GeneratedTask.demonstrations`."""
        table, rng = self.table(setting_name), numpy_generator("demonstrations", setting_name)
        while True:
            chain = random_chain(int(rng.choice(self.sizes)), rng)
            yield chain.question, chain.response(chain.results(partial(table.shown, rng=rng)))

    def response_tokens(self, size: int) -> int:
        """See `GeneratedTask.response_tokens`."""
        return 6 * size + 4

    def first_seeds(self, setting_name: str) -> list[Axes]:
        """See `Task.first_seeds`."""
        return [*super().first_seeds(setting_name), ("table", setting_name)]
