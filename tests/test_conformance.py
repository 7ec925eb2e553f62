"""Every registered objective keeps every law of `cppo.objectives.laws`. A new one is tested here without a line of code."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from fixture import random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from cppo.objectives import Objective, Reason, names, objective
from cppo.objectives.laws import EXAMPLE, LAWS, Law, require_equal_terms, result_of

EXTRA: dict[str, tuple[str, dict[str, Any]]] = {
    "cppo-shuffle": ("cppo", {"delta": 0.06, "shuffle": True}),
    "cppo-soft": ("cppo", {"delta": 0.06, "soft": True}),
    "cppo-span": ("cppo", {"delta": 0.06, "span": 50}),
    "cppo-fixed": ("cppo", {"delta": 0.06, "adaptive": False}),
    "cppo-no-prefix": ("cppo", {"delta": 0.02, "delta_b": None}),
    "cppo-differentiable": ("cppo", {"delta": 0.06, "cap": None}),
    "dppo-tight": ("dppo", {"delta": 0.02, "cap": None}),
    "ppo-dual": ("ppo", {"dual_clip": 1.3}),
    "cispo-two-sided": ("cispo", {"clip_low": 0.2, "clip_high": 0.2}),
    "minpro-capped": ("minpro", {"clip_low": 0.2, "cap_prefix_at_1": True}),
    "trm-mean": ("trm", {"delta_max": None, "delta_mean": 0.02, "cap": None}),
    "drpo-spo": ("drpo", {"delta": 0.15, "weight_by_mu": False}),
}
"""Settings besides the defaults: those that read other inputs, and some under which more tokens are masked."""

RULES: dict[str, Objective] = {name: objective(name) for name in names()}
RULES |= {label: objective(name, **settings) for label, (name, settings) in EXTRA.items()}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())

SOFT = ("gpg", "pg", "cispo", "minpro", "sapo", "drpo")
"""Rules that mask no token."""


@each_rule
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
def test_every_rule_keeps_every_law(rule: Objective, law: Law) -> None:
    law(rule)


@each_rule
@settings(max_examples=40)
@given(st.sampled_from(sorted(LAWS)), st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 10))
def test_laws_hold_on_random_batches(rule: Objective, law: str, seed: int, batch: int, width: int) -> None:
    """On batches nobody chose: single rows, single columns, rows and whole batches without a trained token."""
    LAWS[law](rule, random_tokens(seed, batch, width))


def test_the_example_is_irregular() -> None:
    """In the batch of the laws every rule that masks does so, or equal losses would show little."""
    for label, rule in RULES.items():
        gate = rule(EXAMPLE).gate[EXAMPLE.mask]
        assert bool((gate < 1).any()) == (rule.name not in SOFT), label
        assert (gate == 1).sum() > 5, label
    for label in ("cppo", "cppo-soft", "cppo-fixed", "cppo-shuffle", "cppo-span"):
        for reason in (Reason.THRESHOLD, Reason.BUDGET):
            assert (RULES[label](EXAMPLE).reason == reason).any(), label
    for sign in (-1, 0, 1):
        assert (EXAMPLE.advantages.sign()[EXAMPLE.mask] == sign).any()
    lengths = EXAMPLE.mask.sum(-1)
    last = torch.where(EXAMPLE.mask, torch.arange(10), -1).amax(-1)
    assert (lengths == 0).any() and (lengths == 1).any() and (lengths == 10).any() and (last + 1 > lengths).any()
    for row, mask in zip(EXAMPLE.position if EXAMPLE.position is not None else [], EXAMPLE.mask, strict=True):
        assert sorted(row[mask].tolist()) == list(range(1, int(mask.sum()) + 1))


@each_rule
def test_divergence_is_required_where_it_is_read(rule: Objective) -> None:
    if "divergence" in rule.needs:
        with pytest.raises(ValueError, match=f"objective {rule.name} needs tokens.divergence"):
            rule(replace(EXAMPLE, divergence=None))


@pytest.mark.parametrize("name", names())
def test_position_only_matters_to_a_shuffle(name: str) -> None:
    """By default a token's weight comes from its own order, so `position` is not read."""
    rule = objective(name)
    require_equal_terms(rule(replace(EXAMPLE, position=None)), rule(EXAMPLE), "without position")


def test_cppo_shuffle_reads_positions() -> None:
    """The identity permutation is no shuffle; another one changes some gate; leaving it out is an error."""
    plain, shuffled = objective("cppo", delta=0.06, w_min=0.1), objective("cppo", delta=0.06, w_min=0.1, shuffle=True)
    identity = replace(EXAMPLE, position=EXAMPLE.mask.cumsum(-1))
    assert torch.equal(shuffled(identity).gate, plain(EXAMPLE).gate)
    reversed_order = EXAMPLE.mask.sum(-1, keepdim=True) + 1 - EXAMPLE.mask.cumsum(-1)
    assert not torch.equal(shuffled(replace(EXAMPLE, position=reversed_order)).gate, plain(EXAMPLE).gate)
    with pytest.raises(ValueError, match=r"^objective cppo needs tokens\.position: a permutation"):
        shuffled(replace(EXAMPLE, position=None))


@each_rule
def test_metrics_hold_no_graph(rule: Objective) -> None:
    metrics = result_of(rule, EXAMPLE, "token-mean")[2]
    assert all(type(x) is float for value in metrics.values() for x in value)
