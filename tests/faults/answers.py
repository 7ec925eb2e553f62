"""Hostile answers: the corpus `tests/data/hostile_answers.txt`, and a fuzzer that composes and mutates answers.

    python tests/faults/answers.py --cases 10000             the long version (make faults); exit code 1 on a broken promise

Answers are composed of LaTeX that math-verify understands, so that most reach it, or are mutations of the corpus, or any
text at all. They come in chunks of 500 whose contents depend on the chunk's number alone.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from cppo.rewards import MEMORY_BYTES, Judge, fast_verdict

CORPUS = Path(__file__).resolve().parents[1] / "data" / "hostile_answers.txt"
CHUNK = 500
SECOND = 1.0
"""No verdict may take longer, by a wall clock."""
VERDICTS = {1.0: "right", 0.0: "wrong", None: "unjudged"}


class Hostile(NamedTuple):
    """An entry of the corpus."""

    name: str
    response: str
    gold: str
    expected: tuple[str, ...]
    """The verdicts that keep our promises: of right, wrong, unjudged."""


def corpus() -> list[Hostile]:
    """All entries; tests/data/README.md describes the format."""
    found = []
    for line in CORPUS.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        pieces = [entry["response"]] if isinstance(entry["response"], str) else entry["response"]
        response = "".join(piece if isinstance(piece, str) else piece[0] * piece[1] for piece in pieces)
        found.append(Hostile(entry["name"], response, entry["gold"], tuple(entry["expected"].split("-or-"))))
    return found


# The grammar ----------------------------------------------------------------------------------------------------------

GOLD = [
    "7",
    "-3",
    r"\frac{1}{2}",
    "0.25",
    r"\sqrt{2}",
    "(3,4)",
    r"\{1,2\}",
    "x^2+1",
    "[0,1)",
    r"2\pi",
    r"50\%",
    "B",
    "x=3",
]
ATOMS = st.one_of(
    st.integers(0, 20).map(str),
    st.integers(-(10**6), 10**30).map(str),
    st.floats(-100, 100).map(lambda x: f"{x:.3f}"),
    st.sampled_from(
        r"x y n a e i \pi \theta \infty \emptyset \mathbb{R} \text{cm} \text{B} 1,000 50\% 30^\circ \$5".split()
    ),
)
ONE = [
    r"\sqrt{%s}", r"\sqrt[3]{%s}", r"\left(%s\right)", r"{%s}", r"-%s", r"%s!", r"\sin(%s)", r"\arctan{%s}", r"\ln %s",
    r"\log_{2}(%s)", r"|%s|", r"\lfloor %s\rfloor", r"\overline{%s}", r"\boxed{%s}", r"x=%s", r"\{%s\}", r"%s^2", r"2^{%s}",
    r"\text{%s}", r"\mathrm{%s}", r"\operatorname{f}(%s)", r"\int_0^1 %s\,dx", r"\sum_{n=1}^{9} %s", r"\lim_{x\to 0} %s",
    r"%s\%%",
]  # fmt: skip
TWO = [
    r"\frac{%s}{%s}", r"\dfrac%s%s", r"%s+%s", r"%s-%s", r"%s\cdot %s", r"%s\times%s", r"%s/%s", r"%s^{%s}", r"%s_{%s}",
    r"[%s,%s)", r"\{%s,%s\}", r"%s=%s", r"%s<%s", r"%s\ge %s", r"%s\approx %s", r"%s \text{ or } %s", r"\binom{%s}{%s}",
    r"%s,%s", r"(%s,%s)",
    r"\begin{pmatrix}%s\\%s\end{pmatrix}", r"%s\cup %s", r"%s\pm %s", r"%s \mod %s", r"%s%s", r"%s\in %s", r"%s\mid %s",
]  # fmt: skip


def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Larger formulas from smaller ones."""
    return st.one_of(
        st.builds(lambda form, a: form % a, st.sampled_from(ONE), inner),
        st.builds(lambda form, a, b: form % (a, b), st.sampled_from(TWO), inner, inner),
        st.builds(lambda form, a, b: form % (a, b), st.sampled_from(TWO), inner, inner),
    )


FORMULAS = st.recursive(ATOMS, grown, max_leaves=8)
FRAMES = [
    *[r"\boxed{%s}"] * 6, r"So the answer is $\boxed{%s}$.", r"\[\boxed{%s}\]", r"\boxed{%s", r"\boxed{3} or \boxed{%s}",
    r"$%s$ \boxed{}", r"\boxed{%s}}}", r"$%s$", r"The final answer is $\boxed{%s}$. I hope it is correct.", r"\boxed %s",
    r"\boxed{\text{%s}}", r"%% \boxed{%s}",
]  # fmt: skip
ENTRIES = [entry for entry in corpus() if len(entry.response) < 2000]


@st.composite
def mutations(draw: st.DrawFn) -> tuple[str, str]:
    """An entry of the corpus with a few pieces removed, doubled, moved or replaced."""
    entry = draw(st.sampled_from(ENTRIES))
    text = entry.response
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        stop = min(len(text), start + draw(st.integers(0, 12)))
        piece = text[start:stop]
        known = st.sampled_from(["", piece * 2, piece[::-1], "{", "}", "\\", "^", "7", "\x00"])
        new = draw(known | ATOMS | st.text(max_size=3))
        text = text[:start] + new + text[stop:]
    return text, entry.gold


def framed(frame: str, formula: str, gold: str) -> tuple[str, str]:
    return frame % formula, gold


CASES: st.SearchStrategy[tuple[str, str]] = st.one_of(
    *[st.builds(framed, st.sampled_from(FRAMES), FORMULAS, st.sampled_from(GOLD) | FORMULAS)] * 4,
    *[FORMULAS.map(lambda formula: (rf"\boxed{{{formula}}}", formula))] * 2,
    mutations(),
    st.builds(framed, st.sampled_from(FRAMES), st.text(max_size=40), st.sampled_from(GOLD)),
)
"""(response, gold)."""


# Running it -----------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What happened."""

    count: int = 0
    asked: int = 0
    """Those that reached math-verify."""
    verdicts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(VERDICTS.values(), 0))
    killed: int = 0
    slowest: float = 0.0
    """Seconds."""
    slowest_case: str = ""
    peak: int = 0
    """Largest resident set of a process that judged, in bytes."""

    def __add__(self, other: "Tally") -> "Tally":
        slower = max(self, other, key=lambda tally: tally.slowest)
        return Tally(
            self.count + other.count,
            self.asked + other.asked,
            {name: self.verdicts[name] + other.verdicts[name] for name in self.verdicts},
            self.killed + other.killed,
            slower.slowest,
            slower.slowest_case,
            max(self.peak, other.peak),
        )

    def __str__(self) -> str:
        verdicts = ", ".join(f"{count} {name}" for name, count in self.verdicts.items())
        return (
            f"{self.count} answers ({self.asked} reached math-verify): {verdicts}; {self.killed} workers killed; slowest "
            f"verdict {self.slowest:.3f} s ({self.slowest_case!r:.80}); peak memory of a worker {self.peak / 2**20:.0f} MiB"
        )


def ask(judge: Judge, response: str, gold: str, tally: Tally) -> str:
    """The verdict, entered in the tally."""
    start = time.perf_counter()
    found = judge.verdict(response, gold)
    seconds = time.perf_counter() - start
    tally.count += 1
    tally.asked += fast_verdict(response, gold) is None
    tally.verdicts[VERDICTS[found]] += 1
    if seconds > tally.slowest:
        tally.slowest, tally.slowest_case = seconds, response
    return VERDICTS[found]


def chunk(number: int, count: int) -> Tally:
    """`count` answers; raises AssertionError where one without a box is not wrong, or the answer after it is misjudged.

    To be called in a process of its own, whose only children are then the workers: their memory is read from it.
    """
    tally = Tally()
    with Judge() as judge:
        judge.start()

        @seed(number)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            derandomize=False,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(CASES)
        def attack(case: tuple[str, str]) -> None:
            if tally.count == count:  # hypothesis repeats the last one when it fails
                return
            found = ask(judge, *case, tally)
            if "\\boxed" not in case[0]:
                assert found == "wrong", case
            if tally.count % 20 == 0:
                honest = tally.count + 1  # not in the judge's memory yet
                assert judge.verdict(rf"\boxed{{{7 * honest}/{honest}}}", "7") == 1.0, case
                assert judge.verdict(rf"\boxed{{{8 * honest}/{honest}}}", "7") == 0.0, case

        attack()
        tally.killed = judge.killed
    tally.peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return tally


def fuzz(cases: int, first: int = 0, processes: int = 1) -> Tally:
    """All chunks, each in a process of its own."""
    sizes = [min(CHUNK, cases - start) for start in range(0, cases, CHUNK)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, max_tasks_per_child=1) as pool:
        found = pool.map(chunk, range(first, first + len(sizes)), sizes)
        return sum(found, Tally())


def script() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cases", type=int, default=10_000, help="how many answers")
    parser.add_argument("--first", type=int, default=0, help=f"number of the first chunk of {CHUNK}")
    parser.add_argument("--processes", type=int, default=1, help="how many chunks at a time")
    args = parser.parse_args()
    tally = fuzz(args.cases, args.first, args.processes)
    print(tally)
    return int(tally.slowest > SECOND or tally.peak > MEMORY_BYTES)


if __name__ == "__main__":
    sys.exit(script())
