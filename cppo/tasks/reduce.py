"""Reduce a row of digits to one digit: at every step the model chooses which two digits it adds.

    prompt    51784>                                             n digits
    response  1+4=5>5785-8+5=3>573-5+3=8>78-7+8=5\\boxed{5}      two digits and their sum modulo 10, then the digits that
                                                                 remain, until one is left

Any two digits may be taken, in either order, and their sum goes to the end of the row. The answer is unique, but the way to
it is free. Two tokens of every step are choices, so that the policy's entropy, and with it the divergence from the rollout
policy, is spread over the whole response; in the chain it sits on one digit per step. Reinforcement learning can repair a
weak entry of the table, or it can choose a way around it.
"""

from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np

from cppo.suite.schema import Share
from cppo.system.seeds import numpy_generator
from cppo.tasks.noise import NoisyTable, noisy_table
from cppo.tasks.types import BOXED, Axes, GeneratedTask

Pair = tuple[int, int]
"""Two digits in the order in which they are written."""


def add(pair: Pair) -> int:
    """The sum modulo 10."""
    return sum(pair) % 10


class ReduceTask(GeneratedTask):
    """Add any two digits of a row until one is left. A problem's size is its number of digits."""

    alphabet: ClassVar[tuple[str, ...]] = (*"0123456789", "+", "-", "=", ">", BOXED, "}")
    smallest: ClassVar[int] = 2
    largest: ClassVar[int] = 20
    family: Literal["reduce"]
    """Kind of problem."""
    weak: Share
    """Probability that an entry of the table of sums is shown wrongly most of the time in the warm start."""

    def draw(self, size: int, rng: np.random.Generator) -> tuple[str, str]:
        """See `GeneratedTask.draw`."""
        digits = [int(d) for d in rng.integers(10, size=size)]
        return "".join(map(str, digits)) + ">", str(sum(digits) % 10)

    def table(self, setting_name: str) -> NoisyTable[Pair]:
        """The 100 entries of the table of sums that demonstrations follow."""
        return noisy_table(((a, b) for a in range(10) for b in range(10)), add, self.weak, setting_name)

    def demonstrations(self, setting_name: str) -> Iterator[tuple[str, str]]:
        """See `GeneratedTask.demonstrations`."""
        table, rng = self.table(setting_name), numpy_generator("demonstrations", setting_name)
        while True:
            question, _ = self.draw(int(rng.choice(self.sizes)), rng)
            yield question, response(question, table, rng)

    def response_tokens(self, size: int) -> int:
        """See `GeneratedTask.response_tokens`."""
        return 7 * size - 6 + size * (size - 1) // 2

    def first_seeds(self, setting_name: str) -> list[Axes]:
        """See `Task.first_seeds`."""
        return [*super().first_seeds(setting_name), ("table", setting_name)]


def response(question: str, table: NoisyTable[Pair], rng: np.random.Generator) -> str:
    """A worked solution of `question` that takes two digits at random and adds them as the table shows."""
    digits, steps = [int(d) for d in question.removesuffix(">")], []
    while len(digits) > 1:
        i, j = (int(k) for k in rng.choice(len(digits), 2, replace=False))
        pair = (digits[i], digits[j])
        digits = [d for k, d in enumerate(digits) if k not in (i, j)] + [table.shown(pair, rng)]
        steps.append(f"{pair[0]}+{pair[1]}={digits[-1]}")
        if len(digits) > 1:
            steps[-1] += ">" + "".join(map(str, digits))
    return "-".join(steps) + f"{BOXED}{digits[0]}}}"
