"""The child process of `cppo.rewards.Judge`: reads questions as JSON lines and writes a verdict as a JSON line for each.

The package does not import it. It is run as `python -m cppo.rewards.verify_worker BYTES`, where BYTES is the address space of
a verdict.

It imports math-verify once and forks a child for every question ([response, gold, seconds]), which takes 3 ms. So no answer
can wear out or slow down the judging of the next one, and a lost child costs nothing. The child's verdict is its exit code.
The kernel ends the child at its deadline (SIGALRM), in whatever code it is and whether or not anyone still waits for it. For
a child that ended in any other way the line is "lost".
"""

import gc
import json
import logging
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from cppo.rewards import boxes

VERDICTS = {10: 0.0, 11: 1.0, 12: None}
"""Exit code of a child -> its verdict. Other codes are those of an interpreter that failed."""
WARM_UP = [
    r"\frac{1}{2}",
    r"0.5",
    r"\sqrt{2}+1",
    r"x^2+2x+1",
    r"(3,4)",
    r"\{1,2\}",
    r"[0,\infty)",
    r"2\pi",
    r"\text{B}",
    r"x=3",
    r"\binom{5}{2}",
    r"3!",
    r"10^{3}",
    r"\dfrac12",
    r"1,000",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
    r"50\%",
    r"30^\circ",
]
"""Typical answers, judged once at start-up: the parser fills its tables lazily, and forked children inherit filled ones."""


def judge() -> Callable[[str, str], float | None]:
    """The function that compares a response's boxed answer with the gold one; None = could not judge."""
    from math_verify import LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig(boxed_match_priority=0)]

    def verdict(response: str, gold: str) -> float | None:
        # There is no time limit here: math-verify's own takes whole seconds, and cannot interrupt a multiplication.
        parsed = parse(f"${gold}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=None)
        understood = any(not isinstance(value, str) for value in parsed)
        fallback = "no_fallback" if understood else "first_match"

        def right(text: str) -> bool:
            answer = parse(text, extraction_config=config, parsing_timeout=None, fallback_mode=fallback)
            return bool(verify(parsed, answer, timeout_seconds=None))

        # Where a box says nothing, math-verify reads other formulas of the response. The boxes alone must be right.
        boxed = boxes(response)
        if len(boxed) == 1:
            correct = right(boxed[0])
        else:
            correct = right(response) and (right(boxed[-1]) or right("".join(boxed)))
        if not correct and not understood:
            return None  # a gold answer that is not mathematics is only compared as text
        return float(correct)

    return verdict


class Exhaustion:
    """Notices every MemoryError and RecursionError within, also those that a library catches and takes for "not equal"."""

    def __init__(self) -> None:
        self.seen = False

    def __enter__(self) -> "Exhaustion":
        sys.settrace(self._trace)
        return self

    def __exit__(self, *ignored: object) -> None:
        # Python switches off a tracer that itself runs out of memory or stack.
        self.seen = self.seen or sys.gettrace() is None
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        frame.f_trace_lines = False
        if event == "exception" and issubclass(argument[0], MemoryError | RecursionError):
            self.seen = True
        return self._trace


def answer(verdict: Callable[[str, str], float | None], response: str, gold: str) -> float | None:
    """The verdict; None also where "wrong" only means that memory or stack ran out on the way."""
    try:
        value = verdict(response, gold)
        if value == 0.0:
            with Exhaustion() as exhaustion:
                value = verdict(response, gold)
            if exhaustion.seen:
                return None
    except (MemoryError, RecursionError):
        return None
    return value


HARMLESS = re.compile(
    rb"from sympy import \*|(?:Integer|Float) ?\('?[\d.]*'? ?\)"
    rb"|def monomial_[a-z]+\([ABk, ]+\):\n(?:return|else|if|None|[\s\d(),+*<>=:-]|[abrABk])*+"
)
"""All that sympy gives to Python's `eval` and `exec` for an ordinary answer: its numbers, and products it writes itself."""
FORBIDDEN = tuple(
    [
        "os.exec",
        "os.fork",
        "os.kill",
        "os.link",
        "os.mkdir",
        "os.posix_spawn",
        "os.putenv",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.spawn",
        "os.symlink",
        "os.system",
        "os.truncate",
        "ctypes.",
        "pickle.",
        "pty.",
        "shutil.",
        "socket.",
        "subprocess.",
        "urllib.",
    ]
)
"""Audit events (or their beginnings) that judging never causes."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def guard(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook of a child: ends it before any text is compiled as Python, and at every event that only such text causes."""
    if event == "compile":
        source, name = arguments
        text = source.encode("utf-8", "replace") if isinstance(source, str) else source
        if str(name).startswith("<") and not (isinstance(text, bytes) and HARMLESS.fullmatch(text.strip())):
            os._exit(1)
    elif event == "open":
        if isinstance(arguments[2], int) and arguments[2] & WRITING:
            os._exit(1)
    elif event.startswith(FORBIDDEN):
        os._exit(1)


def in_a_child(verdict: Callable[[str, str], float | None], question: list[Any], memory: int) -> int:
    """The exit code of a child that judges the question (negative: the signal that ended it)."""
    response, gold, seconds = question
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.closerange(0, 3)  # whatever happens, it cannot write to anyone
            signal.setitimer(signal.ITIMER_REAL, seconds)
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            sys.addaudithook(guard)
            value = answer(verdict, response, gold)
            code = next(code for code, known in VERDICTS.items() if known == value)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    """Judge until standard input ends."""
    memory = int(sys.argv[1])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # these reach the whole group, and the trainer needs verdicts to end well
    logging.disable(logging.CRITICAL)
    sys.dont_write_bytecode = True  # a child may import, and must not write
    sys.set_int_max_str_digits(0)  # a long number is a number; its cost is bounded by the deadline
    verdict = judge()
    for text in WARM_UP:
        verdict(rf"\boxed{{{text}}}", text)
        verdict(rf"\boxed{{{text}}}", "7")
    gc.collect()
    gc.freeze()  # otherwise the children's garbage collection would copy every page
    code = in_a_child(verdict, [r"\boxed{14/2}", "7", 60.0], memory)
    if VERDICTS.get(code) != 1.0:
        sys.exit(f"14/2 = 7 was not judged right within {memory} bytes of memory (exit code {code})")
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(VERDICTS.get(in_a_child(verdict, json.loads(line), memory), "lost")), flush=True)


if __name__ == "__main__":
    main()
