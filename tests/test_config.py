"""Suites: what is committed loads, ids follow the numbers, and every mistake is one line naming file and key."""

import copy
import functools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import golden_ids
import pytest
import yaml
from golden_ids import fingerprint
from pydantic import Field

from cppo.__main__ import main
from cppo.suite.config import parse_run
from cppo.suite.schema import LATER, NOT_HASHED, Config, content_hash
from cppo.suite.suite import Suite, load_suite

ROOT = Path(__file__).resolve().parent.parent
SUITES = sorted((ROOT / "config").glob("*.yaml"))
TEXT = """
description: Every kind of key.
seeds: [0, 1]
settings:
  tiny:
    title: Tiny
    model: {architecture: qwen3, hidden_size: 16, layers: 1, heads: 2, kv_heads: 1, head_dim: 8, intermediate_size: 32}
    task: {family: chain, sizes: [1, 2], problems: 64, weak: 0.25, benchmarks: [{name: chain1, size: 1, problems: 4},
                                                                                {name: chain3, size: 3, problems: 4}]}
    warm_start: {max_steps: 400, target_accuracy: 0.1, check_every: 20, batch: 64, lr: 0.01}
    rollout: {prompts: 8, responses: 4, minibatch: 4, max_response_tokens: 24}
    optimizer: {lr: 1e-3, warmup_updates: 2}
    critic: {lr_factor: 10.0}
    iterations: 4
    checkpoint_every: 2
evaluation: {samples: 4}
rules:
  - {name: pg, objective: pg}
  - {name: ppo, objective: ppo, advantage: gae}
  - {name: grpo, objective: grpo, aggregation: seq-mean-token-sum-norm}
  - {name: dppo, objective: dppo, divergence: {estimator: binary}}
  - {name: dppo-kl, objective: dppo, params: {delta: 0.05}, divergence: {estimator: top_k, kind: kl, k: 4}}
  - {name: cppo, objective: cppo, params: {delta: 0.05, adaptive: true}, divergence: {estimator: exact}}
"""
DELETE = object()
Keys = tuple[Any, ...]


@functools.cache
def parsed(text: str) -> dict[str, Any]:
    """A suite as plain data; PyYAML alone would read 1e-3 as text."""
    data: dict[str, Any] = yaml.safe_load(re.sub(r"\b(\d)e-", r"\1.0e-", text))
    return data


def example() -> dict[str, Any]:
    """The suite above as data of one's own."""
    return copy.deepcopy(parsed(TEXT))


def nodes(node: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Every node below with its path; a rule is addressed by its position."""
    yield keys, node
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        yield from nodes(child, (*keys, key))


def leaves() -> list[tuple[Keys, Any]]:
    return [(keys, node) for keys, node in nodes(example()) if not isinstance(node, dict | list)]


def changed(keys: Keys, value: Any, raw: dict[str, Any] | None = None) -> dict[str, Any]:
    """The example (or `raw`) with the node at `keys` set to `value` (DELETE: removed)."""
    raw = copy.deepcopy(raw or parsed(TEXT))
    node: Any = raw
    for key in keys[:-1]:
        node = node[key]
    if value is DELETE:
        del node[keys[-1]]
    else:
        node[keys[-1]] = value
    return raw


def dotted(keys: Keys) -> str:
    return ".".join(map(str, keys)) or "top"


def save(folder: Path, content: object) -> Path:
    """A suite file with this text, these bytes, or this data."""
    path = folder / "suite.yaml"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def refusal(path: Path) -> str:
    """The error of loading `path`: one printable line that starts with the path; returns what follows."""
    with pytest.raises(ValueError) as caught:
        load_suite(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and message.isprintable()
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def ids(suite: Suite) -> dict[tuple[str, int], str]:
    """(rule, seed) -> run id, of the one setting."""
    return {(run.rule_name, run.seed): run.id for run in suite.runs()}


# What loads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_committed_suites_load(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is valid, has a run for every setting, rule and seed, and no two runs are the same."""
    suite = load_suite(path)
    assert len(suite.runs()) == len(suite.settings) * len(suite.rules) * len(suite.seeds)
    assert len({run.id for run in suite.runs()}) == len({run.folder for run in suite.runs()}) == len(suite.runs())
    assert main(["check-suite", str(path)]) == 0
    assert f"{len(suite.runs())} runs" in capsys.readouterr().out


def test_the_suites_of_the_workflow_are_committed() -> None:
    assert {"smoke", "mini"} <= {path.stem for path in SUITES}


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "1.e-3", "+1e-3", "0.001", "1e-03"])
def test_a_number_with_an_exponent_is_a_number(tmp_path: Path, text: str) -> None:
    """YAML 1.1 reads 1e-3 as text; a learning rate written so must not be."""
    suite = load_suite(save(tmp_path, TEXT.replace("{lr: 1e-3,", f"{{lr: {text},")))
    assert suite.settings["tiny"].optimizer.lr == 0.001
    assert ids(suite) == ids(load_suite(save(tmp_path, example())))


@pytest.mark.parametrize(
    ("module", "later"),
    [
        ("cppo.suite.suite", "transformers lm_eval pandas vllm"),
        ("cppo.__main__", "transformers lm_eval pandas vllm huggingface_hub"),
    ],
)
def test_slow_packages_are_imported_where_they_are_used(module: str, later: str) -> None:
    """Most commands and the Snakefile start in a moment because of it; and the hub is told to stay offline before it loads."""
    code = f"import sys, {module}; sys.exit(bool(set({later.split()}) & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(("command", "offline"), [("runs", True), ("data", False)])
def test_only_data_and_base_may_ask_the_hub(tmp_path: Path, command: str, offline: bool) -> None:
    """In a process of its own: the hub's client reads its setting when it is first imported."""
    arguments = [command, "--suite", "smoke"]
    arguments += ["--setting", "tiny", "--root", str(tmp_path)] if command == "data" else []
    code = f"import cppo.__main__ as m; assert m.main({arguments}) == 0; import huggingface_hub.constants as c; "
    code += f"assert c.HF_HUB_OFFLINE is {offline}"
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)


# Run ids --------------------------------------------------------------------------------------------------------------


def backwards(node: Any) -> Any:
    """The same data with every mapping's keys in reverse order."""
    if isinstance(node, dict):
        return {key: backwards(node[key]) for key in reversed(node)}
    return [backwards(child) for child in node] if isinstance(node, list) else node


def test_equal_runs_have_equal_ids(tmp_path: Path) -> None:
    """Key order, the suite's name and description, its other rules, and a default written out change nothing."""
    expected = ids(load_suite(save(tmp_path, example())))
    other = backwards(example()) | {"description": "Another suite.", "seeds": [1]}
    other["rules"] = [entry for entry in example()["rules"] if entry["name"] == "cppo"]
    other["rules"][0]["params"] |= {"w_min": 0.8, "cap": 20, "adaptive": True}  # cap: an integer for 20.0
    path = tmp_path / "renamed.yaml"
    path.write_text(yaml.safe_dump(other, sort_keys=False))
    assert ids(load_suite(path)) == {("cppo", 1): expected["cppo", 1]}


def test_parameters_of_one_setting_are_those_parameters(tmp_path: Path) -> None:
    """`params_by_setting` wins over `params`, and the run is the one that has the value in `params`."""
    direct = changed(("rules", 5, "params"), {"delta": 0.07, "w_min": 0.5})
    override = changed(("rules", 5, "params"), {"delta": 0.05, "w_min": 0.5})
    override["rules"][5]["params_by_setting"] = {"tiny": {"delta": 0.07}}
    one, two = (ids(load_suite(save(tmp_path, raw))) for raw in (direct, override))
    assert one == two != ids(load_suite(save(tmp_path, example())))


def test_span_may_name_the_longest_response(tmp_path: Path) -> None:
    """The padded horizon is given as a number or by the name of the key that holds it."""
    one, two = (
        ids(load_suite(save(tmp_path, changed(("rules", 5, "params", "span"), span))))
        for span in (24, "max_response_tokens")
    )
    assert one == two != ids(load_suite(save(tmp_path, TEXT)))


def roomy() -> dict[str, Any]:
    """The example with room for responses to chains twice as long."""
    return changed(("settings", "tiny", "rollout", "max_response_tokens"), 60)


NUMBERS = [
    keys
    for keys, value in leaves()
    if isinstance(value, int | float) and type(value) is not bool and keys[0] != "seeds"
]


@pytest.mark.parametrize("keys", NUMBERS, ids=dotted)
def test_every_number_is_part_of_the_id(tmp_path: Path, keys: Keys) -> None:
    """A number of a rule changes the ids of its runs only, any other number those of all runs."""
    before = ids(load_suite(save(tmp_path, roomy())))
    value = dict(nodes(roomy()))[keys]
    after = ids(load_suite(save(tmp_path, changed(keys, value * 2 if isinstance(value, int) else value / 2, roomy()))))
    names = {name for name, _ in before}
    expected = {example()["rules"][keys[1]]["name"]} if keys[0] == "rules" else names
    assert before.keys() == after.keys()
    assert {name for name, seed in before if before[name, seed] != after[name, seed]} == expected
    assert len(set(after.values())) == len(after)


def test_ids_of_the_committed_suites_are_those_of_yesterday() -> None:
    """Published results are found by them."""
    prints = {path.stem: fingerprint(load_suite(path)) for path in SUITES}
    assert prints == json.loads(golden_ids.FILE.read_text()), (
        f"ids have changed; if that is meant: {golden_ids.COMMAND}"
    )


class Inner(Config):
    """A part with a key that came later."""

    rate: float
    teacher: Annotated[str | None, LATER] = None


class Outer(Config):
    """A configuration with two keys that came later and one that is not hashed."""

    inner: Inner
    parts: tuple[Inner, ...] = ()
    title: Annotated[str, NOT_HASHED] = "x"
    options: Annotated[dict[str, int], LATER] = Field(default_factory=dict)


def test_a_key_that_came_later_leaves_older_ids_alone() -> None:
    """At its default it is not hashed, wherever it stands; with another value it is."""
    old = {"inner": {"rate": 0.5}, "parts": [{"rate": 1.0}]}
    expected = content_hash(old)
    inner, part = Inner(rate=0.5), Inner(rate=1.0)
    assert content_hash(Outer(inner=inner, parts=(part,))) == expected
    assert content_hash(Outer(inner=inner, parts=(part,), title="y", options={})) == expected
    others = [
        Outer(inner=inner, parts=(part,), options={"a": 1}),
        Outer(inner=Inner(rate=0.5, teacher="t"), parts=(part,)),
        Outer(inner=inner, parts=(Inner(rate=1.0, teacher="t"),)),
        Outer(inner=inner),
    ]
    assert len({expected, *map(content_hash, others)}) == 5
    assert content_hash([Outer(inner=inner, parts=(part,))]) == content_hash([old])


def test_a_resolved_run_survives_its_file(tmp_path: Path) -> None:
    """What is written as config.json and read again has the same id."""
    for run in (*load_suite(save(tmp_path, example())).runs(), *load_suite("single_gpu").runs()):
        for config in (run, run.base):
            assert parse_run(json.loads(config.model_dump_json()), "config.json") == config
            assert parse_run(json.loads(config.model_dump_json()), "config.json").id == config.id


def test_base_models_depend_on_their_own_keys_only(tmp_path: Path) -> None:
    """The warm start is shared by runs that differ in rules, learning rate or length, but not in the task."""
    base = load_suite(save(tmp_path, example())).base("tiny")
    for keys, value, same in [
        (("settings", "tiny", "optimizer", "lr"), 0.1, True),
        (("settings", "tiny", "iterations"), 8, True),
        (("settings", "tiny", "task", "weak"), 0.5, False),
        (("settings", "tiny", "warm_start", "batch"), 8, False),
        (("settings", "tiny", "model", "layers"), 2, False),
    ]:
        found = load_suite(save(tmp_path, changed(keys, value))).base("tiny")
        assert (found.id == base.id, found.folder == base.folder) == (same, same), keys


def test_unknown_runs_and_settings_are_named(tmp_path: Path) -> None:
    suite = load_suite(save(tmp_path, TEXT))
    with pytest.raises(ValueError, match=r"^--run 0123456789: no such run"):
        suite.run("0123456789")
    with pytest.raises(ValueError, match=r"^--setting nope: not in the suite; it has tiny$"):
        suite.base("nope")


# What is refused ------------------------------------------------------------------------------------------------------

MAPPINGS = [keys for keys, node in nodes(example()) if isinstance(node, dict)]
LEAVES = [keys for keys, _ in leaves()]


@pytest.mark.parametrize("keys", MAPPINGS, ids=dotted)
def test_unknown_key_at_every_level(tmp_path: Path, keys: Keys) -> None:
    message = refusal(save(tmp_path, changed((*keys, "surprise"), 1)))
    assert "surprise" in message.split(": ")[0]
    if keys != ("settings",):  # there, "surprise" is the name of a setting that is not one
        assert "unknown key" in message or "unknown parameter" in message


@pytest.mark.parametrize("keys", LEAVES, ids=dotted)
def test_wrong_type_at_every_leaf(tmp_path: Path, keys: Keys) -> None:
    """A mapping, text for a number or a number for text, and a number of another kind."""
    value = dict(leaves())[keys]
    key = [part for part in keys if isinstance(part, str)][-1]
    for wrong in ({"a": 1}, 3 if isinstance(value, str) else "text", 0.5 if type(value) in (bool, int) else True):
        assert key in refusal(save(tmp_path, changed(keys, wrong))).split(": ")[0], wrong


@pytest.mark.parametrize("keys", [keys for keys in LEAVES if isinstance(dict(leaves())[keys], float)], ids=dotted)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_are_finite(tmp_path: Path, keys: Keys, value: float) -> None:
    message = refusal(save(tmp_path, changed(keys, value)))
    assert keys[-1] in message.split(": ")[0] and "finite" in message


TINY, ROLLOUT = ("settings", "tiny"), ("settings", "tiny", "rollout")
GRPO, DPPO, KL, CPPO = (("rules", position) for position in (2, 3, 4, 5))
VALUES: list[tuple[Keys, Any, str]] = [
    ((*ROLLOUT, "minibatch"), 3, "settings.tiny.rollout: minibatch 3 does not divide prompts 8"),
    ((*ROLLOUT, "minibatch"), 16, "settings.tiny.rollout: minibatch 16 does not divide"),
    ((*ROLLOUT, "responses"), 1, "settings.tiny.rollout.responses"),
    ((*ROLLOUT, "temperature"), 0.0, "settings.tiny.rollout.temperature"),
    ((*ROLLOUT, "max_response_tokens"), 21, "settings.tiny: rollout.max_response_tokens 21 is too short"),
    ((*TINY, "checkpoint_every"), 3, "settings.tiny: checkpoint_every 3 does not divide iterations 4"),
    ((*TINY, "iterations"), 0, "settings.tiny.iterations"),
    ((*TINY, "model", "kv_heads"), 3, "settings.tiny.model: kv_heads 3 does not divide heads 2"),
    ((*TINY, "model", "head_dim"), 7, "settings.tiny.model.head_dim"),
    ((*TINY, "model", "architecture"), "llama", "settings.tiny.model.architecture"),
    ((*TINY, "model", "architecture"), "qwen3_moe", "settings.tiny.model: experts"),
    ((*TINY, "model", "experts"), 4, "settings.tiny.model: experts"),
    ((*TINY, "model", "experts_per_token"), 1, "settings.tiny.model: experts_per_token"),
    ((*TINY, "task", "sizes"), [], "settings.tiny.task.sizes"),
    ((*TINY, "task", "sizes"), [21], "settings.tiny.task: sizes: size 21 is not in 1..20, those of family chain"),
    ((*TINY, "task", "weak"), 1.5, "settings.tiny.task.weak"),
    ((*TINY, "task", "benchmarks"), [], "settings.tiny.task.benchmarks"),
    (
        (*TINY, "task", "benchmarks", 0, "name"),
        "chain3",
        "settings.tiny.task: benchmarks: name 'chain3' is given twice",
    ),
    ((*TINY, "task", "benchmarks", 0, "name"), "train", "settings.tiny.task: benchmarks: the name 'train'"),
    ((*TINY, "task", "benchmarks", 0, "name"), "../x", "settings.tiny.task.benchmarks.0.name"),
    ((*TINY, "title"), "", "settings.tiny.title"),
    (("settings", "../x"), example()["settings"]["tiny"], "settings.../x"),
    (("settings",), {}, "settings"),
    (("evaluation", "top_p"), 0, "evaluation.top_p"),
    (("seeds",), [], "seeds"),
    (("seeds",), [0, 0], "seeds 0 is given twice"),
    (("seeds",), [0, -1], "seeds.1"),
    (("seeds",), [0, 2**31], "seeds.1"),
    (("rules",), [], "rules"),
    (("rules", 0, "name"), "grpo", "rules: name 'grpo' is given twice"),
    (("rules", 0, "name"), "base", "rules: the name 'base'"),
    *(
        (("rules", 0, "name"), name, "rules.0.name")
        for name in ("../x", "a/b", "A", "", "-a", ".", "a b", "a\n", "é", "a" * 61, "a\0")
    ),
    ((*GRPO, "objective"), "grpoo", "rules.grpo.objective: unknown objective 'grpoo'"),
    ((*GRPO, "objective"), "no.such:rule", "rules.grpo.objective: objective 'no.such:rule'"),
    ((*GRPO, "objective"), "math:sqrt", "rules.grpo.objective: objective 'math:sqrt'"),
    *(
        ((*GRPO, "objective"), text, "rules.2.objective")
        for text in ("..up:rule", ":rule", "math:", "../x", "a b", "a\0:b", "")
    ),
    ((*GRPO, "params"), {"clip_hi": 0.2}, "rules.grpo.params.clip_hi: unknown parameter"),
    ((*GRPO, "params"), {"name": 1}, "rules.grpo.params.name: unknown parameter"),
    ((*GRPO, "params"), {"clip_high": "0.2"}, "rules.grpo.params.clip_high"),
    ((*GRPO, "params"), {"clip_high": True}, "rules.grpo.params.clip_high"),
    ((*GRPO, "params"), {"clip_high": -0.2}, "rules.grpo.params.clip_high: -0.2 must be above 0"),
    ((*GRPO, "params"), {"dual_clip": 1.0}, "rules.grpo.params.dual_clip"),
    ((*GRPO, "params"), {"clip_high": 10**400}, "rules.grpo.params.clip_high"),
    ((*GRPO, "params"), [], "rules.2.params"),
    ((*CPPO, "params"), {"delta": None}, "rules.cppo.params.delta"),
    ((*CPPO, "params"), {"w_min": 1.5}, "rules.cppo.params.w_min: 1.5 must be in (0, 1]"),
    ((*CPPO, "params"), {"adaptive": 1}, "rules.cppo.params.adaptive"),
    ((*CPPO, "params"), {"span": 24.0}, "rules.cppo.params.span"),
    ((*CPPO, "params_by_setting"), {"nope": {}}, "rules.cppo.params_by_setting.nope: no such setting"),
    ((*CPPO, "params_by_setting"), {"../tiny": {}}, "rules.5.params_by_setting.../tiny"),
    (
        (*CPPO, "params_by_setting"),
        {"tiny": {"delt": 1.0}},
        "rules.cppo.params_by_setting.tiny.delt: unknown parameter",
    ),
    ((*CPPO, "params_by_setting"), {"tiny": {"delta": "a"}}, "rules.cppo.params_by_setting.tiny.delta"),
    ((*CPPO, "params_by_setting"), {"tiny": {"delta": -1.0}}, "rules.cppo.params_by_setting.tiny.delta"),
    ((*CPPO, "params_by_setting"), {"tiny": 1}, "rules.5.params_by_setting.tiny"),
    ((*CPPO, "divergence"), DELETE, "rules.cppo.divergence: objective cppo needs one"),
    ((*CPPO, "divergence"), None, "rules.cppo.divergence: objective cppo needs one"),
    ((*GRPO, "divergence"), {"estimator": "binary"}, "rules.grpo.divergence: objective grpo uses none"),
    ((*KL, "divergence", "k"), 40, "rules.dppo-kl.divergence.k: 40 must be below the vocabulary's size 40"),
    ((*KL, "divergence", "k"), 10**30, "rules.dppo-kl.divergence.k"),
    ((*KL, "divergence", "k"), 0, "rules.4.divergence.k"),
    ((*KL, "divergence", "k"), DELETE, "rules.dppo-kl.divergence.k: estimator top_k needs it"),
    ((*KL, "divergence", "estimator"), "exact", "rules.dppo-kl.divergence.k: estimator exact uses none"),
    (("settings", "tiny", "scale"), {"engine": "vllm"}, "rules.cppo.divergence.estimator: exact needs whole"),
    (("settings", "tiny", "scale"), {"engine_tolerance": 0.0}, "settings.tiny.scale.engine_tolerance"),
    ((*KL, "divergence", "kind"), "js", "rules.dppo-kl.divergence.kind: 'js' is not one of tv, kl"),
    ((*DPPO, "divergence", "support"), "union", "rules.dppo.divergence.support: estimator binary has no such option"),
    ((*GRPO, "advantage"), "none", "rules.grpo.advantage: unknown advantage 'none'; known: dr_grpo, gae"),
    ((*GRPO, "aggregation"), "mean", "rules.2.aggregation"),
    (("rules", 1), {"preset": "no_such"}, "preset"),
    # Inside unions: the key itself, without the names that pydantic gives to the members.
    ((*TINY, "task", "weakness"), 1, "settings.tiny.task.weakness: unknown key"),
    ((*TINY, "task", "benchmarks", 1, "colour"), 1, "settings.tiny.task.benchmarks.1.colour: unknown key"),
    ((*TINY, "task", "benchmarks", 1, "size"), "3", "settings.tiny.task.benchmarks.1.size: Input should be"),
    ((*TINY, "task", "benchmarks", 1, "size"), DELETE, "settings.tiny.task.benchmarks.1.size: missing key"),
    ((*TINY, "task", "family"), DELETE, "settings.tiny.task.family: missing key"),
    (
        (*TINY, "task", "family"),
        "maze",
        "settings.tiny.task.family: 'maze' is not one of 'chain', 'reduce', 'math', 'file'",
    ),
    ((*TINY, "task", "family"), "reduce", "settings.tiny.task: sizes: size 1 is not in 2..20, those of family reduce"),
    ((*TINY, "task", "family"), "file", "settings.tiny.task."),
    ((*TINY, "task"), {"family": "file", "colour": 1}, "settings.tiny.task.colour: unknown key"),
    ((*TINY, "model", "colour"), 1, "settings.tiny.model.colour: unknown key"),
    ((*TINY, "model", "layers"), DELETE, "settings.tiny.model.layers: missing key"),
    ((*TINY, "model"), {"name": "a/b", "layers": 1}, "settings.tiny.model.layers: unknown key"),
    ((*TINY, "model"), {"name": "a/b", "revision": "x"}, "settings.tiny.model.revision: String should match"),
    # Keys of older suites.
    (("objectives",), [], "objectives: is now called rules"),
    (("rules", 5, "settings"), {"delta": 0.1}, "rules.5: settings: is now called params"),
    (("rules", 5, "by_setting"), {}, "rules.5.by_setting: is now called params_by_setting"),
    ((*TINY, "critic", "lam"), 0.9, "settings.tiny.critic.lam: is now called gae_lambda"),
    (
        (*TINY, "task", "steps"),
        [1],
        "settings.tiny.task.steps: is now called sizes (of a task) or size (of a benchmark)",
    ),
    ((*TINY, "task", "benchmarks", 0, "steps"), 1, "settings.tiny.task.benchmarks.0.steps: is now called sizes"),
    ((*TINY, "scale"), {"vllm_gpus": 1}, "settings.tiny.scale.vllm_gpus: is now called engine_gpus"),
    ((*TINY, "scale"), {"vllm_memory": 0.4}, "settings.tiny.scale.vllm_memory: is now called engine_memory"),
    ((*TINY, "scale"), {"vllm_tolerance": 0.4}, "settings.tiny.scale.vllm_tolerance: is now called engine_tolerance"),
    (
        (*TINY, "scale"),
        {"engine": "verl"},
        "settings.tiny.scale: engine: verl is a trainer, not an engine: write trainer: verl",
    ),
    ((*TINY, "scale"), {"engine": "jax"}, "settings.tiny.scale: engine: 'jax' is not one of torch, vllm"),
    # Titles that say how large a model is.
    (
        (*TINY, "title"),
        "Qwen3-101k-Base",
        "settings.tiny: title: 'Qwen3-101k-Base' says 101k parameters, the model has 3,",
    ),
    ((*TINY, "title"), "Tiny 1.7B", "settings.tiny: title: 'Tiny 1.7B' says 1.7B parameters, the model has 3,"),
]


OLD_RUN = {
    "label": "cispo",
    "setting": "tiny",
    "seed": 0,
    "plan": {"title": "Qwen3-tiny", "model": {}, "task": {"family": "chain", "steps": [1, 2]}, "critic": {"lam": 0.95}},
    "objective": {"name": "cispo", "objective": "cispo", "settings": {"clip_high": 4.0}, "by_setting": {}},
    "evaluation": {"samples": 4, "temperature": 0.7, "top_p": 0.95},
}
"""The configuration of a run folder that older code made, in short."""


@pytest.mark.parametrize("kind", ["run", "base model"])
def test_folders_of_older_code_are_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line that says what to do; nothing is written beside it."""
    base = {key: OLD_RUN[key] for key in ("setting", "plan", "evaluation")}
    path = tmp_path / "036b0d6475" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(OLD_RUN if kind == "run" else base))
    assert main(["evaluate", str(path.parent)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"cppo: error: {path}: ") and error.count("\n") == 1
    assert error.endswith("older code made this folder: move it away and make it again\n")
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("title", "fits"),
    [
        ("Tiny-3k", True),
        ("Tiny 3.04k", True),
        ("Tiny", True),
        ("Tiny-3.2k", False),
        ("3M", False),
        ("GPT3k", True),
        ("v3.5", True),
    ],
)
def test_a_title_says_the_right_number_of_parameters(title: str, fits: bool, tmp_path: Path) -> None:
    """Within the rounding of two digits; words that merely end in digits are none of its business."""
    before = ids(load_suite(save(tmp_path, TEXT)))
    path = save(tmp_path, changed((*TINY, "title"), title))
    if fits:
        assert ids(load_suite(path)) == before  # and it is no part of the id
    else:
        assert "parameters, the model has" in refusal(path)


@pytest.mark.parametrize(
    ("keys", "value", "says"), VALUES, ids=[f"{dotted(keys)}-{number}" for number, (keys, _, _) in enumerate(VALUES)]
)
def test_impossible_values(tmp_path: Path, keys: Keys, value: Any, says: str) -> None:
    message = refusal(save(tmp_path, changed(keys, value)))
    assert message.startswith(says) or (says == "preset" and "preset" in message), message


@pytest.mark.parametrize("keys", [k for k in LEAVES if k[0] != "seeds" and not isinstance(k[-1], int)], ids=dotted)
def test_a_missing_key_is_named_or_has_a_default(tmp_path: Path, keys: Keys) -> None:
    path = save(tmp_path, changed(keys, DELETE))
    optional = {"architecture", "lr_factor", "warmup_updates", "advantage", "aggregation", "kind", "delta", "adaptive"}
    if keys[-1] in optional:
        load_suite(path)
    else:
        expected = "divergence.k: estimator top_k needs it" if keys[-1] == "k" else f"{keys[-1]}: missing key"
        assert expected in refusal(path)


FILES: list[tuple[str, str | bytes, str]] = [
    ("empty", "", ""),
    ("null", "null", ""),
    ("list", "[1, 2]", ""),
    ("number", "3", ""),
    ("binary", b"\x89PNG\r\n\x1a\n\x00\xff\xfe", "not UTF-8"),
    ("utf-16", TEXT.encode("utf-16"), "not UTF-8"),
    ("control character", "description: \x07", "not valid YAML"),
    ("two documents", TEXT + "---\n" + TEXT, "not valid YAML"),
    ("unclosed", TEXT + "x: [1", "not valid YAML"),
    ("tab", "description:\n\t- x", "not valid YAML"),
    ("duplicate key", TEXT + "seeds: [2]\n", "'seeds' is given twice"),
    ("duplicate inner key", TEXT.replace("layers: 1,", "layers: 1, layers: 2,"), "'layers' is given twice"),
    ("number as key", TEXT.replace("samples: 4", "4: samples"), "key 4"),
    ("cycle of lists", TEXT.replace("seeds: [0, 1]", "seeds: &a [*a]"), "an alias stands inside what it names"),
    ("cycle of mappings", TEXT.replace("{samples: 4}", "&a {samples: *a}"), "an alias stands inside what it names"),
    ("cycle in a key", TEXT.replace("{samples: 4}", "&a {*a : 4}"), "not valid YAML"),
    ("undefined alias", TEXT.replace("samples: 4", "samples: *nope"), "nope"),
    ("python object", TEXT.replace("{samples: 4}", "!!python/object/apply:os.getcwd []"), "python/object"),
    ("not a date", TEXT.replace("samples: 4", "samples: !!timestamp x"), "not valid YAML"),
    ("not a bool", TEXT.replace("samples: 4", "samples: !!bool x"), "not valid YAML"),
    ("not an integer", TEXT.replace("samples: 4", "samples: !!int x"), "not valid YAML"),
    ("no such day", TEXT.replace("samples: 4", "samples: 2026-02-31"), "not valid YAML"),
    ("a list tagged as a mapping", TEXT.replace("{samples: 4}", "!!map [1]"), "not valid YAML: expected a mapping"),
    ("a date", TEXT.replace("samples: 4", "samples: 2026-02-01"), "evaluation.samples"),
    ("too many digits", TEXT.replace("samples: 4", "samples: " + "9" * 5000), "not valid YAML"),
    ("deep", TEXT.replace("{samples: 4}", "[" * 500 + "]" * 500), "not valid YAML"),
    ("surrogate", TEXT.replace("title: Tiny", 'title: "\\ud800"'), ""),
    ("key of many lines", TEXT.replace("samples: 4", '"a\\nb\\u2028c\\e[31m\\rd": 4'), "evaluation."),
    ("number where 1e400 is infinite", TEXT.replace("{lr: 1e-3,", "{lr: 1e400,"), "settings.tiny.optimizer.lr"),
    ("text that is false", TEXT.replace("{name: pg,", "{name: no,"), "rules.0.name"),
]


@pytest.mark.parametrize(("text", "says"), [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_files_that_are_no_suite(tmp_path: Path, text: str | bytes, says: str) -> None:
    assert text != TEXT  # a replacement above would otherwise have found nothing
    assert says in refusal(save(tmp_path, text))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "nope.yaml")
    assert "no such suite" in refusal(tmp_path)
    (tmp_path / "folder.yaml").mkdir()
    assert "directory" in refusal(tmp_path / "folder.yaml")


@pytest.mark.parametrize(
    ("added", "says"),
    [
        ("{", "--add-rule '{': not JSON"),
        ("[" * 100_000, "not JSON"),
        ("3", "rules.6"),
        ('{"name": "mine", "objective": "nope"}', "rules.mine.objective"),
        ('{"name": "pg", "objective": "pg"}', "rules: name 'pg' is given twice"),
    ],
)
def test_bad_added_rules(tmp_path: Path, added: str, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_suite(save(tmp_path, TEXT), (added,))
    assert says in str(caught.value) and len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 400


def test_an_added_rule_is_one_more_rule(tmp_path: Path) -> None:
    path = save(tmp_path, TEXT)
    more = load_suite(path, ('{"name": "mine", "objective": "dppo", "divergence": {"estimator": "binary"}}',))
    assert len(more.runs()) == len(load_suite(path).runs()) + 2
    assert ids(load_suite(path)).items() < ids(more).items()


# The command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["check-suite", "runs", "data"])
@pytest.mark.parametrize(
    "content",
    [
        "",
        b"\xff\xfe",
        TEXT + "seeds: [2]\n",
        changed((*ROLLOUT, "minibatch"), 3),
        changed((*GRPO, "params"), {"clip_hi": 0.2}),
    ],
    ids=["empty", "binary", "duplicate", "minibatch", "setting"],
)
def test_the_command_line_says_it_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, content: object
) -> None:
    """Exit code 2, one line on standard error, nothing on standard output, no file written."""
    path = save(tmp_path, content)
    arguments = {
        "check-suite": [str(path)],
        "runs": ["--suite", str(path)],
        "data": ["--suite", str(path), "--setting", "tiny", "--root", str(tmp_path / "runs")],
    }
    before = path.read_bytes()
    assert main([command, *arguments[command]]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith(f"cppo: error: {path}: ")
    assert [p.name for p in tmp_path.iterdir()] == ["suite.yaml"] and path.read_bytes() == before


def test_unknown_setting_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path, TEXT)
    assert main(["data", "--suite", str(path), "--setting", "../x", "--root", str(tmp_path / "runs")]) == 2
    assert capsys.readouterr().err == "cppo: error: --setting ../x: not in the suite; it has tiny\n"
    assert not (tmp_path / "runs").exists()
