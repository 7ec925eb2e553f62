"""Run in two processes by tests/test_distributed.py: `python -m torch.distributed.run ... ranks.py SUITE BASE OUT ENTRY ...`

An entry is SETTING/RULE, trained or continued in OUT/SETTING/RULE, one after the other. With @ITERATION the last rank
alone gets SIGTERM in that iteration.
"""

import os
import signal
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState

from cppo.rewards import Judge
from cppo.suite.suite import load_suite
from cppo.system.interrupts import Interrupted
from cppo.training.run import train
from cppo.training.train import Trainer


def reward(self: Judge, response: str, gold: str) -> float | None:
    """An untrained model solves nothing: by parity instead; some prompts are always wrong, some responses unjudged."""
    code = sum(map(ord, response))
    return None if code % 11 == 0 else float(code % 2 == 0 and gold != "7")


class Stopping(Trainer):
    """Sends SIGTERM to the last rank in an iteration."""

    iteration_to_stop = 0

    def step(self) -> None:
        super().step()
        if self.iteration == self.iteration_to_stop and self.accelerator.is_last_process:
            os.kill(os.getpid(), signal.SIGTERM)


def main(path: str, base: str, out: str, *entries: str) -> None:
    import cppo.training.run as module

    Judge.verdict, Judge.start = reward, lambda self: None  # type: ignore[method-assign]
    module.Trainer = Stopping  # type: ignore[misc]
    PartialState.destroy_process_group = lambda *_: None  # type: ignore[method-assign]  # the next entry uses it
    suite = load_suite(path)
    for entry in entries:
        name, _, stop = entry.partition("@")
        Stopping.iteration_to_stop = int(stop or 0)
        run = next(run for run in suite.runs() if f"{run.setting_name}/{run.rule_name}" == name)
        problems = run.setting.task.load(run.setting_name)[0]["train"]
        try:
            train(run, Path(base), problems, Path(out) / name, suite.report_to)
        except Interrupted:
            assert stop
        AcceleratorState._reset_state()  # another precision and sharding, the same processes


if __name__ == "__main__":
    main(*sys.argv[1:])
