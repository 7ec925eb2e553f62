"""SIGKILL at random moments of every phase of a run; what it leaves, continued, must equal what was never stopped.

    python tests/faults/kills.py --kills 60 --seed 0         the long version (make faults); exit code 1 on a difference

Each trial takes a fresh copy of the data and the base model through training, evaluation and collection, by the package's
own command line. Commands run in forked processes; a timer in the child sends SIGKILL to itself a random time after a call of
the phase's function begins, within about the duration that this call had when it was not disturbed. Then the same command is
given again, with the next kill waiting, until it ends by itself.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faults.workshop import RULES, Workshop, digests, leftovers
from tqdm import tqdm

import cppo.evaluation.evaluate
import cppo.results.tables
import cppo.system.files
import cppo.training.train
from cppo.__main__ import main
from cppo.rollout.torch_engine import TorchEngine

PHASES: dict[str, tuple[str, Any, str]] = {
    "rollout": ("train", TorchEngine, "generate"),
    "update": ("train", cppo.training.train.Trainer, "update"),
    "metrics write": ("train", cppo.training.train.Trainer, "append"),
    "checkpoint write": ("train", cppo.training.train.Trainer, "save"),
    "resume": ("train", cppo.training.train.Trainer, "resume"),
    "evaluation": ("evaluate", cppo.evaluation.evaluate, "_score"),
    "scores write": ("evaluate", cppo.evaluation.evaluate, "write_scores"),
    "collect": ("collect", cppo.results.tables, "_write"),
}
"""Where kills strike: the command, and the owner and the name of the function that is the phase."""


@dataclass(frozen=True)
class Kill:
    """SIGKILL `delay` seconds after the `call`-th call of a phase begins."""

    phase: str
    call: int
    delay: float


def plan(command: str, rng: random.Random, spans: dict[str, list[float]]) -> list[Kill]:
    """A kill in each phase of the command, in random order, at random calls and moments.

    spans: durations of the undisturbed calls. Calls are among the first third of them, so that some are left for the next kill.
    """
    kills = []
    for phase in (name for name, (owner, _, _) in PHASES.items() if owner == command):
        call = rng.randrange(-(-len(spans[phase]) // 3))
        kills.append(Kill(phase, call, rng.uniform(0, 1.1 * spans[phase][call])))
    rng.shuffle(kills)
    return kills


def in_child(work: Callable[[], int]) -> int:
    """The exit code of `work` in a forked process; -9 when it was killed."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        # tqdm's own lock is shared by forks: one that is killed while it holds it would stop all later ones.
        tqdm.set_lock(threading.RLock())
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        os._exit(work())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def armed(kill: Kill | None) -> None:
    """Make this process kill itself as told."""
    if kill is None:
        return
    _, owner, name = PHASES[kill.phase]
    original, calls = getattr(owner, name), 0

    @wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if calls == kill.call:
            threading.Timer(kill.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        calls += 1
        return original(*args, **kwargs)

    setattr(owner, name, watched)


def undisturbed(shop: Workshop, root: Path) -> dict[str, list[float]]:
    """Run everything in `root`; phase -> the durations of its calls in the first command that has it."""
    spans: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for command in shop.everything(root):
        fresh = [phase for phase, (owner, _, _) in PHASES.items() if owner == command[0] and not spans[phase]]
        originals = {phase: getattr(*PHASES[phase][1:]) for phase in fresh}
        for phase, original in originals.items():

            @wraps(original)
            def timed(*args: Any, _original: Any = original, _phase: str = phase, **kwargs: Any) -> Any:
                start = time.perf_counter()
                try:
                    return _original(*args, **kwargs)
                finally:
                    spans[_phase].append(time.perf_counter() - start)

            setattr(*PHASES[phase][1:], timed)
        try:
            assert main(command) == 0, command
        finally:
            for phase, original in originals.items():
                setattr(*PHASES[phase][1:], original)
    return spans


def trial(shop: Workshop, root: Path, rng: random.Random, spans: dict[str, list[float]]) -> list[tuple[str, str]]:
    """Take `root` to its tables through kills in every phase; (phase, killed or passed: it was over before) of each."""
    outcomes = []
    for command in shop.everything(root):
        waiting: list[Kill | None] = [*plan(command[0], rng, spans), None]
        code = -int(signal.SIGKILL)
        for kill in waiting:

            def work(command: list[str] = command, kill: Kill | None = kill) -> int:
                armed(kill)
                return main(command)

            if code != 0:
                code = in_child(work)
            assert code in (0, -signal.SIGKILL), f"{command}: exit code {code} after {outcomes}"
            if kill is not None:
                outcomes.append((kill.phase, "passed" if code == 0 else "killed"))
        assert code == 0, f"{command}: killed without being told to"
    return outcomes


@dataclass(frozen=True)
class Reference:
    """What was never stopped."""

    shop: Workshop
    spans: dict[str, list[float]]
    expected: dict[str, str]


def reference(shop: Workshop) -> Reference:
    """Run everything undisturbed."""
    root = shop.copy("reference")
    return Reference(shop, undisturbed(shop, root), digests(root))


def run(whole: Reference, count: int, seed: int) -> tuple[Counter[tuple[str, str]], list[str]]:
    """At least `count` SIGKILLs that struck; (phase, outcome) -> how often, and what differed from the undisturbed root."""
    tally: Counter[tuple[str, str]] = Counter()
    differences = []
    number = 0
    while sum(n for (_, outcome), n in tally.items() if outcome == "killed") < count:
        root = whole.shop.copy(f"trial{seed}-{number}")
        tally.update(trial(whole.shop, root, random.Random(f"{seed}/{number}"), whole.spans))
        expected, found = whole.expected, digests(root)
        for name in sorted(set(expected) | set(found)):
            if expected.get(name) != found.get(name):
                differences.append(f"trial {number}: {name}")
        differences += [f"trial {number}: left {name}" for name in leftovers(root)]
        number += 1
    return tally, differences


def script() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=60, help="how many SIGKILLs must strike")
    parser.add_argument("--seed", type=int, default=0, help="of phases and moments")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally, differences = run(reference(Workshop(Path(folder), RULES)), args.kills, args.seed)
    print("| phase | SIGKILLs | phase over before the moment |\n|---|---|---|")
    for phase in PHASES:
        print(f"| {phase} | {tally[phase, 'killed']} | {tally[phase, 'passed']} |")
    print(f"{sum(n for (_, o), n in tally.items() if o == 'killed')} SIGKILLs, {len(differences)} differences")
    for line in differences:
        print(f"DIFFERENT {line}")
    return int(bool(differences))


if __name__ == "__main__":
    sys.exit(script())
