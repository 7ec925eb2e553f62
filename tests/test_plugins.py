"""Code of a user's own: found by import path, part of a run's id, and one line when it cannot be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import ROOT, smoke

from cppo import advantages, divergences
from cppo.__main__ import main
from cppo.objectives import registry as objectives_registry
from cppo.objectives import spec
from cppo.suite.suite import load_suite
from cppo.system.plugins import Registry, syntax_hash

RULE = '''
"""A rule of one's own."""
from dataclasses import dataclass
from cppo.objectives import Terms, Tokens, register
from cppo.objectives.ratio import hard_gate, log_ratio

@dataclass(frozen=True)
class Parameters:
    """Parameters of `halt`."""
    limit: float = 0.1
    """Largest log-ratio that is trained."""
    span: int = 3
    """A window of its own, which is not CPPO's."""

@register()
def halt(cfg: Parameters, tokens: Tokens) -> Terms:
    """Drops tokens whose log-ratio is beyond the limit."""
    x = log_ratio(tokens)
    return hard_gate(tokens.advantages * x.exp(), x.abs() <= cfg.limit)  # kept
'''
ADVANTAGE = '''
"""An advantage of one's own."""
from torch import Tensor
from cppo.advantages import Outcomes, register

@register()
def centred(outcomes: Outcomes) -> Tensor:
    """Rewards around their mean."""
    return outcomes.rewards - outcomes.rewards.mean()  # kept
'''
DIVERGENCE = '''
"""A divergence of one's own."""
from torch import Tensor
from cppo.divergences import Recorded, register

@register(keeps="sampled", kinds=("tv",))
def half(seen: Recorded, kind: str) -> Tensor:
    """Half the distance of the probabilities."""
    return (seen.logp.exp() - seen.rollout_logp.exp()).abs() / 2  # kept
'''


# The hash -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("# kept", "# dropped", True),
        ('"""Drops tokens whose log-ratio is beyond the limit."""', '"""Keeps the rest."""', True),
        ('    """Drops tokens whose log-ratio is beyond the limit."""\n', "", True),
        ('"""Largest log-ratio that is trained."""', '"""Trust."""', True),
        ('"""A rule of one\'s own."""\n', "", True),
        ("x.abs() <= cfg.limit", "(x.abs() <=\n        cfg.limit)", True),
        ("x.abs() <= cfg.limit", "x.abs() < cfg.limit", False),
        ("limit: float = 0.1", "limit: float = 0.2", False),
        ("x = log_ratio(tokens)", "x = 2 * log_ratio(tokens)", False),
        ("x = log_ratio(tokens)", 'x = log_ratio(tokens); y = "text"', False),
    ],
)
def test_the_hash_is_that_of_the_code(old: str, new: str, same: bool) -> None:
    """Comments, docstrings, the sentences under fields and layout are no part of it."""
    assert RULE.count(old) == 1
    assert (syntax_hash(RULE.replace(old, new)) == syntax_hash(RULE)) is same


# The id ---------------------------------------------------------------------------------------------------------------

USES: dict[str, tuple[str, dict[str, Any]]] = {
    "objective": (RULE, {"objective": "MODULE:halt"}),
    "advantage": (ADVANTAGE, {"objective": "grpo", "advantage": "MODULE:centred"}),
    "divergence": (DIVERGENCE, {"objective": "dppo", "divergence": {"estimator": "MODULE:half"}}),
}


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for modules on the path, in which the command also runs; what is imported from it is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for registry in (objectives_registry._REGISTRY, advantages._REGISTRY, divergences._REGISTRY):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    return tmp_path


def ids(folder: Path, use: dict[str, Any], module: str) -> dict[str, str]:
    """Rule -> run id of a suite with this rule beside pg, as a fresh command sees it."""
    rule = json.loads(json.dumps({"name": "mine", **use}).replace("MODULE", module))
    suite = smoke(folder, seeds=[0], rules=[{"name": "pg", "objective": "pg"}, rule])
    return {run.rule_name: run.id for run in suite.runs()}


@pytest.mark.parametrize("what", USES)
def test_the_code_of_ones_own_module_is_part_of_the_id(what: str, modules: Path) -> None:
    """Of rules, advantages and divergences: another code is another run, another comment is not."""
    source, use = USES[what]
    path = modules / f"own_{what}.py"
    path.write_text(source)
    first = ids(modules, use, path.stem)
    path.write_text(source.replace("# kept", "# as before").replace('"""', '"""Now: ', 1))
    assert ids(modules, use, path.stem) == first
    path.write_text(source.replace("  # kept", " + 0  # kept"))
    edited = ids(modules, use, path.stem)
    assert edited["pg"] == first["pg"] and edited["mine"] != first["mine"]


def test_modules_that_ones_own_module_imports_count_too(modules: Path) -> None:
    """A rule may be spread over files; what is installed, Python's or this package's is not hashed."""
    helper = "import math\nimport torch\nLIMIT = 0.1\n"
    (modules / "own_limits").mkdir()
    (modules / "own_limits" / "__init__.py").write_text("from . import numbers_of\n")
    (modules / "own_limits" / "numbers_of.py").write_text(helper)
    path = modules / "own_spread.py"
    path.write_text(
        RULE.replace("import dataclass\n", "import dataclass\nfrom own_limits.numbers_of import LIMIT\n", 1)
    )
    use = USES["objective"][1]
    first = ids(modules, use, path.stem)
    run = next(run for run in load_suite(modules / "suite.yaml").runs() if run.rule_name == "mine")
    assert set(run.rule.code) == {"own_spread", "own_limits.numbers_of"}
    (modules / "own_limits" / "numbers_of.py").write_text(helper.replace("0.1", "0.2"))
    assert ids(modules, use, path.stem)["mine"] != first["mine"]


def test_a_strangers_span_is_the_strangers(modules: Path) -> None:
    """Only its name is CPPO's: a window shorter than the longest response is nobody's mistake."""
    (modules / "own_window.py").write_text(RULE)
    assert ids(modules, USES["objective"][1] | {"params": {"span": 8}}, "own_window")["mine"]


def test_names_of_the_package_have_no_code_in_the_id(tmp_path: Path) -> None:
    assert {run.rule.code == {} for run in smoke(tmp_path).runs()} == {True}


# What cannot be imported ----------------------------------------------------------------------------------------------

BROKEN = {
    "syntax": ("def broken(:\n", "SyntaxError: invalid syntax"),
    "name": ("x = undefined_name\n", "NameError: name 'undefined_name' is not defined"),
    "import": ("from torch import no_such_thing\n", "ImportError: cannot import name 'no_such_thing'"),
    "module": ("import flash_attn_9\n", "No module named 'flash_attn_9'"),
    "division": ("x = 1 / 0\n", "ZeroDivisionError: division by zero"),
    "lines": ("raise RuntimeError('one\\ntwo')\n", "RuntimeError: one two"),
    "annotation": (RULE.replace("cfg: Parameters", 'cfg: "NoSuch"'), "NameError: name 'NoSuch' is not defined"),
    "thawed": (RULE.replace("(frozen=True)", ""), "annotate its first parameter with a frozen dataclass"),
    "taken": (RULE.replace("def halt", "def grpo"), "objective grpo: already registered by cppo.objectives."),
    "undecorated": (RULE.replace("@register()\n", ""), "has no function halt decorated with @register()"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_module_that_cannot_be_imported_is_one_line(
    case: str, modules: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By `check` and in a suite; the module is named, and so is what Python said."""
    source, says = BROKEN[case]
    (modules / f"own_{case}.py").write_text(source)
    smoke(modules)
    raw = (modules / "suite.yaml").read_text().replace("objective: pg", f"objective: own_{case}:halt")
    (modules / "suite.yaml").write_text(raw)
    for command in (["check", f"own_{case}:halt"], ["check-suite", "suite.yaml"]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("cppo: error: ") and f"own_{case}" in error and says in error


@pytest.mark.parametrize("name", ["math:sqrt", "json:nothing", "no.such:rule", "os.path:", "a b:c", "x:y:z"])
def test_import_paths_that_lead_nowhere(name: str) -> None:
    for find in (spec, advantages.estimator, divergences.estimator):
        with pytest.raises(ValueError) as caught:
            find(name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_name_lists_the_known_ones() -> None:
    registry: Registry[int] = Registry("thing", "@thing()")

    def one() -> None: ...

    registry.add(one, 1)
    assert registry.names() == ("one",) and registry.find("one") == 1
    with pytest.raises(ValueError, match=r"^unknown thing 'two'; known: one, or 'module:function' of your own$"):
        registry.find("two")


def test_a_module_in_the_current_folder_is_found_by_the_installed_command(tmp_path: Path) -> None:
    """Whose path does not begin with the current folder, unlike that of `python -m cppo`."""
    (tmp_path / "my_rules.py").write_text(RULE)
    script = tmp_path / "bin" / "cppo"
    script.parent.mkdir()
    script.write_text("import sys\nfrom cppo.__main__ import main\nsys.exit(main(sys.argv[1:]))\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), "check", "my_rules:halt"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "my_rules:halt keeps every law"), done.stderr
