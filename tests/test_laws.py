"""Deliberately bad objectives: each breaks exactly the laws it should, so every law can fail.

The rules of this module are registered under names of their own and taken out again at once: `names()` stays clean.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from cppo.__main__ import main
from cppo.objectives import Objective, Reason, Terms, Tokens, names, objective, register, spec
from cppo.objectives.laws import EXAMPLE, LAWS, check
from cppo.objectives.ratio import hard_gate, log_ratio, ratio
from cppo.objectives.registry import _REGISTRY

BEFORE = names()


@dataclass(frozen=True)
class Bad:
    """Parameters of the bad rules: none."""


def keep(tokens: Tokens, surrogate: torch.Tensor) -> Terms:
    return hard_gate(surrogate, torch.ones_like(tokens.mask))


@register()
def bad_padded_mean(cfg: Bad, tokens: Tokens) -> Terms:
    """The mean ratio over all columns, padding included."""
    mean = log_ratio(tokens).detach().mean(-1, keepdim=True).exp()
    return keep(tokens, tokens.advantages * mean * tokens.logp)


@register()
def bad_column(cfg: Bad, tokens: Tokens) -> Terms:
    """The column as position: tool tokens count."""
    column = torch.arange(tokens.mask.shape[1])
    return hard_gate(tokens.advantages * ratio(tokens), log_ratio(tokens).detach() <= 0.5 - 0.05 * column)


@register()
def bad_batch_statistic(cfg: Bad, tokens: Tokens) -> Terms:
    """A threshold taken from the other rows of the micro-batch."""
    drift = log_ratio(tokens).detach().abs()
    return hard_gate(tokens.advantages * ratio(tokens), drift <= 0.9 * drift.amax().clamp(min=1e-12))


@register()
def bad_first_row(cfg: Bad, tokens: Tokens) -> Terms:
    """The first row counts twice."""
    twice = 1 + (torch.arange(tokens.mask.shape[0]) == 0).unsqueeze(-1).to(tokens.logp.dtype)
    return keep(tokens, twice * tokens.advantages * ratio(tokens))


@register()
def bad_division(cfg: Bad, tokens: Tokens) -> Terms:
    """0 / 0 in a row of one token: the unbiased deviation of one number."""
    count = tokens.mask.sum(-1, keepdim=True)
    one = (count - 1) / (count - 1)
    return keep(tokens, torch.where(count > 0, one, 1) * tokens.advantages * ratio(tokens))


@register()
def bad_half(cfg: Bad, tokens: Tokens) -> Terms:
    """The ratio in half precision."""
    return keep(tokens, tokens.advantages * ratio(tokens).detach().bfloat16() * tokens.logp)


@register()
def bad_unclamped(cfg: Bad, tokens: Tokens) -> Terms:
    """A power of the ratio, which overflows."""
    return keep(tokens, tokens.advantages * ratio(tokens).detach().pow(20) * tokens.logp)


@register()
def bad_entropy(cfg: Bad, tokens: Tokens) -> Terms:
    """A bonus without an advantage."""
    return keep(tokens, tokens.advantages * ratio(tokens) - 0.1 * tokens.logp)


@register()
def bad_sign(cfg: Bad, tokens: Tokens) -> Terms:
    """Descends."""
    return keep(tokens, -tokens.advantages * ratio(tokens))


@register()
def bad_scale(cfg: Bad, tokens: Tokens) -> Terms:
    """A threshold on A (rho - 1), which moves with the rewards' scale."""
    step = tokens.advantages * (ratio(tokens).detach() - 1)
    return hard_gate(tokens.advantages * ratio(tokens), step <= 0.2)


@register()
def bad_reason(cfg: Bad, tokens: Tokens) -> Terms:
    """Drops tokens and calls them kept."""
    gate = (log_ratio(tokens).detach() <= 0.2).to(tokens.logp.dtype)
    return Terms(tokens.advantages * ratio(tokens), gate, torch.zeros_like(tokens.mask, dtype=torch.int64))


@register()
def bad_large_gate(cfg: Bad, tokens: Tokens) -> Terms:
    """A gate above 1."""
    gate = torch.where(log_ratio(tokens).detach() > 0.2, 1.5, 1.0)
    reason = torch.where(gate > 1, int(Reason.THRESHOLD), int(Reason.KEPT))
    return Terms(tokens.advantages * ratio(tokens), gate, reason)


@register()
def bad_gate_gradient(cfg: Bad, tokens: Tokens) -> Terms:
    """A gate that counts on a gradient of its own."""
    gate = (1 - log_ratio(tokens).clamp(0, 1)).clamp(max=1)
    return Terms(tokens.advantages * ratio(tokens), gate, (gate < 1).long() * int(Reason.THRESHOLD))


@register()
def bad_writer(cfg: Bad, tokens: Tokens) -> Terms:
    """Writes into the advantages."""
    tokens.advantages.mul_(0.5).mul_(4)
    return keep(tokens, tokens.advantages * ratio(tokens) / 2)


@register()
def bad_mask_writer(cfg: Bad, tokens: Tokens) -> Terms:
    """Writes into the mask, which is the caller's own."""
    terms = keep(tokens, tokens.advantages * ratio(tokens))
    tokens.mask.logical_and_(log_ratio(tokens).detach() < 0.2)
    return terms


@register()
def bad_detached(cfg: Bad, tokens: Tokens) -> Terms:
    """Nothing to differentiate."""
    return keep(tokens, tokens.advantages * ratio(tokens).detach())


TEMPERATURE = torch.ones((), dtype=torch.float64, requires_grad=True)


@register()
def bad_parameter(cfg: Bad, tokens: Tokens) -> Terms:
    """A trainable parameter of its own."""
    return keep(tokens, TEMPERATURE.to(tokens.logp.dtype) * tokens.advantages * ratio(tokens))


CALLS = [0]


@register()
def bad_memory(cfg: Bad, tokens: Tokens) -> Terms:
    """Adds a constant that grows with every call, of no effect on the gradient."""
    CALLS[0] += 1
    return keep(tokens, tokens.advantages * (ratio(tokens) + 1e-3 * CALLS[0]))


@register()
def bad_undeclared(cfg: Bad, tokens: Tokens) -> Terms:
    """Reads a divergence without saying so."""
    assert tokens.divergence is not None, "no divergence"
    return hard_gate(tokens.advantages * ratio(tokens), tokens.divergence <= 0.1)


@register()
def bad_raises(cfg: Bad, tokens: Tokens) -> Terms:
    """Fails on every call."""
    raise KeyError("nothing works")


PADDING, NO_GRADIENT, ORDER = "padding changes nothing", "padding has no gradient", "row order changes nothing"
SPLIT, EMPTY, EMPTY_ROWS = "micro batches add up", "empty batches are harmless", "empty rows change nothing"
HOLES, SINGLE, HALF = "holes are skipped", "single tokens work", "half precision is computed in float32"
EXTREME, EQUAL, REINFORCE = (
    "extreme ratios stay finite",
    "equal rewards give no gradient",
    "on policy it is reinforce",
)
SCALE, GATE, INPUTS = (
    "scaling advantages changes no mask",
    "gates are shares with a reason",
    "inputs are not modified",
)
ONLY_LOGP, PURE, DECLARED = (
    "only logp is differentiated",
    "equal inputs give equal terms",
    "inputs are read as declared",
)

BAD: dict[str, Objective] = {name: objective(name) for name in names() if name.startswith("bad_")}
for _name in BAD:
    _REGISTRY._entries.pop(_name)

EXPECTED: dict[str, set[str]] = {
    "bad_padded_mean": {PADDING, SINGLE},
    "bad_column": {HOLES},
    "bad_batch_statistic": {SPLIT, EMPTY},  # a batch without rows has no maximum
    "bad_first_row": {ORDER, SPLIT, EMPTY_ROWS, REINFORCE},
    "bad_division": {PADDING, ORDER, SPLIT, EMPTY_ROWS, HOLES, SINGLE, HALF, EXTREME, EQUAL, REINFORCE},
    "bad_half": {HALF},
    "bad_unclamped": {EXTREME},
    "bad_entropy": {EQUAL, REINFORCE},
    "bad_sign": {REINFORCE},
    "bad_scale": {SCALE},
    "bad_reason": {GATE},
    "bad_large_gate": {GATE},
    "bad_gate_gradient": {GATE},
    "bad_writer": {INPUTS},
    "bad_detached": {ONLY_LOGP, REINFORCE},
    "bad_parameter": {ONLY_LOGP},
    "bad_memory": {PADDING, ORDER, SPLIT, EMPTY_ROWS, HOLES, SINGLE, HALF, PURE, DECLARED},
    "bad_undeclared": {DECLARED},
    "bad_raises": set(LAWS),
}


def test_the_registry_is_as_before() -> None:
    assert not [name for name in names() if name.startswith("bad_")] and set(BEFORE) <= set(names())
    assert set(BAD) == {*EXPECTED, "bad_mask_writer"}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_bad_rule_breaks_its_laws_and_no_other(name: str) -> None:
    broken = {law: message for law, message in check(BAD[name]).items() if message is not None}
    assert set(broken) == EXPECTED[name], broken
    assert all(broken.values())  # each says something


def test_every_law_is_broken_by_some_rule() -> None:
    """One of them is kept for every rule by `Objective`, whatever the rule does; one has to break `Objective` itself."""
    by_rules = set().union(*(laws for name, laws in EXPECTED.items() if name != "bad_raises"))
    assert set(LAWS) - by_rules == {NO_GRADIENT}


@dataclass(frozen=True)
class Unguarded(Objective):
    """An `Objective` that lets through what a rule says about padding."""

    def __call__(self, tokens: Tokens) -> Terms:
        terms = self.spec.function(self.params, tokens)
        return Terms(terms.surrogate, terms.gate.detach(), terms.reason)


def test_laws_about_padding_can_fail() -> None:
    found = check(Unguarded(spec("pg"), objective("pg").params))
    assert found[NO_GRADIENT] == "padding has a gradient" and found[EMPTY] is not None and found[PADDING] is not None


def test_messages_are_plain() -> None:
    assert check(BAD["bad_raises"])[PADDING] == "KeyError: 'nothing works'"
    assert check(BAD["bad_undeclared"])[DECLARED] == "no divergence"
    assert (check(BAD["bad_scale"])[SCALE] or "").startswith("A times")
    assert (check(BAD["bad_sign"])[REINFORCE] or "").startswith("pi = mu: the gradient of A log pi differs by up to")


def test_checking_leaves_the_example_as_it_was() -> None:
    before = {name: value.clone() for name, value in vars(EXAMPLE).items()}
    for name in ("bad_writer", "bad_mask_writer"):
        assert check(BAD[name])[INPUTS] is not None
    for name, value in vars(EXAMPLE).items():
        assert torch.equal(value, before[name])
    assert not replace(EXAMPLE).logp.requires_grad


# The command ----------------------------------------------------------------------------------------------------------

PLUGIN = '''
from dataclasses import dataclass
from cppo.objectives import Terms, Tokens, register
from cppo.objectives.ratio import hard_gate, log_ratio

@dataclass(frozen=True)
class Halt:
    """Parameters of `halt`."""
    limit: float = 0.1
    """Largest log-ratio, in either direction."""
    sign: int = 1
    """-1 = optimizer_step."""

@register()
def halt(cfg: Halt, tokens: Tokens) -> Terms:
    """Drop tokens whose log-ratio left [-limit, limit]."""
    x = log_ratio(tokens)
    return hard_gate(cfg.sign * tokens.advantages * x.exp(), x.abs() <= cfg.limit)
'''

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`python -m cppo check ...` beside a module halt_rules: (exit code, stdout, stderr)."""
    (tmp_path / "halt_rules.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "halt_rules", raising=False)
    monkeypatch.setattr(_REGISTRY, "_entries", dict(_REGISTRY._entries))

    def command(*arguments: str) -> tuple[int, str, str]:
        code = main(["check", *arguments])
        return code, *capsys.readouterr()

    return command


def test_check_of_a_users_rule(run: Run) -> None:
    code, out, _ = run("halt_rules:halt", "--set", "limit=0.2")
    assert code == 0 and out.count("kept    ") == len(LAWS) and out.endswith("halt_rules:halt keeps every law\n")
    code, out, _ = run("halt_rules:halt", "--set", "limit=0.2", "--set", "sign=-1")
    assert code == 1 and f"BROKEN  {REINFORCE}: pi = mu" in out and out.count("kept    ") == len(LAWS) - 1
    assert out.endswith(f"halt_rules:halt: 1 of {len(LAWS)} laws broken\n")


def test_check_takes_registered_names_and_null(run: Run) -> None:
    assert run("cppo", "--set", "delta_b=null", "--set", "soft=true", "--set", "delta=6e-2")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["halt_rules:stop"], "halt_rules has no function stop"),
        (["no_such_module:halt"], "No module named 'no_such_module'"),
        (["cpo"], "unknown objective 'cpo'"),
        (["cppo", "--set", "detla=0.1"], "detla: unknown parameter"),
        (["cppo", "--set", "delta=much"], "delta: 'much'"),
        (["cppo", "--set", "delta"], "--set delta: expected key=value"),
        (["cppo", "--set", "delta=-1"], "must be above 0"),
    ],
)
def test_check_of_a_users_mistake(run: Run, arguments: list[str], message: str) -> None:
    code, out, err = run(*arguments)
    assert code == 2 and message in err and len(err.splitlines()) == 1 and not out
