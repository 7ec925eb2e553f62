"""The short version of `make faults`: a SIGKILL in every phase, and the check that a difference would be seen."""

import pytest
from faults import kills

from cppo.training.distributed import Learner


def test_a_run_killed_in_every_phase_equals_one_never_stopped(whole: kills.Reference) -> None:
    tally, differences = kills.run(whole, count=8, seed=0)
    assert differences == []
    assert sum(n for (_, outcome), n in tally.items() if outcome == "killed") >= 8


def test_a_difference_would_be_seen(whole: kills.Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that forgets its optimiser's state on resuming is caught."""

    load = Learner.load
    monkeypatch.setattr(Learner, "load", lambda self, weights, state: load(self, weights, {}))
    _, differences = kills.run(whole, count=3, seed=1)
    assert any(line.endswith("metrics.jsonl") for line in differences)
    assert any("checkpoints/iteration-6/model.safetensors" in line for line in differences)
