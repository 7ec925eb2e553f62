"""Damaged rows, tables and configurations: one line naming file and place, exit code 2, and nothing is written."""

import json
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.suites import tree
from faults.workshop import Workshop
from tiny import smoke

from cppo import rewards
from cppo.__main__ import main
from cppo.evaluation import lm_eval_task as lm_task
from cppo.results.tables import TIMES
from cppo.rewards import Judge
from cppo.suite.config import RunConfig
from cppo.tasks.types import read_problems, write_problems

WRONG: list[Any] = [None, True, "x", "", [], {}, [1], 10**400, "\0", "1e5", {"a": 1}]
"""Values that are neither a number that a table holds, nor a name that means something."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A run from its data to its tables."""
    shop = Workshop(tmp_path_factory.mktemp("finished"), ("cppo",))
    for command in shop.everything(shop.clean):
        assert main(command) == 0
    return shop


@pytest.fixture
def run(finished: Workshop, tmp_path: Path) -> tuple[Workshop, Path, RunConfig]:
    """A fresh copy: (workshop, root, the run)."""
    return finished, finished.copy_to(tmp_path / "runs"), finished.run("cppo")


def refused(capsys: pytest.CaptureFixture[str], root: Path, command: list[str], path: Path, *parts: str) -> None:
    """The command's exit code is 2, its last line names the file and these parts, and no file under root has changed."""
    capsys.readouterr()
    before = tree(root)
    assert main(command) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("cppo: ")]
    assert "Traceback" not in err and len(lines) == 1, err
    assert lines[0].startswith(f"cppo: error: {path}") and all(part in lines[0] for part in parts), lines
    assert len(lines[0]) < 600
    assert tree(root) == before


def mutations(rows: list[dict[str, Any]], rng: random.Random) -> Iterator[tuple[int, str, Any]]:
    """Every key once with a wrong value: (row, key, value)."""
    for key in rows[0]:
        yield rng.randrange(len(rows)), key, rng.choice([value for value in WRONG if value != rows[0][key]])


DAMAGE = [b"", b"{", b"[" * 100_000, b"\xff\xfe\x00", b"\x80\x04.", b"3\n", b"null\n", b"[]\n"]


@pytest.mark.parametrize("stream", ["metrics", "timings", "positions", "tokens"])
def test_streams(run: tuple[Workshop, Path, RunConfig], capsys: pytest.CaptureFixture[str], stream: str) -> None:
    """Line and key are named for every key of every stream."""
    shop, root, config = run
    path = root / config.folder / f"{stream}.jsonl"
    whole = path.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    collect = shop.everything(root)[-1]
    for number, key, value in mutations(rows, random.Random(stream)):
        if value is None and key not in ("iteration", *TIMES):
            value = "x"  # a metric or a rate may be missing
        changed = [row | ({key: value} if i == number else {}) for i, row in enumerate(rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in changed))
        refused(capsys, root, collect, path, f":{number + 1}: ", key)
    for content in DAMAGE[1:]:
        path.write_bytes(whole.encode() + content)
        refused(capsys, root, collect, path)
    path.unlink()
    refused(capsys, root, collect, path, "missing")


@pytest.mark.parametrize("column", ["seed", "iteration", "correct", "samples", "unjudged", "mean_length", "truncated"])
def test_scores(run: tuple[Workshop, Path, RunConfig], capsys: pytest.CaptureFixture[str], column: str) -> None:
    """In the table of a run, and in the rows of one checkpoint that an interrupted evaluation left."""
    shop, root, config = run
    _, evaluate, collect = shop.everything(root)
    folder = root / config.folder
    for path, command in ((folder / "scores.csv", collect), (folder / "scores" / "iteration-1.csv", evaluate)):
        whole = path.read_text()
        lines = whole.splitlines()
        cells = lines[2].split(",")
        for wrong in ("x", "1;2", "0x1", "--1", "nope\u2028"):
            cells[lines[0].split(",").index(column)] = wrong
            path.write_text("\n".join([*lines[:2], ",".join(cells), *lines[3:]]) + "\n")
            refused(capsys, root, command, path, ":3: ", column)
        path.write_text(whole)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"a,b\n1,2\n", b"\0" * 50, b'"', b"{}"], ids=repr)
def test_files_that_are_no_scores(
    run: tuple[Workshop, Path, RunConfig], capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    shop, root, config = run
    _, evaluate, collect = shop.everything(root)
    folder = root / config.folder
    for path, command in ((folder / "scores.csv", collect), (folder / "scores" / "iteration-1.csv", evaluate)):
        whole = path.read_bytes()
        path.write_bytes(content)
        refused(capsys, root, command, path)
        path.write_bytes(whole)


def test_configurations_of_run_directories(
    run: tuple[Workshop, Path, RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluation reads config.json, tables read DONE and provenance.json."""
    shop, root, config = run
    _, evaluate, collect = shop.everything(root)
    folder = root / config.folder
    for name, command in (("config.json", evaluate), ("DONE", collect), ("provenance.json", collect)):
        path = folder / name
        whole = path.read_bytes()
        for content in DAMAGE:
            path.write_bytes(content)
            refused(capsys, root, command, path)
        raw = json.loads(whole)
        for key in raw if name != "provenance.json" else ():
            for value in ("x" * 10_000, [], {"a": {}}, -1, math.nan, None):
                if name == "DONE" and type(value) is type(raw[key]):
                    continue
                path.write_text(json.dumps(raw | {key: value}))
                refused(capsys, root, command, path)
        path.write_bytes(whole)


def test_problem_files_of_lm_eval(run: tuple[Workshop, Path, RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    """A benchmark's problems are read through lm-eval: its error is ours, with file and line."""
    shop, root, config = run
    evaluate = shop.everything(root)[1]
    for part in (root / config.folder / "scores").iterdir():
        part.unlink()
    path = shop.clean / config.base.data / "chain1.jsonl"  # the task files name the problems where they were made
    whole = path.read_text()
    lines = whole.splitlines()
    edited = lines[1].replace('"answer": "', '"answer": "1')
    for bad, says in (("{", "not a JSON object"), (json.dumps({"question": "x"}), "fields"), (edited, "edited")):
        path.write_text("\n".join([lines[0], bad, *lines[2:]]) + "\n")
        refused(capsys, root, evaluate, path, ":2: ", says)
    path.write_text(whole)


def test_problem_rows(tmp_path: Path) -> None:
    """A hundred mutations of a row's text: each is refused naming file and line, or is the same row."""
    sets, _ = smoke(tmp_path).settings["tiny"].task.load("tiny")
    rows = sets["train"][:3]
    path = tmp_path / "train.jsonl"
    write_problems(rows, path)
    lines = path.read_text().splitlines()
    rng = random.Random(0)
    refusals = 0
    for _ in range(100):
        start = rng.randrange(len(lines[1]))
        new = rng.choice(["", '"', "\\", "{", "[", "9", "e9", ",", "\x00", "é", "\ud800", "null", " "])
        bad = lines[1][:start] + new + lines[1][start + rng.randrange(3) :]
        path.write_text("\n".join([lines[0], bad, lines[2]]) + "\n", encoding="utf-8", errors="surrogatepass")
        try:
            assert read_problems(path)[::2] == rows[::2] and read_problems(path)[1].id == rows[1].id
        except ValueError as error:
            message = str(error)
            assert (
                message.startswith(str(path)) and len(message.splitlines()) == 1 and len(message) < len(str(path)) + 250
            )
            assert ":2: " in message or "UTF-8" in message
            refusals += 1
    assert refusals > 50


# The worker that judges -----------------------------------------------------------------------------------------------


BROKEN = {
    "import": ("raise ImportError('antlr4 is of another version')", "antlr4 is of another version"),
    "memory": (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**25, 2**25))\nbytearray(2**26)",
        "MemoryError",
    ),
    "kill": ("import os\nos.kill(os.getpid(), 9)", "ended without a word"),
    "hang": ("import time\ntime.sleep(600)", "not ready within 2 s"),
}
"""What math-verify's own module does instead: (its code, what the error says)."""


@pytest.mark.parametrize(("code", "says"), BROKEN.values(), ids=BROKEN)
def test_a_judge_that_cannot_start(
    run: tuple[Workshop, Path, RunConfig],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    code: str,
    says: str,
) -> None:
    """Training and evaluation end before anything is computed or written: one line, exit code 2."""
    shop, root, config = run
    train, evaluate, _ = shop.everything(root)
    broken = tmp_path / "broken" / "math_verify"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(broken.parent), prepend=os.pathsep)
    if "sleep" in code:
        monkeypatch.setattr(rewards, "START_SECONDS", 2.0)
    lm_task.judge().close()
    (root / config.folder / "DONE").unlink()
    for command in (train, evaluate):
        capsys.readouterr()
        before = tree(root)
        assert main(command) == 2
        err = capsys.readouterr().err
        lines = [line for line in err.splitlines() if line.startswith("cppo: ")]
        assert len(lines) == 1 and "Traceback" not in err
        assert lines[0].startswith("cppo: error: the math-verify worker does not start: ") and says in lines[0]
        assert tree(root) == before
    monkeypatch.undo()
    with Judge(deadline=30) as judge:
        assert judge.verdict(r"\boxed{14/2}", "7") == 1.0
