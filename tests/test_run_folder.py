"""The folder of a run: its layout, what it was begun with, how it ended, and work of another numerics version."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from faults.kills import in_child
from faults.workshop import Workshop, digests
from tiny import ROOT, run_of, smoke

import cppo.results.run_folder
from cppo.__main__ import main
from cppo.results.provenance import provenance
from cppo.results.run_folder import STREAMS, RunFolder, Status
from cppo.suite.config import RunConfig


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    return run_of(smoke(tmp_path), "pg")


@pytest.fixture
def folder(run: RunConfig, tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / run.folder)


# Layout ----------------------------------------------------------------------------------------------------------------


def test_the_layout(folder: RunFolder, run: RunConfig) -> None:
    """What the workflow, the documentation and people count on."""
    folder.begin(run, provenance(), begun=False)
    for name in STREAMS:
        folder.append(name, [{"iteration": 1}])
    for iteration in (10, 2):
        with folder.new_checkpoint(iteration) as checkpoint:
            (checkpoint / "config.json").touch()
        folder.scores_of(iteration).parent.mkdir(exist_ok=True)
        folder.scores_of(iteration).touch()
    folder.scores.touch()
    folder.state.mkdir()
    folder.finish(Status(10), problems=3)
    files = {path.relative_to(folder.path).as_posix() for path in folder.path.rglob("*") if path.is_file()}
    assert files == {
        *("config.json", "provenance.json", "DONE", "scores.csv"),
        *("metrics.jsonl", "timings.jsonl", "positions.jsonl", "tokens.jsonl"),
        *("checkpoints/iteration-2/config.json", "checkpoints/iteration-10/config.json"),
        *("scores/iteration-2.csv", "scores/iteration-10.csv"),
    }
    assert folder.config() == run and folder.provenance() == provenance()
    assert list(folder.checkpoints()) == [2, 10]  # by number, not by text
    assert folder.checkpoints()[10] == folder.checkpoint(10)
    assert folder.scored() == [folder.scores_of(2), folder.scores_of(10)]
    assert folder.done and folder.status() == Status(10)
    assert (folder.path / "DONE").read_text() == '{"iterations": 10, "collapsed_at": null, "problems": 3}\n'


def test_a_half_made_checkpoint_is_none(folder: RunFolder) -> None:
    (folder.path / "checkpoints" / "iteration-4.partial").mkdir(parents=True)
    assert folder.checkpoints() == {}
    with pytest.raises(RuntimeError), folder.new_checkpoint(4):
        raise RuntimeError
    assert list((folder.path / "checkpoints").iterdir()) == []


def test_streams_only_grow(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True)
    folder.append("metrics", [{"a": 1}, {"a": float("nan")}])
    folder.append("metrics", [])
    folder.append("metrics", [{"a": 2}])
    assert folder.stream("metrics").read_text() == '{"a": 1}\n{"a": NaN}\n{"a": 2}\n'


# What it is ------------------------------------------------------------------------------------------------------------


def test_another_configuration_than_the_names_is_refused(folder: RunFolder, run: RunConfig) -> None:
    with pytest.raises(ValueError, match=r"config\.json: missing; train the run"):
        folder.config()
    folder.begin(run.model_copy(update={"seed": 7}), provenance(), begun=False)
    with pytest.raises(ValueError, match=r"config\.json: its hash is \w+, not the folder's name: the file was edited"):
        folder.config()


def test_saved_work_is_continued_with_the_packages_that_it_was_begun_with(folder: RunFolder, run: RunConfig) -> None:
    """A commit may differ: the numerics version and the versions of packages decide."""
    folder.begin(run, provenance() | {"torch": "1.0"}, begun=False)
    with pytest.raises(
        ValueError, match=r"it was begun with torch 1\.0, this is \S+; go back to that version"
    ) as error:
        folder.begin(run, provenance(), begun=True)
    assert "\n" not in str(error.value) and folder.provenance()["torch"] == "1.0"
    folder.begin(run, provenance() | {"commit": "elsewhere"}, begun=False)  # nothing was saved yet
    folder.begin(run, provenance(), begun=True)
    assert folder.provenance() == provenance()


# How it ended ----------------------------------------------------------------------------------------------------------


def test_how_a_run_ended(folder: RunFolder) -> None:
    assert not folder.done
    with pytest.raises(ValueError, match=r"DONE: missing or not JSON"):
        folder.status()
    for status, state in ((Status(4), "finished"), (Status(3, collapsed_at=3), "collapsed")):
        folder.finish(status)
        assert folder.done and folder.status() == status and status.state == state


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "iterations is missing; train the run again"),
        ('{"status": "collapsed at step 3", "iterations": 3}', "collapsed_at is missing; train the run again"),
        ('{"iterations": true, "collapsed_at": null}', "iterations: expected a whole number, got True"),
        ('{"iterations": 3, "collapsed_at": 2.5}', r"collapsed_at: expected a whole number, got 2\.5"),
        ('{"iterations": 3, "collapsed_at": "3"}', "collapsed_at: expected a whole number, got '3'"),
        ('{"iter', "missing or not JSON"),
        ("[3]", "not a JSON object"),
    ],
)
def test_a_damaged_end_names_file_and_key(folder: RunFolder, text: str, message: str) -> None:
    folder.finish(Status(3))
    (folder.path / "DONE").write_text(text)
    with pytest.raises(ValueError, match=rf"DONE: {message}") as error:
        folder.status()
    assert "\n" not in str(error.value)


# Numerics --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"), ("pg",))


def outdate(folder: RunFolder, version: str = "0") -> None:
    """Make the folder one that another numerics version made."""
    path = folder.path / "provenance.json"
    path.write_text(json.dumps(folder.provenance() | {"numerics": version}))


def contents(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(folder).items() if name != "provenance.json"}


def test_work_of_another_numerics_version_is_refused_everywhere(
    shop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    """By training (a run that is finished, and one to continue), evaluation and collecting; and nothing is touched."""
    root = shop.copy("refused")
    train, evaluate, collect = shop.everything(root)
    run = RunFolder(root / shop.run("pg").folder)
    assert main(train) == main(evaluate) == 0
    outdate(run)
    told = f"cppo: error: {run.path}: it was made by numerics version 0, this code has version "
    before = digests(root)
    for command in (train, evaluate, collect):
        capsys.readouterr()
        assert main(command) == 2
        err = capsys.readouterr().err
        assert err.startswith(told) and err.endswith("; run `snakemake`, or delete the folder, and it is made again\n")
        assert err.count("\n") == 1
    (run.path / "DONE").unlink()
    assert main(train) == 2 and capsys.readouterr().err.startswith(told)
    (run.path / "DONE").write_text('{"iterations": 6, "collapsed_at": null}\n')
    assert digests(root) == before


def test_work_from_before_versions_were_counted_is_of_version_0(
    shop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shop.copy("uncounted")
    run = RunFolder(root / shop.run("pg").folder)
    assert main(shop.everything(root)[0]) == 0
    path = run.path / "provenance.json"
    path.write_text(json.dumps({"code_version": "0123456789"}))
    assert main(shop.everything(root)[0]) == 2
    assert "it was made by numerics version 0, this code" in capsys.readouterr().err


def test_restarting_moves_outdated_work_aside_and_trains_anew(
    shop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    """The old run is whole in a folder beside the new one, which equals one that was never outdated."""
    root = shop.copy("restarted")
    train, evaluate, _ = shop.everything(root)
    run = RunFolder(root / shop.run("pg").folder)
    assert main(train) == main(evaluate) == 0
    whole, before = digests(run.path), contents(run.path)
    for number, aside in enumerate((f"{run.path.name}.numerics-0", f"{run.path.name}.numerics-0.2"), start=1):
        outdate(run)
        capsys.readouterr()
        assert main([*train, "--restart-outdated"]) == main(evaluate) == 0
        assert f"this code has version 1; its content goes to {run.path.with_name(aside)}\n" in capsys.readouterr().err
        assert digests(run.path) == whole
        assert contents(run.path.with_name(aside)) == before
        assert len(list(run.path.parent.iterdir())) == 1 + number  # nothing else, and nothing was overwritten
    assert main([*train, "--restart-outdated"]) == 0  # of this version now: it stays
    assert digests(run.path) == whole


def test_an_outdated_base_model_is_refused_and_restarted(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    root = shop.copy("base")
    base = RunFolder(root / shop.suite.bases()[0].folder)
    before = contents(base.path)
    outdate(base)
    make = ["base", "--suite", str(shop.file), "--root", str(root), "--setting", "tiny"]
    for command in (shop.everything(root)[0], make):
        assert main(command) == 2
        assert f"{base.path}: it was made by numerics version 0" in capsys.readouterr().err
    assert main([*make, "--restart-outdated"]) == 0
    assert contents(base.path.with_name(f"{base.path.name}.numerics-0")) == before
    assert main(["evaluate", str(base.path)]) == 0
    assert contents(base.path) == before


@pytest.mark.parametrize("moved", [0, 1, 4])
def test_a_move_that_was_killed_is_continued(moved: int, shop: Workshop) -> None:
    """SIGKILL after so many of the files were moved: the same command moves the rest to the same folder."""
    root = shop.copy(f"killed-{moved}")
    train = [*shop.everything(root)[0], "--restart-outdated"]
    run = RunFolder(root / shop.run("pg").folder)
    assert main(train) == 0
    whole, before = digests(run.path), contents(run.path)
    outdate(run)

    def killed() -> int:
        rename, calls = Path.rename, itertools.count()

        def last(self: Path, target: Path) -> Path:
            if ".numerics-" in str(target) and next(calls) == moved:
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(self, target)

        Path.rename = last  # type: ignore[method-assign,assignment]
        return main(train)

    assert in_child(killed) == -signal.SIGKILL
    aside = run.path.with_name(f"{run.path.name}.numerics-0")
    assert len(list(aside.iterdir())) == moved and (run.path / "provenance.json").exists()
    with pytest.raises(ValueError, match="it was made by numerics version 0"):
        run.check_numerics()
    assert main(train) == 0
    assert digests(run.path) == whole and contents(aside) == before


def test_the_lock_stays_while_work_is_moved_aside(folder: RunFolder, run: RunConfig) -> None:
    folder.begin(run, provenance(), begun=False)
    outdate(folder)
    (folder.path / "LOCK").write_text("held")
    folder.check_numerics(restart=True)
    assert [path.name for path in folder.path.iterdir()] == ["LOCK"]


def test_two_ranks_agree_that_a_moved_run_is_not_done(shop: Workshop) -> None:
    """The main process takes its time to move the finished run aside. The other one must not see it as done meanwhile."""
    root = shop.copy("ranks")
    train = [*shop.everything(root)[0], "--restart-outdated"]
    run = RunFolder(root / shop.run("pg").folder)
    assert main(train) == 0
    outdate(run)
    slow = "import os, time, runpy, sys; from pathlib import Path; from cppo.results.run_folder import RunFolder as F\n"
    slow += "check = F.check_numerics\n"
    slow += "F.check_numerics = lambda s, **o: (time.sleep(3 * ('train' in str(s.path))), check(s, **o))[1]\n"
    slow += "from cppo.__main__ import main; sys.exit(main(sys.argv[1:]))\n"
    script = root / "slow.py"
    script.write_text(slow)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launch, str(script), *train], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert run.done and run.provenance()["numerics"] == str(cppo.results.run_folder.NUMERICS_VERSION)
    assert re.search(r"its content goes to \S+\.numerics-0\n", done.stderr)
