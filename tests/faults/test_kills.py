"""The short version of `make faults`: a SIGKILL in every phase, and the check that a difference would be seen."""

from typing import Any

import pytest
from faults import kills

import cppo.train


def test_a_run_killed_in_every_phase_equals_one_never_stopped(whole: kills.Reference) -> None:
    tally, differences = kills.run(whole, count=8, seed=0)
    assert differences == []
    assert sum(n for (_, outcome), n in tally.items() if outcome == "killed") >= 8


def test_a_difference_would_be_seen(whole: kills.Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that forgets its optimiser's state on resuming is caught."""

    def forget(*args: Any) -> None:
        pass

    monkeypatch.setattr(cppo.train, "restore_optimizer", forget)
    _, differences = kills.run(whole, count=3, seed=1)
    assert any(line.endswith("metrics.jsonl") for line in differences)
    assert any("checkpoints/step-6/model.safetensors" in line for line in differences)
