"""Every entry of the stored vectors: losses, gradients, masks, budgets and divergences to their last digit."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from fixture import Fixture, loss_and_grad, spec_fixture
from torch import Tensor

from cppo import advantages, divergences
from cppo.advantages import Outcomes
from cppo.loss import Aggregation
from cppo.objectives import Tokens, objective
from cppo.objectives.divergence import prefix_sums
from cppo.objectives.types import padded_like
from cppo.rewards import overlong_penalty

DATA = Path(__file__).parent / "data"
VECTORS: dict[str, Any] = json.loads((DATA / "fixture_vectors.json").read_text())
MASK_CASES: list[dict[str, Any]] = json.loads((DATA / "cppo_mask_vectors.json").read_text())["cases"]

NINE, SEVEN, SIX = 2e-9, 6e-8, 6e-7
"""Tolerances for numbers stored to 9, 7 and 6 decimals: their rounding (half a unit), and a little for 1e-8 guards."""


@dataclass(frozen=True)
class Case:
    """How to compute an entry."""

    objective: str
    settings: dict[str, Any] = field(default_factory=dict)
    divergence: tuple[str, divergences.Kind] | None = None
    std: bool = False
    """Advantages divided by the group's deviation."""
    rotated: bool = False
    """Token p takes the weight of position (p + 2) mod T_i."""


BTV: tuple[str, divergences.Kind] = ("binary", "tv")
BKL: tuple[str, divergences.Kind] = ("binary", "kl")
FULL_KL: tuple[str, divergences.Kind] = ("exact", "kl")
TOP3_TV: tuple[str, divergences.Kind] = ("top_k_union", "tv")
TOP3_TV_REPLACE: tuple[str, divergences.Kind] = ("top_k_replace", "tv")
TOP3_KL: tuple[str, divergences.Kind] = ("top_k_union", "kl")
SMALL: dict[str, Any] = {"delta": 0.08, "delta_b": 0.01, "w_min": 0.8, "adaptive": False}

CASES: dict[str, Case] = {
    "ppo_sym_0.2": Case("ppo", {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0}),
    "grpo_cliphigher_0.2_0.28_c3": Case("grpo", {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}),
    "grpo_cliphigher_0.2_0.28_nodual": Case("grpo", {"clip_low": 0.2, "clip_high": 0.28}),
    "grpo_stdnorm_cliphigher": Case("grpo", {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}, std=True),
    "cispo_verl_10_0.2": Case("cispo", {"clip_low": 10.0, "clip_high": 0.2}),
    "cispo_C5": Case("cispo", {"clip_high": 4.0}),
    "cispo_C3": Case("cispo", {"clip_high": 2.0}),
    "gspo_3e-4_4e-4": Case("gspo", {"clip_low": 3e-4, "clip_high": 4e-4}),
    "sapo_1.0_1.05": Case("sapo", {"tau_pos": 1.0, "tau_neg": 1.05}),
    "minpro_0.2_0.28": Case("minpro", {"clip_low": 0.2, "clip_high": 0.28}),
    "minpro_1.0_0.28": Case("minpro", {"clip_high": 0.28}),
    "minpro_1.0_4.0": Case("minpro", {"clip_high": 4.0}),
    "minpro_1.0_0.28_prefixmin_le_1": Case("minpro", {"clip_high": 0.28, "cap_prefix_at_1": True}),
    "drpo_12.5": Case("drpo", {"delta": 12.5}),
    "drpo_0.15": Case("drpo", {"delta": 0.15}),
    "trm_max_fullkl_0.22": Case("trm", {"delta_max": 0.22, "cap": None}, FULL_KL),
    "trm_avg_fullkl_0.18": Case("trm", {"delta_max": None, "delta_mean": 0.18, "cap": None}, FULL_KL),
    "trm_max_and_avg_fullkl_0.22_0.18": Case("trm", {"delta_max": 0.22, "delta_mean": 0.18, "cap": None}, FULL_KL),
    "trm_avg_k3_0.18": Case("trm", {"delta_max": None, "delta_mean": 0.18, "cap": None}, ("k3", "kl")),
    "dppo_btv_0.15": Case("dppo", {"delta": 0.15}, BTV),
    "dppo_btv_0.05": Case("dppo", {"delta": 0.05}, BTV),
    "dppo_bkl_0.05": Case("dppo", {"delta": 0.05}, BKL),
    "dppo_top3tv_union_0.15": Case("dppo", {"delta": 0.15}, TOP3_TV),
    "dppo_top3tv_replace_0.15": Case("dppo", {"delta": 0.15}, TOP3_TV_REPLACE),
    "dppo_top3tv_union_0.225": Case("dppo", {"delta": 0.225}, TOP3_TV),
    "dppo_top3tv_replace_0.225": Case("dppo", {"delta": 0.225}, TOP3_TV_REPLACE),
    "dppo_top3kl_union_0.05": Case("dppo", {"delta": 0.05}, TOP3_KL),
    "cppo_verlPR_padded_5x_delta.08_db.01": Case(
        "cppo", SMALL | {"adaptive": True, "clamp_factor": 5.0, "span": 6}, BTV
    ),
    "cppo_btv_delta.08_db.01_full_adaptive2x": Case("cppo", SMALL | {"adaptive": True}, BTV),
    "cppo_btv_delta.08_db.01_full_fixed": Case("cppo", SMALL, BTV),
    "cppo_btv_delta.08_db.01_no_position_weight": Case("cppo", SMALL | {"w_min": 1.0}, BTV),
    "cppo_btv_delta.08_db.01_no_prefix_budget": Case("cppo", SMALL | {"delta_b": None}, BTV),
    "cppo_btv_delta.08_db.01_soft": Case("cppo", SMALL | {"soft": True}, BTV),
    "cppo_btv_delta.08_db.01_shuffled_rot2_with_prefix_fixed": Case(
        "cppo", SMALL | {"shuffle": True}, BTV, rotated=True
    ),
    "cppo_btv_delta.08_db.01_shuffled_rot2_no_prefix": Case(
        "cppo", SMALL | {"shuffle": True, "delta_b": None}, BTV, rotated=True
    ),
    "cppo_bkl_delta.04_db.002_adaptive2x": Case("cppo", {"delta": 0.04, "delta_b": 0.002}, BKL),
    "cppo_top3kl_union_delta.1_db.002_adaptive2x": Case("cppo", {"delta": 0.1, "delta_b": 0.002}, TOP3_KL),
    "cppo_top3tv_union_delta.15_db.02_adaptive2x": Case("cppo", {"delta": 0.15, "delta_b": 0.02}, TOP3_TV),
    "cppo_top3tv_union_delta.25_db.2_fixed": Case("cppo", {"delta": 0.25, "delta_b": 0.2, "adaptive": False}, TOP3_TV),
    "cppo_top3tv_replace_delta.25_db.2_fixed": Case(
        "cppo", {"delta": 0.25, "delta_b": 0.2, "adaptive": False}, TOP3_TV_REPLACE
    ),
    "cppo_btv_delta.08_db.09_adaptive2x": Case("cppo", {"delta": 0.08, "delta_b": 0.09}, BTV),
    "cppo_unirl_diffratio_delta.08_db.01": Case("cppo", SMALL | {"adaptive": True, "cap": None}, BTV),
}

DIVERGENCES: dict[str, tuple[str, divergences.Kind]] = {
    "D_binary_tv": BTV,
    "D_binary_kl": BKL,
    "D_top3_tv_replace": TOP3_TV_REPLACE,
    "D_top3_tv_union": TOP3_TV,
    "D_top3_kl_replace": ("top_k_replace", "kl"),
    "D_top3_kl_union": TOP3_KL,
    "D_full_tv": ("exact", "tv"),
    "D_full_kl": FULL_KL,
}

SEQUENCE_STATISTICS: dict[str, tuple[str, divergences.Kind]] = {
    "trm_stats_fullkl": FULL_KL,
    "trm_stats_top3kl_union": TOP3_KL,
}

MINPRO_WEIGHTS = {
    "minpro_weight": "minpro_0.2_0.28",
    "minpro_weight_1.0_0.28": "minpro_1.0_0.28",
    "minpro_weight_1.0_4.0": "minpro_1.0_4.0",
    "minpro_weight_1.0_0.28_le1": "minpro_1.0_0.28_prefixmin_le_1",
}
GAE = ("gae_lam1.0", "gae_lam0.95")
OTHERS = (
    "fixture",
    "p90_binary_tv_valid",
    "kl_estimators_token_mean",
    "trm_stats_sample",
    "gmpo_0.4",
    "adv_grpo",
    "adv_rloo",
    "adv_gpg",
    "adv_rfpp_row0",
    "overlong_Lmax20480_cache4096",
    "gae_lam0.95_vals",
    "_meta",
)
"""Entries with a test of their own below."""

NOT_YET: dict[str, str] = {}
"""Entries without a test, and what has to exist first. An entry leaves this list together with its test."""


def stored(name: str, *keys: str) -> Tensor:
    """A stored array as float64."""
    entry = VECTORS[name]
    for key in keys:
        entry = entry[key]
    return torch.tensor(entry, dtype=torch.float64)


def tokens_of(case: Case, fixture: Fixture) -> Tokens:
    divergence = fixture.divergence(*case.divergence) if case.divergence else None
    return fixture.tokens(divergence, fixture.rotated(2) if case.rotated else None, case.std)


def close(actual: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), atol=atol, rtol=0)


def test_every_entry_is_tested_or_listed() -> None:
    tested = [*CASES, *DIVERGENCES, *SEQUENCE_STATISTICS, *MINPRO_WEIGHTS, *GAE, *OTHERS]
    assert len(tested) == len(set(tested))
    assert not set(tested) & set(NOT_YET)
    assert set(VECTORS) == set(tested) | set(NOT_YET)


@pytest.mark.parametrize(
    ("entry", "aggregation"),
    [(entry, mode) for entry in CASES for mode in VECTORS[entry] if mode not in ("mask", "delta_b", "c_t")],
)
def test_loss_and_gradient(entry: str, aggregation: str) -> None:
    case, mode = CASES[entry], cast(Aggregation, aggregation)
    loss, grad, _ = loss_and_grad(objective(case.objective, **case.settings), tokens_of(case, spec_fixture()), mode)
    if case.objective not in ("ppo", "grpo", "gspo"):  # those drop a clipped token's constant: only gradients agree
        close(loss, stored(entry, mode, "loss"), NINE)
    close(grad.norm(), stored(entry, mode, "grad_l2"), NINE)
    close(grad[0], stored(entry, mode, "grad_row0"), NINE)


@pytest.mark.parametrize("entry", [entry for entry in CASES if "mask" in VECTORS[entry]])
def test_cppo_gate(entry: str) -> None:
    case, fixture = CASES[entry], spec_fixture()
    gate = objective(case.objective, **case.settings)(tokens_of(case, fixture)).gate
    close(gate * fixture.mask, stored(entry, "mask"), SIX if case.settings.get("soft") else 0)


@pytest.mark.parametrize("entry", [entry for entry in CASES if "c_t" in VECTORS[entry]])
def test_cppo_budget_and_threshold(entry: str) -> None:
    case, fixture = CASES[entry], spec_fixture()
    rule = objective(case.objective, **case.settings)
    sums = prefix_sums(rule.params, padded_like(tokens_of(case, fixture)))
    if rule.params.delta_b is None:
        assert sums.delta_b.isinf().all()  # the file holds the unused setting
    else:
        close(sums.delta_b, stored(entry, "delta_b"), SEVEN)
    close(sums.threshold[fixture.mask], stored(entry, "c_t")[fixture.mask], SIX)


@pytest.mark.parametrize("entry", DIVERGENCES)
def test_divergence(entry: str) -> None:
    """All positions, padding too: the file holds a divergence for every one of them."""
    close(spec_fixture().divergence(*DIVERGENCES[entry]), stored(entry), SEVEN)


@pytest.mark.parametrize("entry", SEQUENCE_STATISTICS)
def test_sequence_statistics(entry: str) -> None:
    fixture = spec_fixture()
    divergence = torch.where(fixture.mask, fixture.divergence(*SEQUENCE_STATISTICS[entry]), 0)
    close(divergence.amax(-1), stored(entry, "max"), SEVEN)
    close(divergence.sum(-1) / fixture.mask.sum(-1), stored(entry, "avg"), SEVEN)


def test_trm_stats_sample() -> None:
    fixture = spec_fixture()
    k2 = torch.where(fixture.mask, divergences.sampled(fixture.logp, fixture.rollout_logp, "k2"), 0)
    k3 = torch.where(fixture.mask, divergences.sampled(fixture.logp, fixture.rollout_logp, "k3"), 0)
    close(k2.amax(-1), stored("trm_stats_sample", "max_k2"), SEVEN)
    close(k3.sum(-1) / fixture.mask.sum(-1), stored("trm_stats_sample", "mean_k3"), SEVEN)


def test_kl_estimators_token_mean() -> None:
    """The file's k3 estimates KL(pi, mu) with y ~ pi, the mirror of `sampled`, so its arguments are swapped."""
    fixture = spec_fixture()
    logp, rollout_logp = fixture.logp[fixture.mask], fixture.rollout_logp[fixture.mask]
    close((rollout_logp - logp).mean(), stored("kl_estimators_token_mean", "k1"), NINE)
    close(divergences.sampled(logp, rollout_logp, "k2").mean(), stored("kl_estimators_token_mean", "k2"), NINE)
    k3 = divergences.sampled(rollout_logp, logp, "k3").mean()
    close(k3, stored("kl_estimators_token_mean", "k3_ref_is_old"), NINE)


def test_p90_binary_tv_valid() -> None:
    """The quantile of the adaptive budget, with limits so wide that none of the four rows reaches one."""
    tokens = padded_like(tokens_of(Case("cppo", divergence=BTV), spec_fixture()))
    settings = objective("cppo", delta_b=1e-6, clamp_factor=1e6, quantile=0.9).params
    close(prefix_sums(settings, tokens).delta_b, stored("p90_binary_tv_valid"), SEVEN)


@pytest.mark.parametrize("entry", MINPRO_WEIGHTS)
def test_minpro_weight(entry: str) -> None:
    """The gradient of a token-sum is -A times the weight."""
    case, fixture = CASES[MINPRO_WEIGHTS[entry]], spec_fixture()
    _, grad, _ = loss_and_grad(objective(case.objective, **case.settings), fixture.tokens(), "token-sum")
    close(-grad / fixture.advantages(), stored(entry), SIX)


def test_gmpo_0_4() -> None:
    """The published value keeps what a clipped token adds to it, so it is that of the surrogate without its gate."""
    fixture, rule = spec_fixture(), objective("gmpo", clip_low=0.4, clip_high=0.4)
    _, grad, _ = loss_and_grad(rule, fixture.tokens(), "seq-mean-token-mean")
    by_row = rule(fixture.tokens()).surrogate.sum(-1) / fixture.mask.sum(-1)
    tolerance = 2 * NINE  # verl adds 1e-8 to the length
    close(-by_row.mean(), stored("gmpo_0.4", "loss"), tolerance)
    close(grad.norm(), stored("gmpo_0.4", "grad_l2"), tolerance)


@pytest.mark.parametrize(("entry", "name"), [("adv_grpo", "grpo"), ("adv_rloo", "rloo"), ("adv_gpg", "gpg")])
def test_group_advantages(entry: str, name: str) -> None:
    fixture = spec_fixture()
    result, _ = advantages.estimator(name)(Outcomes(fixture.rewards, fixture.mask, 4))
    close(result, torch.where(fixture.mask, stored(entry).unsqueeze(-1), 0), SEVEN)


def test_adv_rfpp_row0() -> None:
    fixture = spec_fixture()
    result, _ = advantages.estimator("reinforce_pp")(Outcomes(fixture.rewards, fixture.mask, 4))
    close(result[0], stored("adv_rfpp_row0"), SEVEN)


def test_overlong_Lmax20480_cache4096() -> None:
    for length, penalty in VECTORS["overlong_Lmax20480_cache4096"].items():
        assert overlong_penalty(int(length), 20480, 4096) == penalty


@pytest.mark.parametrize("entry", GAE)
def test_gae(entry: str) -> None:
    """The critic's values are the entry gae_lam0.95_vals; the file's advantages are whitened over the batch."""
    fixture = spec_fixture()
    rewards = advantages.at_last_token(fixture.rewards, fixture.mask)
    values = stored("gae_lam0.95_vals")
    gae_lambda = float(entry.removeprefix("gae_lam"))
    raw, returns = advantages.generalised_advantages(rewards, values, fixture.mask, 1.0, gae_lambda)
    white = advantages.whiten(raw, fixture.mask)
    close(white[0], stored(entry, "adv_row0"), 3 * SEVEN)  # the values' own rounding, grown by the whitening
    close(white[2, :3], stored(entry, "adv_row2")[:3], 3 * SEVEN)
    close(returns[0], stored(entry, "ret_row0"), 3 * SEVEN)


def test_fixture() -> None:
    """The builder reproduces the fixture that the file was computed on."""
    fixture = spec_fixture()
    assert fixture.y.tolist() == VECTORS["fixture"]["y"]
    assert fixture.mask.sum(-1).tolist() == VECTORS["fixture"]["len"]
    assert fixture.rewards.tolist() == VECTORS["fixture"]["rewards"]
    close(fixture.logp, stored("fixture", "new"), SEVEN)
    close(fixture.rollout_logp, stored("fixture", "old"), SEVEN)
    close(fixture.advantages()[:, 0], stored("_meta", "A"), 0)


@pytest.mark.parametrize("case", MASK_CASES, ids=[case["name"].replace(" ", "_") for case in MASK_CASES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cppo_mask_vectors(case: dict[str, Any], dtype: torch.dtype) -> None:
    """The reference implementation's differentiable ratio, hence cap None; its token losses are -A rho M."""
    rows = case["rows"]
    width = max(len(row["logp"]) for row in rows)

    def padded(key: str) -> Tensor:
        """[B, T] with NaN in the padding, which must not matter."""
        return torch.tensor([row[key] + [torch.nan] * (width - len(row[key])) for row in rows], dtype=dtype)

    logp, rollout_logp = padded("logp"), padded("rollout_logp")
    mask = ~logp.isnan()
    advantages = torch.tensor([[row["advantage"]] for row in rows], dtype=dtype).expand_as(mask)
    hyper = case["hyperparameters"]
    assert hyper["divergence"] == "binary_tv"
    rule = objective(
        "cppo",
        delta=hyper["delta"],
        w_min=hyper["w_min"],
        delta_b=hyper["delta_b"],
        adaptive=hyper["adaptive_budget"],
        cap=None,
    )
    tokens = Tokens(logp, rollout_logp, advantages, mask, divergences.binary(logp, rollout_logp))
    terms = rule(tokens)
    loss, grad, _ = loss_and_grad(rule, tokens, "token-sum")

    keep, token_loss, expected_grad = padded("keep")[mask], padded("token_loss")[mask], padded("grad_logp")[mask]
    assert torch.equal(terms.gate[mask], keep)
    assert 0 < keep.mean() < 1  # both kinds of token occur, or this shows nothing
    # Inputs and outputs are stored to 6 decimals, and losses reach 6.
    torch.testing.assert_close((-terms.gate * terms.surrogate)[mask], token_loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(grad[mask], expected_grad, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(loss, token_loss.sum(), atol=1e-6 * len(keep), rtol=0)
    assert (grad[~mask] == 0).all()
