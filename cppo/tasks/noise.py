"""A table of arithmetic that is wrong on purpose, from which generated families make their demonstrations.

The base model learns the table, and reinforcement learning must repair its weak entries from the outcome alone.
"""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from cppo.system.seeds import numpy_generator

Entry = TypeVar("Entry", bound=Hashable)


@dataclass(frozen=True)
class NoisyTable(Generic[Entry]):
    """An entry is an operation with its operands. The table holds how often each is shown rightly, and its one wrong digit."""

    result: Callable[[Entry], int]
    right: dict[Entry, float]
    wrong: dict[Entry, int]

    def shown(self, entry: Entry, rng: np.random.Generator) -> int:
        """The digit that one demonstration shows for an entry."""
        return self.result(entry) if rng.random() < self.right[entry] else self.wrong[entry]


def noisy_table(
    entries: Iterable[Entry], result: Callable[[Entry], int], weak: float, setting_name: str
) -> NoisyTable[Entry]:
    """The table of a setting. An entry is weak with probability `weak`.

    A weak entry is shown rightly with a probability drawn from U(0.2, 0.7), another one with probability 0.99.
    result: the true digit of an entry. The wrong digit is another one modulo 10.
    """
    rng = numpy_generator("table", setting_name)
    right, wrong = {}, {}
    for entry in entries:
        right[entry] = float(rng.uniform(0.2, 0.7)) if rng.random() < weak else 0.99
        wrong[entry] = int((result(entry) + rng.integers(1, 10)) % 10)
    return NoisyTable(result, right, wrong)
