"""What a model writes is hostile: every verdict keeps its limits, and no text is run as code."""

import ast
import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.answers import SECOND, VERDICTS, Hostile, corpus, fuzz
from tiny import ROOT

from cppo.rewards import MEMORY_BYTES, Judge, boxes, fast_verdict
from cppo.rewards.verify_worker import HARMLESS, answer, in_a_child
from cppo.rewards.verify_worker import VERDICTS as VERDICTS_OF_CODES

ENTRIES = corpus()
LIBRARIES = (sys.base_prefix, sys.prefix, "<frozen ")
"""Where modules that are imported late come from."""


def test_the_corpus_is_large_and_names_are_distinct() -> None:
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES) >= 80
    assert {verdict for entry in ENTRIES for verdict in entry.expected} == set(VERDICTS.values())
    assert sum(fast_verdict(entry.response, entry.gold) is None for entry in ENTRIES) > 150


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Judge, Path, Path]]:
    """A judge whose forks report what looks like code being run; (judge, that report, the folder it works in)."""
    folder = tmp_path_factory.mktemp("watched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests" / "faults" / "watch"), str(ROOT)]))
        patch.setenv("CPPO_WATCHED", str(folder / "report"))
        work = folder / "work"
        work.mkdir()
        patch.chdir(work)
        with Judge() as judge:
            judge.start()
            yield judge, folder / "report", work


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_hostile_answers(watched: tuple[Judge, Path, Path], entry: Hostile) -> None:
    """The expected verdict, within a second; a bomb gets a ninth of its time here, which changes only how it ends."""
    judge, _, _ = watched
    bomb = "unjudged" in entry.expected
    judge.deadline = 0.1 if bomb else 30
    start = time.monotonic()
    found = VERDICTS[judge.verdict(entry.response, entry.gold)]
    assert found in entry.expected
    assert not bomb or time.monotonic() - start < SECOND


def test_no_text_was_run_as_code(watched: tuple[Judge, Path, Path]) -> None:
    """After the whole corpus: no file was made, and of what was compiled, only numbers came from answers.

    sympy makes its numbers with Python's `eval`: `Integer (7 )` is as far as an answer's text gets.
    """
    _, report, work = watched
    assert list(work.iterdir()) == []
    numbers, strange = 0, []
    for line in report.read_text().splitlines():
        event, _, what = line.partition(" ")
        if (
            event == "compile"
            and (source := ast.literal_eval(what)[0]) is not None
            and HARMLESS.fullmatch(source.strip())
        ):
            numbers += source.startswith(b"Integer")
        elif event != "exec" or not any(place in what for place in (*LIBRARIES, "<string>")):
            strange.append(line)
    assert strange == [] and numbers > 50


def test_the_watch_sees_code_that_is_run(tmp_path: Path) -> None:
    """Or the test above could not fail."""
    code = "import os\nif os.fork() == 0:\n    eval('7+0'); open('x', 'w'); os.system('true')\nelse:\n    os.wait()"
    watch = {"PYTHONPATH": str(ROOT / "tests" / "faults" / "watch"), "CPPO_WATCHED": str(tmp_path / "report")}
    subprocess.run([sys.executable, "-c", code], env=os.environ | watch, cwd=tmp_path, check=True)
    events = [line.split()[0] for line in (tmp_path / "report").read_text().splitlines()]
    assert {"compile", "exec", "open", "os.system"} <= set(events)


def test_boxes() -> None:
    """Outermost ones, braces matched and escaped ones skipped; a megabyte takes no time."""
    assert boxes(r"a \boxed{\{1\}} b \boxed {\frac{1}{2}} \boxed{\boxed{3}} \boxed{4") == [
        r"\boxed{\{1\}}",
        r"\boxed {\frac{1}{2}}",
        r"\boxed{\boxed{3}}",
    ]
    assert boxes("\\boxed{" * 10_000) == boxes("\\boxed") == boxes("{7}") == boxes("") == []
    assert len(boxes("\\boxed{7}" * 100_000)) == 100_000


ATTACKS = {
    "code": "__import__('os').system('touch canary')",
    "harmless code": "7+0",
    "a call that looks like a number": "Integer(7)if[open('canary','w')]else(7)",
    "a lambda": "(lambda: 7)()",
}


@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS)
def test_a_verdict_that_evaluates_text_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """As if a later version of a library did so: the process ends before the text runs, and there is no verdict."""
    monkeypatch.chdir(tmp_path)

    def careless(response: str, gold: str) -> float:
        return float(eval(response) == eval(gold))

    assert in_a_child(careless, [text, "Integer (7 )", 30.0], MEMORY_BYTES) not in VERDICTS_OF_CODES
    assert list(tmp_path.iterdir()) == []


DEEDS: dict[str, Callable[[], object]] = {
    "write a file": lambda: Path("canary").write_text("x"),
    "run a program": lambda: subprocess.run(["touch", "canary"]),
    "run a shell": lambda: os.system("touch canary"),
    "make a folder": lambda: os.mkdir("canary"),
    "remove a file": lambda: os.remove("kept"),
    "fork": os.fork,
    "kill": lambda: os.kill(os.getppid(), signal.SIGUSR1),
    "connect": lambda: socket.create_connection(("localhost", 1)),
    "unpickle a function": lambda: pickle.loads(b"cos\nsystem\n(S'touch canary'\ntR."),
}


@pytest.mark.parametrize("deed", DEEDS.values(), ids=DEEDS)
def test_a_verdict_that_acts_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deed: Callable[[], object]
) -> None:
    """What code hidden in an answer would be for; one that does nothing of it gives its verdict."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept").touch()

    def acting(response: str, gold: str) -> float:
        with contextlib.suppress(Exception):
            deed()
        return 1.0

    assert in_a_child(acting, ["", "", 30.0], MEMORY_BYTES * 1000) not in VERDICTS_OF_CODES
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert in_a_child(lambda response, gold: 1.0, ["", "", 30.0], MEMORY_BYTES * 1000) == 11


def deep(level: int) -> int:
    return 1 + deep(level + 1)


EXHAUSTING: dict[str, Callable[[], object]] = {
    "stack": lambda: deep(0),
    "memory": lambda: bytes(2**50),
    "big number": lambda: 1 << 2**45,
}


@pytest.mark.parametrize("work", EXHAUSTING.values(), ids=EXHAUSTING)
def test_wrong_for_want_of_memory_is_not_wrong(work: Callable[[], object]) -> None:
    """Also where the library catches the error and answers "not equal"; what is right is right, and other errors are wrong."""

    def verdict(result: float, doing: Callable[[], object]) -> Callable[[str, str], float]:
        def careless(response: str, gold: str) -> float:
            with contextlib.suppress(Exception):
                doing()
            return result

        return careless

    assert answer(verdict(0.0, work), "", "") is None
    assert answer(verdict(1.0, work), "", "") == 1.0
    assert answer(verdict(0.0, lambda: 1 / 0), "", "") == 0.0
    assert answer(lambda response, gold: float(bool(work())), "", "") is None
    assert sys.gettrace() is None


def test_a_hundred_fuzzed_answers() -> None:
    """The short version of `make faults`: time and memory in a process of its own."""
    tally = fuzz(100)
    assert tally.count == 100 and tally.asked > 50 and all(tally.verdicts.values())
    assert tally.slowest < 1.5 * SECOND  # this machine may be busy; make faults insists on one second
    assert tally.peak < MEMORY_BYTES
