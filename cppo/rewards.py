"""Verdicts on model answers: right (1.0), wrong (0.0), or could not judge (None: counted, never taken as wrong).

The answer is what stands in the response's box (`\\boxed{...}`); a response without one is wrong, one that merely contains
the number is too. Plain integers are compared here; everything else goes to math-verify in a child process with a memory
limit, which is killed when it misses its deadline: a model's text can keep a computer-algebra system busy for ever.
Verdict and text cross the pipe as JSON lines; nothing is unpickled or evaluated.
"""

import json
import re
import selectors
import subprocess
import sys
from dataclasses import dataclass, field
from types import TracebackType

DEADLINE_SECONDS = 1.0
"""Longest wall time for one verdict."""
START_SECONDS = 60.0
"""Longest wall time for a worker to start (it imports sympy)."""
MEMORY_BYTES = 2**30
"""Address space of a worker."""
CACHED = 100_000
"""Verdicts that are remembered."""
MAX_CHARACTERS = 20_000
"""A longer answer is not judged (None): a genuine boxed answer is short."""

_INTEGER = re.compile(r"\\boxed\{\s*([-+]?\d{1,18})\s*\}")
_PLAIN = re.compile(r"[-+]?\d{1,18}")


def fast_verdict(response: str, gold: str) -> float | None:
    """The verdict where no mathematics is needed; None = ask math-verify.

    >>> fast_verdict(r"3+4=7\\boxed{7}", "7"), fast_verdict("7", "7"), fast_verdict(r"\\boxed{14/2}", "7")
    (1.0, 0.0, None)
    """
    boxes = response.count("\\boxed")
    if boxes == 0:
        return 0.0
    found = _INTEGER.findall(response)
    if boxes == 1 and len(found) == 1 and _PLAIN.fullmatch(gold):
        return float(int(found[0]) == int(gold))
    return None


def overlong_penalty(length: int, longest: int, buffer: int) -> float:
    """What DAPO adds to the reward of a response of `length` tokens: 0, then falling to -1 over the last `buffer` tokens.

    Source: DAPO (arXiv:2503.14476), soft overlong punishment.

    >>> [overlong_penalty(n, 20480, 4096) for n in (16384, 18432, 20480)]
    [0.0, -0.5, -1.0]
    """
    return min(0.0, max(-1.0, (longest - buffer - length) / buffer))


@dataclass
class Judge:
    """Judges responses one after the other; owns one worker, started when first needed. Use as a context manager."""

    deadline: float = DEADLINE_SECONDS
    killed: int = 0
    """Workers killed or lost so far; each left one response unjudged."""
    _worker: subprocess.Popen[str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._known: dict[tuple[str, str], float] = {}

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def verdict(self, response: str, gold: str) -> float | None:
        """1.0 right, 0.0 wrong, None could not judge. Both are plain text; the gold answer without its box."""
        fast = fast_verdict(response, gold)
        if fast is not None:
            return fast
        if len(response) > MAX_CHARACTERS:
            return None
        key = (response, gold)
        if key not in self._known:
            found = self._ask(response, gold)
            if found is None:
                return None  # not remembered: a busy machine may have caused it
            if len(self._known) >= CACHED:
                self._known.clear()
            self._known[key] = found
        return self._known[key]

    def _ask(self, response: str, gold: str) -> float | None:
        worker = self._running()
        assert worker.stdin is not None
        try:
            worker.stdin.write(json.dumps([response, gold]) + "\n")
            worker.stdin.flush()
        except BrokenPipeError:
            self._lost()
            return None
        line = _read_line(worker, self.deadline)
        if line is None:
            self._lost()
            return None
        verdict = json.loads(line)
        return None if verdict is None else float(verdict)

    def _running(self) -> subprocess.Popen[str]:
        if self._worker is None:
            self._worker = subprocess.Popen(
                [sys.executable, "-m", "cppo.verify_worker", str(MEMORY_BYTES)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
            if _read_line(self._worker, START_SECONDS) is None:
                self.close()
                raise RuntimeError(
                    "the math-verify worker did not start; run `python -m cppo.verify_worker` to see why"
                )
        return self._worker

    def _lost(self) -> None:
        """Replace a worker that missed its deadline or died; its response stays unjudged."""
        self.killed += 1
        self.close()

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None


def _read_line(worker: subprocess.Popen[str], seconds: float) -> str | None:
    """The worker's next line; None when it takes longer or has died. A worker writes one short line an answer."""
    assert worker.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(worker.stdout, selectors.EVENT_READ)
        if not selector.select(seconds):
            return None
    return worker.stdout.readline() or None
