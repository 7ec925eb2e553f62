"""Advantage estimators against slow loops over Python floats, with ragged masks, holes and unjudged rewards.

Legend: P prompts, G responses a prompt, B = P G rows, T tokens.
"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cppo import advantages
from cppo.advantages import (
    Outcomes,
    at_last_token,
    estimator,
    generalised_advantages,
    group_relative,
    whiten,
    zero_variance,
)

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "fixture_vectors.json").read_text())
LENGTHS, REWARDS = VECTORS["fixture"]["len"], VECTORS["fixture"]["rewards"]
NAN = math.nan
SINGLE = {"rtol": 0, "atol": 2e-7}
"""For the stored vectors, which have 7 or 8 decimals, and estimators whose factor is taken in float32."""


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def same(found: Tensor, expected: Any, **tolerance: Any) -> None:
    torch.testing.assert_close(found, double(expected), **(tolerance or {"rtol": 1e-12, "atol": 1e-12}))


def estimate(name: str, rewards: Tensor, group: int, mask: Tensor | None = None, **values: Any) -> Tensor:
    """The advantages [B, T] of a registered estimator; without a mask [B], from responses of one token."""
    one_token = torch.ones(len(rewards), 1, dtype=torch.bool)
    found, _ = estimator(name)(Outcomes(rewards, one_token if mask is None else mask, group, **values))
    return found[:, 0] if mask is None else found


def fixture_mask() -> Tensor:
    return torch.arange(6) < torch.tensor(LENGTHS).unsqueeze(1)


REWARD = st.sampled_from([0.0, 1.0, -1.0, 0.5, 0.1, NAN])
GROUP = st.integers(2, 5)


@st.composite
def groups(draw: st.DrawFn) -> tuple[list[list[float]], int]:
    """Rewards [P][G], some of them not judged, and G."""
    size = draw(GROUP)
    return draw(st.lists(st.lists(REWARD, min_size=size, max_size=size), min_size=1, max_size=4)), size


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Token values a and b [B, T], and a mask with holes, empty rows and full rows."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    number = st.floats(-3, 3, allow_subnormal=False)

    def table(element: st.SearchStrategy[Any]) -> list[list[Any]]:
        row = st.lists(element, min_size=columns, max_size=columns)
        return draw(st.lists(row, min_size=rows, max_size=rows))

    return double(table(number)), double(table(number)), torch.tensor(table(st.booleans()))


def spoiled(x: Tensor, mask: Tensor) -> Tensor:
    """x with NaN outside the mask: what stands there must not matter."""
    return torch.where(mask, x, NAN)


# Groups ---------------------------------------------------------------------------------------------------------------


def slow_group(rewards: list[float], std: bool) -> list[float]:
    """(R - mean) [/ (unbiased std + 1e-6)] over the judged ones; 0 for the others and for groups of one reward."""
    judged = [r for r in rewards if not math.isnan(r)]
    if len(set(judged)) < 2:
        return [0.0] * len(rewards)
    mean = sum(judged) / len(judged)
    deviation = (sum((r - mean) ** 2 for r in judged) / (len(judged) - 1)) ** 0.5
    return [0.0 if math.isnan(r) else (r - mean) / (deviation + 1e-6 if std else 1) for r in rewards]


@given(groups(), st.booleans())
def test_group_relative(batch: tuple[list[list[float]], int], std: bool) -> None:
    grouped, size = batch
    same(group_relative(double(grouped).view(-1), size, std), [a for g in grouped for a in slow_group(g, std)])


@given(groups())
def test_zero_variance(batch: tuple[list[list[float]], int]) -> None:
    grouped, size = batch
    expected = [len({r for r in g if not math.isnan(r)}) < 2 for g in grouped for _ in g]
    assert zero_variance(double(grouped).view(-1), size).tolist() == expected


@given(groups())
def test_rloo_is_the_reward_minus_the_mean_of_the_others(batch: tuple[list[list[float]], int]) -> None:
    grouped, size = batch
    expected = []
    for g in grouped:
        for i, r in enumerate(g):
            others = [x for j, x in enumerate(g) if j != i and not math.isnan(x)]
            expected.append(0.0 if math.isnan(r) or not others else r - sum(others) / len(others))
    same(estimate("rloo", double(grouped).view(-1), size), expected, **SINGLE)


@given(groups())
def test_gpg(batch: tuple[list[list[float]], int]) -> None:
    grouped, size = batch
    judged = [r for g in grouped for r in g if not math.isnan(r)]
    factor = len(judged) / max(1, sum(r != 0 for r in judged))
    expected = [factor * a for g in grouped for a in slow_group(g, std=False)]
    same(estimate("gpg", double(grouped).view(-1), size), expected, rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize("std", [True, False])
def test_unjudged_rewards_are_not_zeros(std: bool) -> None:
    """They move no mean, get no advantage, and leave a group alone or without signal as it is."""
    found = group_relative(double([1, 0, NAN, 1, NAN, NAN, NAN, NAN, 1, NAN, NAN, NAN, 1, 1, NAN, 1]), 4, std)
    assert found[2] == 0 and (found[4:] == 0).all() and found.isfinite().all()
    same(found[[0, 1, 3]], group_relative(double([1, 0, 1]), 3, std).tolist())
    assert found[1] != group_relative(double([1, 0, 0, 1]), 4, std)[1]


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_nothing(reward: float, dtype: torch.dtype) -> None:
    """A mean of equal numbers need not be that number; divided by a tiny deviation the rest would be noise of size 1."""
    rewards = torch.full((21,), reward, dtype=dtype)
    assert (group_relative(rewards, 7, std=True) == 0).all() and (group_relative(rewards, 7, std=False) == 0).all()


def test_groups_are_rows_next_to_each_other() -> None:
    """Row p * G + g belongs to prompt p: what happens in one group changes no other."""
    rewards = double([1, 0, 0, 1, 1, 1, 0, 0, 1])
    alone = torch.cat([group_relative(part, 3, std=True) for part in rewards.split(3)])
    same(group_relative(rewards, 3, std=True), alone.tolist())


@given(groups())
def test_centred_advantages_sum_to_zero(batch: tuple[list[list[float]], int]) -> None:
    grouped, size = batch
    for std in (True, False):
        sums = group_relative(double(grouped).view(-1), size, std).view(-1, size).sum(-1)
        torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-9)


# Tokens ---------------------------------------------------------------------------------------------------------------


def slow_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Any, Any]:
    """The definition: A_t = sum over later trained tokens k of (gamma gae_lambda)^k delta; a row has trained tokens only."""
    advantages, returns = torch.zeros_like(values).tolist(), torch.zeros_like(values).tolist()
    for b in range(mask.shape[0]):
        at = [t for t in range(mask.shape[1]) if mask[b, t]]
        v = [float(values[b, t]) for t in at] + [0.0]
        delta = [float(rewards[b, t]) + gamma * v[i + 1] - v[i] for i, t in enumerate(at)]
        for i, t in enumerate(at):
            advantages[b][t] = sum((gamma * gae_lambda) ** k * d for k, d in enumerate(delta[i:]))
            returns[b][t] = advantages[b][t] + v[i]
    return advantages, returns


@given(batches(), st.sampled_from([0.0, 0.5, 0.99, 1.0]), st.sampled_from([0.0, 0.95, 1.0]))
def test_gae(batch: tuple[Tensor, Tensor, Tensor], gamma: float, gae_lambda: float) -> None:
    rewards, values, mask = batch
    advantages, returns = generalised_advantages(spoiled(rewards, mask), spoiled(values, mask), mask, gamma, gae_lambda)
    slow_advantages, slow_returns = slow_gae(rewards, values, mask, gamma, gae_lambda)
    same(advantages, slow_advantages)
    same(returns, slow_returns)


@given(batches())
def test_undiscounted_returns_of_an_outcome_are_the_outcome(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """gamma = gae_lambda = 1 and a reward at the last trained token: the return of each token is R, whatever the values."""
    rewards, values, mask = batch
    _, returns = generalised_advantages(at_last_token(rewards[:, 0], mask), values, mask, 1.0, 1.0)
    same(returns, torch.where(mask, rewards[:, :1], 0).tolist())


@given(batches())
def test_at_last_token(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """The whole reward at the last trained token, nothing elsewhere, nothing in an empty row."""
    rewards, _, mask = batch
    expected = torch.zeros_like(rewards).tolist()
    for b in range(mask.shape[0]):
        at = [t for t in range(mask.shape[1]) if mask[b, t]]
        if at:
            expected[b][at[-1]] = float(rewards[b, 0])
    same(at_last_token(rewards[:, 0], mask), expected)


def test_an_unjudged_outcome_is_no_token_reward() -> None:
    mask = torch.tensor([[True, True, False], [True, False, True]])
    same(at_last_token(double([NAN, 1]), mask), [[0, 0, 0], [0, 0, 1]])


@given(batches())
def test_whiten(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """(x - mean) / sqrt(unbiased variance + 1e-8) over the trained tokens of all rows; 0 elsewhere."""
    x, _, mask = batch
    inside = x[mask].tolist()
    mean = sum(inside) / max(len(inside), 1)
    variance = sum((v - mean) ** 2 for v in inside) / max(len(inside) - 1, 1)
    expected = torch.where(mask, (x - mean) / (variance + 1e-8) ** 0.5, 0)
    same(whiten(spoiled(x, mask), mask), expected.tolist(), rtol=1e-9, atol=1e-9)


def test_whitened_values_have_mean_zero_and_deviation_one() -> None:
    x, mask = torch.linspace(-3, 9, 35, dtype=torch.float64).view(5, 7) ** 3, torch.arange(35).view(5, 7) % 3 > 0
    found = whiten(x, mask)[mask]
    assert abs(float(found.mean())) < 1e-12 and abs(float(found.std()) - 1) < 1e-9


@given(batches(), st.data())
def test_reinforce_pp(batch: tuple[Tensor, Tensor, Tensor], data: st.DataObject) -> None:
    """The outcome (or the outcome minus its group's mean) on every trained token of a judged row, whitened."""
    _, _, mask = batch
    rows = mask.shape[0]
    rewards = data.draw(st.lists(REWARD, min_size=rows, max_size=rows))
    for found, per_row in (
        (estimate("reinforce_pp", double(rewards), rows, mask), rewards),
        (estimate("reinforce_pp_baseline", double(rewards), rows, mask), slow_group(rewards, std=False)),
    ):
        at = [(b, t) for b in range(rows) for t in range(mask.shape[1]) if mask[b, t] and not math.isnan(rewards[b])]
        mean = sum(per_row[b] for b, _ in at) / max(len(at), 1)
        variance = sum((per_row[b] - mean) ** 2 for b, _ in at) / max(len(at) - 1, 1)
        expected = torch.zeros_like(mask, dtype=torch.float64).tolist()
        for b, t in at:
            expected[b][t] = (per_row[b] - mean) / (variance + 1e-8) ** 0.5
        same(found, expected, rtol=1e-9, atol=1e-9)


def test_inputs_are_not_modified() -> None:
    rewards, mask = double([1, NAN, 0, 1]), fixture_mask()
    values = torch.ones(4, 6, dtype=torch.float64)
    before = rewards.clone(), values.clone(), mask.clone()
    group_relative(rewards, 4, std=True)
    generalised_advantages(at_last_token(rewards, mask), whiten(values, mask), mask, 1.0, 0.95)
    for name in advantages.names():
        estimate(name, rewards, 2, mask, values=values)
    for now, then in zip((rewards, values, mask), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)


def test_estimators_by_name() -> None:
    """What a suite's `advantage` names, on every trained token of the row."""
    rewards, mask = double([1, 0, 0.5, 1]), fixture_mask()
    for name, per_row in {
        "grpo": group_relative(rewards, 2, std=True),
        "dr_grpo": group_relative(rewards, 2, std=False),
        "rloo": 2 * group_relative(rewards, 2, std=False),
        "gpg": 4 / 3 * group_relative(rewards, 2, std=False),
    }.items():
        same(estimate(name, rewards, 2, mask), torch.where(mask, per_row.unsqueeze(-1), 0).tolist(), **SINGLE)


# Stored vectors -------------------------------------------------------------------------------------------------------


def test_stored_group_estimators() -> None:
    rewards = double(REWARDS)
    same(group_relative(rewards, 4, std=True), VECTORS["adv_grpo"], **SINGLE)
    same(group_relative(rewards, 4, std=False), VECTORS["_meta"]["A"])
    same(estimate("rloo", rewards, 4), VECTORS["adv_rloo"], **SINGLE)
    same(estimate("gpg", rewards, 4), VECTORS["adv_gpg"], **SINGLE)


def test_stored_reinforce_pp() -> None:
    """Also as GAE with no critic: it is the same estimator."""
    rewards, mask = double(REWARDS), fixture_mask()
    found = estimate("reinforce_pp", rewards, 4, mask)
    same(found[0], VECTORS["adv_rfpp_row0"], **SINGLE)
    raw, _ = generalised_advantages(
        at_last_token(rewards, mask), torch.zeros(4, 6, dtype=torch.float64), mask, 1.0, 1.0
    )
    same(whiten(raw, mask), found.tolist())


@pytest.mark.parametrize("gae_lambda", [1.0, 0.95])
def test_stored_gae(gae_lambda: float) -> None:
    """The critic's values are stored to 7 decimals, the advantages are whitened over the batch, the returns are not."""
    mask, stored = fixture_mask(), VECTORS[f"gae_lam{gae_lambda}"]
    raw, returns = generalised_advantages(
        at_last_token(double(REWARDS), mask), double(VECTORS["gae_lam0.95_vals"]), mask, 1.0, gae_lambda
    )
    white = whiten(raw, mask)
    same(white[0], stored["adv_row0"], rtol=0, atol=3e-7)
    same(white[2, :3], stored["adv_row2"][:3], rtol=0, atol=3e-7)
    same(returns[0], stored["ret_row0"], rtol=0, atol=3e-7)


# One's own ------------------------------------------------------------------------------------------------------------

MODULE = """
import torch
from cppo import advantages
from cppo.advantages import Outcomes, group_relative

@advantages.register()
def signs(outcomes: Outcomes) -> torch.Tensor:
    return outcomes.on_tokens(group_relative(outcomes.rewards, outcomes.group, std=False).sign())

@advantages.register()
def by_row(outcomes: Outcomes) -> torch.Tensor:
    return outcomes.rewards

@advantages.register()
def unjudged(outcomes: Outcomes) -> torch.Tensor:
    return outcomes.on_tokens(outcomes.rewards)

@advantages.register(critic=True)
def half(outcomes: Outcomes) -> torch.Tensor:
    return outcomes.on_tokens(outcomes.rewards)

@advantages.register(critic=True)
def narrow(outcomes: Outcomes) -> tuple[torch.Tensor, torch.Tensor]:
    return outcomes.values - 1, outcomes.values[:, :1]

@advantages.register(critic=True)
def values(outcomes: Outcomes) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.where(outcomes.mask, outcomes.values - 1, torch.nan), outcomes.gamma * outcomes.values
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's module own_advantages on the path, registered for one test."""
    (tmp_path / "own_advantages.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_advantages", raising=False)
    monkeypatch.setattr(advantages._REGISTRY, "_entries", dict(advantages._REGISTRY._entries))


OUTCOMES = Outcomes(double([1, 0, 0.5, 1]), fixture_mask(), 2, double([[2.0] * 6] * 4), gamma=0.5)


def test_an_estimator_by_import_path(own: None) -> None:
    found, returns = estimator("own_advantages:signs")(OUTCOMES)
    same(found, torch.where(fixture_mask(), double([1, -1, -1, 1]).unsqueeze(1), 0).tolist())
    assert returns is None and "signs" in advantages.names()


def test_a_critic_estimator_by_import_path(own: None) -> None:
    """What it says outside the mask, also NaN, is 0."""
    made = estimator("own_advantages:values")
    found, returns = made(OUTCOMES)
    assert made.critic and returns is not None
    same(found, fixture_mask().double().tolist())
    same(returns, fixture_mask().double().tolist())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("by_row", r"advantage by_row: expected advantages of shape \(4, 6\), got \(4,\)"),
        ("half", r"advantage half: expected \(advantages, returns\), each of shape \(4, 6\), got \(4, 6\)"),
        ("narrow", r"advantage narrow: expected .* each of shape \(4, 6\), got \(4, 6\) and \(4, 1\)"),
        ("unjudged", "advantage unjudged: an advantage is not finite; unjudged rewards are NaN and must get 0"),
    ],
)
def test_a_wrong_result_is_refused_in_one_line(own: None, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        estimator(f"own_advantages:{name}")(replace(OUTCOMES, rewards=double([1, NAN, 0.5, 1])))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grpoo", "unknown advantage 'grpoo'; known: dr_grpo, gae, gpg, grpo, .*, or 'module:function' of your own"),
        (
            "own_advantages:none",
            r"advantage 'own_advantages:none': own_advantages has no function none decorated with ",
        ),
        ("no_such_module:x", "advantage 'no_such_module:x': No module named 'no_such_module'; is its folder on"),
        ("a b:c", "advantage 'a b:c': an import path reads 'package.module:function'"),
    ],
)
def test_an_estimator_that_is_not_there(own: None, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        estimator(name)


def test_gae_by_its_name_is_whitened_over_judged_rows() -> None:
    """From the rewards to advantages and returns, with one response that could not be judged."""
    rewards, mask = double([1, NAN, 0, 1]), fixture_mask()
    values = double(VECTORS["gae_lam0.95_vals"])
    outcomes = Outcomes(rewards, mask, 4, values, gamma=0.9, gae_lambda=0.5)
    found, returns = estimator("gae")(outcomes)
    raw, expected = generalised_advantages(at_last_token(rewards, mask), values, mask, 0.9, 0.5)
    judged = mask & ~rewards.isnan().unsqueeze(1)
    same(found, whiten(raw, judged).tolist())
    assert (found[1] == 0).all() and returns is not None
    same(returns, expected.tolist())
