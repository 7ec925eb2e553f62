"""Verdicts on model answers: right (1.0), wrong (0.0), or could not judge (None: counted, never taken as wrong).

The answer is the content of the response's box (`\\boxed{...}`). A response without a box is wrong, even if it contains the
number. A box counts wherever it stands (a response is plain text, where `%` does not start a comment), and several boxes must
agree. Plain integers are compared here. Everything else goes to math-verify in a process of its own
(`cppo.rewards.verify_worker`) with a limit on memory and time, because a model's text can keep a computer-algebra system busy
for ever. Text and verdict cross the pipe as JSON lines; nothing is unpickled or evaluated.
"""

import json
import os
import re
import selectors
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from types import TracebackType

DEADLINE_SECONDS = 0.9
"""Wall time of a verdict, after which the kernel ends the process that works on it. The rest of a second is for that end."""
LATE_SECONDS = 5.0
"""How much later than the deadline an answer may come on a busy machine, before the worker as a whole is replaced."""
START_SECONDS = 60.0
"""Longest wall time for the worker to start (it imports sympy), which happens once per judge and outside of verdicts."""
MEMORY_BYTES = 2**30
"""Bytes of address space that a verdict may use."""
CACHED = 100_000
"""How many verdicts are remembered."""
MAX_CHARACTERS = 20_000
"""Only the last so many characters of a response are judged. If they hold no box, there is no verdict."""

_INTEGER = re.compile(r"\\boxed\{\s*([-+]?\d{1,18})\s*\}")
_PLAIN = re.compile(r"[-+]?\d{1,18}")
_OPENING = re.compile(r"\\boxed\s*\{")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)


def boxes(response: str) -> list[str]:
    """The outermost `\\boxed{...}` of a response, with their commands. A box that is never closed does not count."""
    texts, end = [], 0
    for opening in _OPENING.finditer(response):
        if opening.start() < end:
            continue
        depth = 0
        for brace in _BRACES.finditer(response, opening.end() - 1):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                end = brace.end()
                texts.append(response[opening.start() : end])
                break
        else:
            break  # nothing after it is closed either
    return texts


def fast_verdict(response: str, gold: str) -> float | None:
    """The verdict where no mathematics is needed; None = ask math-verify.

    >>> fast_verdict(r"3+4=7\\boxed{7}", "7"), fast_verdict("7", "7"), fast_verdict(r"\\boxed{14/2}", "7")
    (1.0, 0.0, None)
    """
    count = response.count("\\boxed")
    if count == 0:
        return 0.0
    integers = _INTEGER.findall(response)
    if count == 1 and len(integers) == 1 and _PLAIN.fullmatch(gold):
        return float(int(integers[0]) == int(gold))
    return None if boxes(response) else 0.0


def overlong_penalty(length: int, longest: int, buffer: int) -> float:
    """What DAPO adds to the reward of a response of `length` tokens: 0, then falling to -1 over the last `buffer` tokens.

    Source: DAPO (arXiv:2503.14476), soft overlong punishment.

    >>> [overlong_penalty(n, 20480, 4096) for n in (16384, 18432, 20480)]
    [0.0, -0.5, -1.0]
    """
    return min(0.0, max(-1.0, (longest - buffer - length) / buffer))


@dataclass
class Judge:
    """Judges responses one after the other. Owns one worker, started when first needed. Use it as a context manager."""

    deadline: float = DEADLINE_SECONDS
    killed: int = 0
    """Processes that were lost while they worked on a verdict (deadline, crash). Each left one response unjudged."""
    unjudged: int = 0
    """Responses without a verdict so far, for whatever reason."""
    _worker: subprocess.Popen[str] | None = field(default=None, repr=False)
    _owner: int = field(default=0, repr=False)
    """The process that started the worker. A process forked from it must not read answers to the other's questions."""

    def __post_init__(self) -> None:
        self._known: dict[tuple[str, str], float] = {}

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def verdict(self, response: str, gold: str) -> float | None:
        """1.0 right, 0.0 wrong, None could not judge. Both are plain text; the gold answer without its box.

        Raises ValueError when the worker cannot be started.
        """
        fast = fast_verdict(response, gold)
        if fast is not None:
            return fast
        key = (response[-MAX_CHARACTERS:], gold)
        if key not in self._known:
            verdict = self._ask(*key) if "\\boxed" in key[0] else None
            if verdict is None:
                self.unjudged += 1
                return None  # it is not remembered, because a busy machine may have caused it
            if len(self._known) >= CACHED:
                self._known.clear()
            self._known[key] = verdict
        return self._known[key]

    def _ask(self, response: str, gold: str) -> float | None:
        line = json.dumps([response, gold, self.deadline]) + "\n"
        try:
            worker = self._send(line)
        except BrokenPipeError:  # the worker was dead already, so this response did not kill it
            self.close()
            worker = self._send(line)
        answer = _read_line(worker, self.deadline + LATE_SECONDS)
        if answer is None:
            self.close()
        verdict = "lost" if answer is None else json.loads(answer)
        if verdict == "lost":
            self.killed += 1
            return None
        return None if verdict is None else float(verdict)

    def _send(self, line: str) -> subprocess.Popen[str]:
        self.start()
        assert self._worker is not None and self._worker.stdin is not None
        self._worker.stdin.write(line)
        self._worker.stdin.flush()
        return self._worker

    def start(self) -> None:
        """Start the worker unless it runs. Raises ValueError, one line with the reason, when it cannot be started."""
        if self._worker is not None and self._owner == os.getpid():
            return
        self._owner = os.getpid()
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints:
            self._worker = subprocess.Popen(
                [sys.executable, "-m", "cppo.rewards.verify_worker", str(MEMORY_BYTES)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                text=True,
                encoding="utf-8",
            )
            if _read_line(self._worker, START_SECONDS) is None:
                try:
                    self._worker.wait(1.0)  # its pipe is closed a moment before it has ended
                    ended = "it ended without a word"
                except subprocess.TimeoutExpired:
                    ended = f"it was not ready within {START_SECONDS:.0f} s"
                self.close()
                complaints.seek(0)
                said = complaints.read().strip().splitlines() or [ended]
                raise ValueError(
                    f"the math-verify worker does not start: {said[-1]}; "
                    f'`python -m cppo.rewards.verify_worker {MEMORY_BYTES}` must print "ready"'
                )

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None and self._owner == os.getpid():
            self._worker.kill()
            self._worker.communicate()
        self._worker = None


def _read_line(worker: subprocess.Popen[str], seconds: float) -> str | None:
    """The worker's next line; None when it takes longer or has died. A worker writes one short line per answer."""
    assert worker.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(worker.stdout, selectors.EVENT_READ)
        if not selector.select(seconds):
            return None
    return worker.stdout.readline() or None
