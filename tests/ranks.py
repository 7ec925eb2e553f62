"""What tests/test_distributed.py runs in each rank: `python -m torch.distributed.run ... ranks.py SUITE.yaml BASE OUT LABEL[@ITERATION] ...`

Trains the suite's runs of these labels, one after the other, into OUT/LABEL. With @ITERATION, the last rank alone gets
SIGTERM in that iteration.
"""

import os
import signal
import sys
from pathlib import Path

from accelerate.state import AcceleratorState

from cppo.config import load_suite
from cppo.interrupts import Interrupted
from cppo.problems import make_problems
from cppo.rewards import Judge
from cppo.train import Trainer, train


def reward(self: Judge, response: str, gold: str) -> float | None:
    """An untrained model solves nothing: by length instead; some problems are always wrong, few responses unjudged."""
    return None if len(response) % 7 == 6 else float(len(response) % 2 == 0 and gold < "6")


def stop_in(iteration: int) -> None:
    """Send SIGTERM to the last rank in that iteration."""
    original = Trainer.step

    def step(self: Trainer) -> None:
        original(self)
        if self.iteration == iteration and self.accelerator.is_last_process:
            os.kill(os.getpid(), signal.SIGTERM)

    Trainer.step = step  # type: ignore[method-assign]


def main(path: str, base: str, out: str, *labels: str) -> None:
    Judge.verdict = reward  # type: ignore[method-assign]
    suite = load_suite(path)
    for entry in labels:
        label, _, iteration = entry.partition("@")
        run = next(run for run in suite.runs() if run.label == label)
        if iteration:
            stop_in(int(iteration))
        try:
            train(run, Path(base), make_problems(run.plan.task, run.setting)["train"], Path(out) / label)
        except Interrupted:
            assert iteration
        AcceleratorState._reset_state(reset_partial_state=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
