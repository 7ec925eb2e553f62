"""The code makes the numbers that are stored in golden/: see `golden.py`, which also says what to do when it does not."""

import typing

import golden
import pytest
from golden import RULES, TRACES, differences, stored

from cppo import advantages, divergences
from cppo.loss import Aggregation
from cppo.numerics import NUMERICS_VERSION
from cppo.objectives import names
from cppo.suite.config import RuleEntry

EACH = [(file, name) for file, traces in TRACES.items() for name in traces]
UNMASKED = ("gpg", "pg", "cispo", "minpro", "sapo", "drpo", "spo")
"""Rules that mask no token."""


@pytest.mark.parametrize("file", TRACES)
def test_traces_belong_to_this_numerics_version(file: str) -> None:
    version = stored(file)["numerics"]
    assert version == NUMERICS_VERSION, (
        f"cppo/numerics.py says version {NUMERICS_VERSION}, golden/{file}.json is of version {version}: "
        "run `python tests/golden.py --write` and commit what it writes"
    )
    assert set(stored(file)["traces"]) == set(TRACES[file]), "run `python tests/golden.py --write` for new traces"


@pytest.mark.parametrize(("file", "name"), EACH, ids=[f"{file}: {name}" for file, name in EACH])
def test_numbers_are_the_stored_ones(file: str, name: str) -> None:
    if file == "trl":
        pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[trl]'")
    moved = differences(TRACES[file][name](), stored(file)["traces"][name])
    assert not moved, f"{len(moved)} numbers moved, the first: {moved[0]}: {golden.REMEDY}"


def test_runs_cover_every_choice_of_a_rule() -> None:
    """Every objective, advantage, aggregation, anchor and divergence of the package is in some run."""
    entries = [RuleEntry(name=name, **entry) for name, entry in RULES.items()]
    assert {entry.objective for entry in entries} == set(names())
    assert {entry.advantage for entry in entries} == set(advantages.names())
    assert {entry.aggregation for entry in entries} == set(typing.get_args(Aggregation))
    assert {entry.anchor for entry in entries} == {"rollout", "recomputed", "decoupled"}
    estimators = {entry.divergence.estimator for entry in entries if entry.divergence is not None}
    assert estimators == set(divergences.names())


def test_runs_show_something() -> None:
    """All updates have a gradient, answers of both kinds occur, and the rules that mask tokens do so."""
    for name, trace in stored("runs")["traces"].items():
        for row in trace["metrics"]:
            assert 0 < row["accuracy"] < 1 and row["grad_norm"] > 0.05 and row["skipped_updates"] < 1, name
        rule, _, setting_name = name.split()
        if setting_name == "reduce":
            assert any(row["mask_share"] > 0.01 for row in trace["metrics"]) == (rule not in UNMASKED), name


def test_a_moved_number_is_seen() -> None:
    """A thousandth is, rounding is not; another name, length or text is."""
    then = {"loss": 0.5, "list": [1.0, 2.0], "text": "a", "none": None, "limit": float("inf")}
    assert differences(then | {"loss": 0.50002}, then) == []
    for now in (
        then | {"loss": 0.5005},
        then | {"loss": None},
        then | {"list": [1.0]},
        then | {"list": [1.0, 2.1]},
        then | {"text": "b"},
        then | {"none": 0.0},
        then | {"limit": 1e9},
        then | {"more": 1},
    ):
        assert len(differences(now, then)) == 1, now
