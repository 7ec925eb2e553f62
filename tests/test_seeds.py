"""Seeds: fixed numbers that depend on their axes and on nothing else."""

import itertools

import numpy as np
import torch

from cppo.system.seeds import numpy_generator, seed, torch_generator, uniforms


def test_values_are_stable() -> None:
    """Published numbers rest on these: a changed hash would silently change every run."""
    assert seed("rollout", "base", 0, 1) == 7800016270698395532
    assert seed() == 2858069222894195974
    expected = [0.036040425300598145, 0.4658280611038208]
    assert uniforms(2, 3, "rollout", "base", 0, 1)[1, :2].tolist() == expected
    assert numpy_generator("problems", "base", "train").integers(1000, size=3).tolist() == [383, 746, 471]


def test_seeds_differ_across_axes() -> None:
    """No two tuples share a seed, also where their joined text is the same, or one is a prefix of another."""
    axes: list[tuple[str | int, ...]] = list(
        itertools.product(("rollout", "order", "evaluate"), ("base", "moe"), range(20), range(50))
    )
    axes += [
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        ("a", "b", "c"),
        ("1",),
        (1,),
        (1, 2),
        (12,),
        (2, 1),
        (),
        ("",),
        ("", ""),
    ]
    seeds = [seed(*a) for a in axes]
    assert len(set(seeds)) == len(axes)
    assert all(0 <= s < 2**63 for s in seeds)
    # Every bit is used: for a fair bit the share of ones lies within 0.5 +- 5 standard deviations.
    bits = [[s >> bit & 1 for s in seeds] for bit in range(63)]
    assert all(abs(np.mean(b) - 0.5) < 5 * 0.5 / len(seeds) ** 0.5 for b in bits)


def test_uniforms_lie_in_the_unit_interval() -> None:
    """In [0, 1), float32, and uniform: tenths are equally likely within five standard deviations."""
    u = uniforms(200, 500, "test")
    assert u.shape == (200, 500) and u.dtype == torch.float32
    assert (u >= 0).all() and (u < 1).all()
    counts = torch.histc(u, 10, 0, 1)
    assert ((counts - 10_000).abs() < 5 * (100_000 * 0.1 * 0.9) ** 0.5).all()


def test_nothing_but_the_axes_matters() -> None:
    """Neither the order of calls, nor the global generators, nor what was drawn before; and none of them is touched."""
    first = uniforms(2, 3, "a", 1), numpy_generator("a", 1).random(3), torch_generator("b").initial_seed()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    uniforms(50, 50, "c")
    torch_generator("a", 1)
    again = torch_generator("b").initial_seed(), numpy_generator("a", 1).random(3), uniforms(2, 3, "a", 1)
    assert torch.equal(first[0], again[2]) and (first[1] == again[1]).all() and first[2] == again[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(uniforms(2, 3, "a", 2), first[0])
