"""What a model writes is hostile: every verdict keeps its limits, and no text is run as code."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.answers import SECOND, VERDICTS, Hostile, corpus, fuzz
from tiny import ROOT

from cppo.rewards import MEMORY_BYTES, Judge, fast_verdict
from cppo.verify_worker import boxes

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
    """The expected verdict, within a second; a bomb gets a fifth of its time here, which changes only how it ends."""
    judge, _, _ = watched
    bomb = "unjudged" in entry.expected and len(entry.expected) == 2
    judge.deadline = 0.2 if bomb else 30
    start = time.monotonic()
    found = VERDICTS[judge.verdict(entry.response, entry.gold)]
    assert found in entry.expected
    assert not bomb or time.monotonic() - start < SECOND


def test_no_text_was_run_as_code(watched: tuple[Judge, Path, Path]) -> None:
    """After the whole corpus: no file was made, and nothing but the libraries' own modules was compiled or executed."""
    _, report, work = watched
    assert list(work.iterdir()) == []
    lines = report.read_text().splitlines() if report.exists() else []
    strange = [line for line in lines if not any(library in line for library in LIBRARIES)]
    assert strange == []


def test_the_watch_sees_code_that_is_run(tmp_path: Path) -> None:
    """Or the test above could not fail."""
    code = "import os\nif os.fork() == 0:\n    eval('7+0'); open('x', 'w'); os.system('true')\nelse:\n    os.wait()"
    watch = {"PYTHONPATH": str(ROOT / "tests" / "faults" / "watch"), "CPPO_WATCHED": str(tmp_path / "report")}
    subprocess.run([sys.executable, "-c", code], env=os.environ | watch, cwd=tmp_path, check=True)
    events = [line.split()[0] for line in (tmp_path / "report").read_text().splitlines()]
    assert {"compile", "exec", "open", "os.system"} <= set(events)


def test_boxes() -> None:
    """Outermost ones, braces matched and escaped ones skipped; against a count of braces, character by character."""
    assert boxes(r"a \boxed{\{1\}} b \boxed {\frac{1}{2}} \boxed{\boxed{3}} \boxed{4") == [
        r"\boxed{\{1\}}",
        r"\boxed {\frac{1}{2}}",
        r"\boxed{\boxed{3}}",
    ]
    assert boxes("\\boxed{" * 10_000) == boxes("\\boxed") == boxes("{7}") == boxes("") == []


def test_a_hundred_fuzzed_answers() -> None:
    """The short version of `make faults`: time and memory in a process of its own."""
    tally = fuzz(100)
    assert tally.count == 100 and tally.asked > 60 and tally.verdicts["right"] and tally.verdicts["wrong"]
    assert tally.slowest < 1.5 * SECOND  # this machine may be busy; make faults insists on one second
    assert tally.peak < MEMORY_BYTES
