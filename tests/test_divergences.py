"""The batched divergences against slow loops, their order, and their numerics."""

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fixture import Fixture, spec_fixture
from hypothesis import given
from hypothesis import strategies as st
from loops import reduced_loop
from torch import Tensor

from cppo import divergences
from cppo.divergences import Recorded

ATOL = 1e-12
SEEDS = st.integers(0, 2**32 - 1)
ESTIMATORS = ("binary", "replace", "union", "exact")


def batched(logp_all: Tensor, rollout_logp_all: Tensor, y: Tensor, estimator: str, kind: Any, k: int) -> Tensor:
    if estimator == "exact":
        return divergences.exact(logp_all, rollout_logp_all, kind)
    logp, rollout_logp = (x.gather(-1, y.unsqueeze(-1)).squeeze(-1) for x in (logp_all, rollout_logp_all))
    if estimator == "binary":
        return divergences.binary(logp, rollout_logp, kind)
    rollout_topk_logp, ids = rollout_logp_all.topk(k, dim=-1)
    shuffled = torch.randperm(k, generator=torch.Generator().manual_seed(k))  # the order of the K must not matter
    rollout_topk_logp, ids = rollout_topk_logp[..., shuffled], ids[..., shuffled]
    topk_logp = logp_all.gather(-1, ids)
    support: Any = estimator
    return divergences.top_k(logp, rollout_logp, topk_logp, rollout_topk_logp, ids.int(), y, kind=kind, support=support)


def distributions(seed: int, vocabulary: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """(log pi, log mu, y) for 3 x 4 tokens; y is uniform, so it is often outside mu's top K."""
    g = torch.Generator().manual_seed(seed)
    z_mu = 2 * torch.randn(3, 4, vocabulary, generator=g, dtype=torch.float64)
    z_pi = z_mu + spread * torch.randn(3, 4, vocabulary, generator=g, dtype=torch.float64)
    return z_pi.log_softmax(-1), z_mu.log_softmax(-1), torch.randint(0, vocabulary, (3, 4), generator=g)


@pytest.mark.parametrize("kind", ["tv", "kl"])
@given(SEEDS, st.integers(2, 9), st.sampled_from([0.0, 0.1, 1.0, 3.0]), st.data())
def test_divergences_are_their_loops_and_ordered(
    kind: str, seed: int, vocabulary: int, spread: float, data: st.DataObject
) -> None:
    """binary <= top-K replace <= top-K union <= exact, at each token."""
    k = data.draw(st.integers(1, vocabulary))
    logp_all, rollout_logp_all, y = distributions(seed, vocabulary, spread)
    results = {e: batched(logp_all, rollout_logp_all, y, e, kind, k) for e in ESTIMATORS}
    for estimator, result in results.items():
        assert result.dtype == torch.float64 and result.shape == y.shape
        for i, t in ((i, t) for i in range(3) for t in range(4)):
            p, q = logp_all[i, t].exp().tolist(), rollout_logp_all[i, t].exp().tolist()
            expected = reduced_loop(p, q, int(y[i, t]), estimator, kind, k)
            assert abs(float(result[i, t]) - expected) < 1e-10
    for smaller, larger in itertools.pairwise(ESTIMATORS):
        assert (results[smaller] <= results[larger] + 1e-10).all()


def test_the_estimators_differ() -> None:
    """All four, both kinds and both directions of KL give different numbers somewhere, or the test above is idle."""
    logp_all, rollout_logp_all, y = distributions(seed=3, vocabulary=8, spread=2.0)
    for kind in ("tv", "kl"):
        results = [batched(logp_all, rollout_logp_all, y, e, kind, 3) for e in ESTIMATORS]
        for smaller, larger in itertools.pairwise(results):
            assert (larger - smaller).max() > 0.01
        backward = batched(rollout_logp_all, logp_all, y, "exact", kind, 3)
        assert ((backward - results[-1]).abs().max() > 0.01) == (kind == "kl")


@given(SEEDS)
def test_sampled_estimators_average_to_the_exact_kl(seed: int) -> None:
    """E[k3] under y ~ mu is KL(mu, pi) exactly; k2 is (ln rho)^2 / 2."""
    logp_all, rollout_logp_all, _ = distributions(seed, vocabulary=7, spread=1.0)
    k3 = divergences.sampled(logp_all, rollout_logp_all, "k3")
    expected = divergences.exact(logp_all, rollout_logp_all, "kl")
    torch.testing.assert_close((rollout_logp_all.exp() * k3).sum(-1), expected, atol=1e-10, rtol=0)
    k2 = divergences.sampled(logp_all, rollout_logp_all, "k2")
    torch.testing.assert_close(k2, (logp_all - rollout_logp_all) ** 2 / 2, atol=ATOL, rtol=ATOL)


@pytest.mark.parametrize("kind", ["tv", "kl"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_divergences_in_half_precision(estimator: str, kind: str) -> None:
    """Computed in float32 whatever comes in, without a gradient, zero for equal policies, and finite at the edges."""
    logp_all, rollout_logp_all, y = (x.bfloat16() if x.is_floating_point() else x for x in distributions(1, 8, 1.0))
    logp_all.requires_grad_()
    result = batched(logp_all, rollout_logp_all, y, estimator, kind, 3)
    assert result.dtype == torch.float32 and not result.requires_grad
    exact_inputs = batched(logp_all.double(), rollout_logp_all.double(), y, estimator, kind, 3)
    torch.testing.assert_close(result, exact_inputs.float(), atol=1e-6, rtol=1e-5)
    assert (batched(logp_all, logp_all, y, estimator, kind, 3) == 0).all()
    certain = torch.tensor([0.0, -80.0, -80.0, -80.0]).expand(1, 2, 4)
    flat = torch.full((1, 2, 4), math.log(0.25))
    for p, q in ((certain, flat), (flat, certain)):
        value = batched(p, q, torch.tensor([[0, 3]]), estimator, kind, 2)
        assert value.isfinite().all() and (value >= 0).all()


def test_binary_of_a_log_probability_above_zero() -> None:
    """bf16 rounding can give one; the binary KL must not take the logarithm of a negative 1 - p."""
    above = torch.tensor([[1e-3, -1e-3]])
    kinds: tuple[divergences.Kind, ...] = ("tv", "kl")
    for kind in kinds:
        result = divergences.binary(above, above.flip(-1), kind)
        assert torch.equal(result, divergences.binary(above.clamp(max=0), above.flip(-1).clamp(max=0), kind))


def test_divergence_arguments_are_checked() -> None:
    x, ids = torch.full((1, 1, 2), -1.0), torch.zeros(1, 1, 2, dtype=torch.int64)
    one, wrong = x[..., 0], "js"
    calls: list[Callable[[Any], Tensor]] = [
        lambda kind: divergences.binary(one, one, kind),
        lambda kind: divergences.sampled(one, one, kind),
        lambda kind: divergences.exact(x, x, kind),
        lambda kind: divergences.top_k(one, one, x, x, ids, ids[..., 0], kind),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="kind: 'js' is not one of"):
            call(wrong)
    bad: Any = wrong
    with pytest.raises(ValueError, match="support: 'js' is not one of 'union', 'replace'"):
        divergences.top_k(one, one, x, x, ids, ids[..., 0], "tv", bad)


# The registry ---------------------------------------------------------------------------------------------------------

MODULE = """
from cppo import divergences
from cppo.divergences import Recorded

@divergences.register(keeps="sampled", kinds=("squared",))
def hellinger(seen: Recorded, kind: str):
    p, q = seen.logp.exp(), seen.rollout_logp.exp()
    return 1 - (p * q).sqrt() - ((1 - p) * (1 - q)).sqrt()

@divergences.register(keeps="sampled", kinds=("tv",))
def by_row(seen: Recorded, kind: str):
    return (seen.logp - seen.rollout_logp).mean(-1)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's module own_divergences on the path, registered for one test."""
    (tmp_path / "own_divergences.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_divergences", raising=False)
    monkeypatch.setattr(divergences._REGISTRY, "_entries", dict(divergences._REGISTRY._entries))


def recorded(fixture: Fixture, k: int = 3) -> Recorded:
    """All that a rollout can keep of the fixture's mu, in which each field belongs to its own side."""
    rollout_topk_logp, ids = fixture.rollout_logp_all.topk(k, dim=-1)
    return Recorded(
        tokens=fixture.y,
        logp=fixture.logp,
        rollout_logp=fixture.rollout_logp,
        topk_ids=ids,
        topk_logp=fixture.logp_all.gather(-1, ids),
        rollout_topk_logp=rollout_topk_logp,
        logp_all=fixture.logp_all,
        rollout_logp_all=fixture.rollout_logp_all,
    )


def test_estimators_by_name() -> None:
    """Each name gives its function on what was recorded, in every kind, and needs no more than it says."""
    fixture = spec_fixture()
    seen = recorded(fixture)
    sampled_only = Recorded(seen.tokens, seen.logp, seen.rollout_logp)
    top_k = replace(seen, logp_all=None, rollout_logp_all=None)
    assert divergences.names() == ("binary", "exact", "sampled", "top_k")
    for kind in ("tv", "kl"):
        assert torch.equal(divergences.estimator("binary")(sampled_only, kind), fixture.divergence("binary", kind))
        assert torch.equal(divergences.estimator("exact")(seen, kind), fixture.divergence("exact", kind))
        assert torch.equal(divergences.estimator("top_k")(top_k, kind), fixture.divergence("top_k_union", kind))
        for support in ("union", "replace"):
            found = divergences.estimator("top_k")(top_k, kind, support=support)
            assert torch.equal(found, fixture.divergence(f"top_k_{support}", kind))
    for kind in ("k2", "k3"):
        found = divergences.estimator("sampled")(sampled_only, kind)
        assert torch.equal(found, divergences.sampled(fixture.logp, fixture.rollout_logp, kind))
    keeps = {name: divergences.estimator(name).keeps for name in divergences.names()}
    assert keeps == {"binary": "sampled", "exact": "full", "sampled": "sampled", "top_k": "top_k"}
    assert divergences.estimator("sampled").kinds == ("k2", "k3") and divergences.estimator("top_k").options == (
        "support",
    )


def test_an_estimator_by_import_path(own: None) -> None:
    fixture = spec_fixture()
    found = divergences.estimator("own_divergences:hellinger")(recorded(fixture), "squared")
    p, q = fixture.logp.exp(), fixture.rollout_logp.exp()
    torch.testing.assert_close(found, 1 - (p * q).sqrt() - ((1 - p) * (1 - q)).sqrt())
    assert divergences.estimator("own_divergences:hellinger").keeps == "sampled" and "hellinger" in divergences.names()


def test_an_estimators_result_has_no_gradient(own: None) -> None:
    seen = recorded(spec_fixture())
    found = divergences.estimator("own_divergences:hellinger")(
        replace(seen, logp=seen.logp.clone().requires_grad_()), "squared"
    )
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("binry", "unknown divergence estimator 'binry'; known: binary, exact, sampled, top_k, or 'module:function'"),
        ("own_divergences:none", "divergence estimator 'own_divergences:none': own_divergences has no function none "),
        ("no_such_module:x", "divergence estimator 'no_such_module:x': No module named 'no_such_module'"),
    ],
)
def test_an_estimator_that_is_not_there(own: None, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        divergences.estimator(name)


def test_a_wrong_shape_is_refused_in_one_line(own: None) -> None:
    with pytest.raises(ValueError, match=r"^divergence by_row: expected shape \(4, 6\), got \(4,\)$"):
        divergences.estimator("own_divergences:by_row")(recorded(spec_fixture()), "tv")
