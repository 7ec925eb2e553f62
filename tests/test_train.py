"""The training loop: reproducible, resumable, the same problems for every rule, and honest about failures."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from tiny import ROOT, chain_model, chain_tokenizer, run_of, smoke

from cppo.models.load import load_pretrained, save_pretrained
from cppo.objectives import names, spec
from cppo.results.checkpoint import load_latest
from cppo.results.run_folder import RunFolder, Status
from cppo.rewards import Judge
from cppo.rollout.engines import ENGINES, EngineSpec
from cppo.rollout.torch_engine import TorchEngine
from cppo.suite.config import RunConfig, Scale
from cppo.suite.suite import Suite
from cppo.tasks.types import Problem
from cppo.training.batches import problem_order, shuffled_positions
from cppo.training.run import train
from cppo.training.train import Trainer

STABLE = ("metrics.jsonl", "positions.jsonl", "tokens.jsonl")


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return smoke(tmp_path_factory.mktemp("suite"))


@pytest.fixture(scope="module")
def base(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained base model: rewards are rare, but every path of the loop runs."""
    folder = tmp_path_factory.mktemp("base")
    save_pretrained(chain_model(suite.bases()[0].setting.model, "tiny"), folder, chain_tokenizer())
    return folder


@pytest.fixture(scope="module")
def problems(suite: Suite) -> tuple[Problem, ...]:
    return suite.bases()[0].setting.task.load("tiny")[0]["train"]


@pytest.fixture(autouse=True)
def easy_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained model never solves a chain: reward responses of an even number of characters instead."""
    monkeypatch.setattr(Judge, "verdict", lambda self, response, gold: float(len(response) % 2 == 0))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_pretrained(folder).state_dict())


def same(a: Path, b: Path) -> bool:
    """Equal metrics, positions and token dumps, bit for bit, and equal final weights."""
    files = all((a / name).read_bytes() == (b / name).read_bytes() for name in STABLE)
    one, two = weights(a / "checkpoints" / "iteration-4"), weights(b / "checkpoints" / "iteration-4")
    return files and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("name", ["ppo", "cppo", "cppo_exact", "dppo_kl"])
def test_same_seed_gives_identical_metrics_and_weights(
    name: str, suite: Suite, base: Path, problems: tuple[Problem, ...], tmp_path: Path
) -> None:
    run = run_of(suite, name)
    for folder in ("a", "b"):
        train(run, base, problems, tmp_path / folder)
    assert same(tmp_path / "a", tmp_path / "b")
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    assert any(row["grad_norm"] for row in rows), "no update happened: the test would compare nothing"
    assert not same(tmp_path / "a", _trained(run_of(suite, name, seed=1), base, problems, tmp_path / "c"))


def _trained(run: RunConfig, base: Path, problems: tuple[Problem, ...], folder: Path) -> Path:
    train(run, base, problems, folder)
    return folder


class Stopped(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("name", ["ppo", "cppo"])
def test_interrupted_run_continues_to_the_same_result(
    name: str, suite: Suite, base: Path, problems: tuple[Problem, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in iteration 4, after half of its updates and its half-written streams: equal to never stopped."""
    run = run_of(suite, name)
    whole, broken = _trained(run, base, problems, tmp_path / "whole"), tmp_path / "broken"
    original = Trainer.update

    def stop(self: Trainer, *args: object, **kwargs: object) -> None:
        if self.updates == 7:
            self.append("metrics", [{"half": "written"}])
            raise Stopped
        original(self, *args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Trainer, "update", stop)
        train(run, base, problems, broken)
    assert not (broken / "DONE").exists()
    train(run, base, problems, broken)
    assert same(whole, broken)
    assert (broken / "DONE").read_text() == (whole / "DONE").read_text()


def test_every_rule_sees_the_same_problems_and_noise(
    suite: Suite, base: Path, problems: tuple[Problem, ...], tmp_path: Path
) -> None:
    """Before the first update all rules are the same policy: same problems in the same order, same responses."""
    first = {}
    for name in ("pg", "ppo", "grpo", "cppo_exact"):
        trainer = _trainer(run_of(suite, name), base, problems, tmp_path)
        sampled = trainer.builder.sample(1)
        first[name] = ([p.id for p in sampled.problems], sampled.rollouts.responses.tolist())
    assert all(value == first["pg"] for value in first.values())
    other = _trainer(run_of(suite, "pg", seed=1), base, problems, tmp_path)
    assert [p.id for p in other.builder.sample(1).problems] != first["pg"][0]


def _trainer(run: RunConfig, base: Path, problems: tuple[Problem, ...], folder: Path) -> Trainer:
    from cppo.models.load import load_tokenizer
    from cppo.training.critic import ValueModel
    from cppo.training.distributed import make_accelerator

    critic = ValueModel(load_pretrained(base)) if run.rule.advantage == "gae" else None
    policy, tokenizer = load_pretrained(base), load_tokenizer(base)
    sampler = TorchEngine(policy)
    return Trainer(
        run, RunFolder(folder), problems, policy, tokenizer, critic, Judge(), make_accelerator(None), sampler
    )


def test_each_epoch_asks_every_problem_once() -> None:
    """10 problems, 4 per rollout: five rollouts are two epochs, each a permutation."""
    asked = [i for draw in range(5) for i in problem_order(10, 4, draw, "s", 0)]
    assert sorted(asked[:10]) == sorted(asked[10:]) == list(range(10))
    assert asked[:10] != asked[10:]


def test_shuffled_positions_are_permutations_of_the_trained_tokens() -> None:
    mask = torch.tensor([[True, True, False, True], [True, False, False, False], [False] * 4])
    found = shuffled_positions(mask, "s", 0, 1)
    assert sorted(found[0, mask[0]].tolist()) == [1, 2, 3] and found[1, 0] == 1
    wide = torch.ones(64, 9, dtype=torch.bool)
    rows = {tuple(row) for row in shuffled_positions(wide, "s", 0, 1).tolist()}
    assert len(rows) > 32  # a permutation of its own for each response
    assert torch.equal(shuffled_positions(wide, "s", 0, 1), shuffled_positions(wide, "s", 0, 1))


def test_non_finite_updates_are_skipped_and_end_the_run_as_collapsed(
    suite: Suite, base: Path, problems: tuple[Problem, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN loss leaves the weights alone; after `collapse_after` in a row the run is done, with its scores kept."""
    import cppo.training.train as module

    original = module.reduce_terms

    def poisoned(*args: object) -> torch.Tensor:
        return original(*args) * torch.nan  # type: ignore[arg-type]

    monkeypatch.setattr(module, "reduce_terms", poisoned)
    folder = _trained(run_of(suite, "grpo"), base, problems, tmp_path / "nan")
    done = json.loads((folder / "DONE").read_text())
    assert RunFolder(folder).status() == Status(3, collapsed_at=3) and Status(3, collapsed_at=3).state == "collapsed"
    assert done == {"iterations": 3, "collapsed_at": 3}
    before, after = weights(base), weights(folder / "checkpoints" / "iteration-2")
    assert all(torch.equal(before[k], after[k]) for k in before)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row["nonfinite_updates"] == 1.0 for row in rows)


def test_damaged_state_falls_back_to_the_one_before_and_says_so(
    suite: Suite, base: Path, problems: tuple[Problem, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(suite, "cppo")
    whole, broken = (
        _trained(run, base, problems, tmp_path / "whole"),
        _trained(run, base, problems, tmp_path / "broken"),
    )
    (broken / "DONE").unlink()
    newest = broken / "state" / "000004" / "policy.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\0")
    train(run, base, problems, broken)
    assert same(whole, broken)
    assert "policy.safetensors: damaged" in capsys.readouterr().err
    for state in (broken / "state").iterdir():
        (state / "manifest.json").unlink()
    with pytest.raises(ValueError, match="every saved state is damaged"):
        load_latest(broken / "state", [])


def test_zero_advantage_minibatches_skip_their_step(
    suite: Suite, base: Path, problems: tuple[Problem, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rewards equal: no optimiser step, weights unchanged, every update counted as skipped."""
    monkeypatch.setattr(Judge, "verdict", lambda self, response, gold: 1.0)
    folder = _trained(run_of(suite, "cppo"), base, problems, tmp_path / "flat")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row["skipped_updates"] == 1.0 and row["zero_variance"] == 1.0 for row in rows)
    before, after = weights(base), weights(folder / "checkpoints" / "iteration-4")
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_unjudged_responses_are_counted_and_never_zero(
    suite: Suite, base: Path, problems: tuple[Problem, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Responses without a verdict leave the mean reward alone and get no advantage."""
    monkeypatch.setattr(Judge, "verdict", lambda self, response, gold: None if len(response) % 2 else 1.0)
    folder = _trained(run_of(suite, "grpo"), base, problems, tmp_path / "unjudged")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row["reward"] == 1.0 for row in rows) and any(row["unjudged"] > 0 for row in rows)


# What the trainer does not know ---------------------------------------------------------------------------------------


MY_ENGINE = """
import copy

import torch

from cppo.models.load import load_pretrained
from cppo.rollout.engines import ENGINES, EngineSpec
from cppo.rollout.torch_engine import TorchEngine


class MyEngine(TorchEngine):
    separate = True
    late = False

    @classmethod
    def start(cls, checkpoint, policy, scale):
        return cls(load_pretrained(checkpoint))  # weights of its own

    def sync(self, policy):
        if not self.late:
            self.model.load_state_dict(policy.weights(), strict=False)
"""


@pytest.fixture
def my_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An engine of one's own: a module with a class, and an entry; the name of its module."""
    (tmp_path / "engine_of_mine.py").write_text(MY_ENGINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(ENGINES, "mine", EngineSpec("engine_of_mine", "MyEngine", full=True, install="nothing to do"))
    return "engine_of_mine"


def with_engine(run: RunConfig, engine: str) -> RunConfig:
    return run.model_copy(update={"setting": run.setting.model_copy(update={"scale": Scale(engine=engine)})})


def test_an_engine_of_ones_own_is_compared_with_the_trainer(
    my_engine: str,
    suite: Suite,
    base: Path,
    problems: tuple[Problem, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every iteration, since its weights are its own; and its run is the torch engine's."""
    run = run_of(suite, "grpo")
    mine, plain = tmp_path / "mine", tmp_path / "plain"
    _trained(with_engine(run, "mine"), base, problems, mine)
    _trained(run, base, problems, plain)
    rows, without = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (mine, plain)
    )
    assert all(0 <= row["mismatch_logp/max"] < 1e-4 for row in rows) and any(row["grad_norm"] for row in rows)
    assert [{k: v for k, v in row.items() if not k.startswith("mismatch_")} for row in rows] == without
    assert capsys.readouterr().err.count("engine against trainer at the same weights: |log pi - log mu| q50") == 1


def test_an_engine_with_stale_weights_ends_the_run(
    my_engine: str,
    suite: Suite,
    base: Path,
    problems: tuple[Problem, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = importlib.import_module(my_engine)
    monkeypatch.setattr(module.MyEngine, "late", True)
    run = with_engine(run_of(suite, "grpo"), "mine")
    optimizer = run.setting.optimizer.model_copy(update={"lr": 0.1, "warmup_updates": 0})
    run = run.model_copy(update={"setting": run.setting.model_copy(update={"optimizer": optimizer})})
    with pytest.raises(ValueError, match=r"scale\.engine mine: its log-probabilities are not the trainer's") as error:
        train(run, base, problems, tmp_path / "late")
    assert "\n" not in str(error.value)
    assert len((tmp_path / "late" / "metrics.jsonl").read_text().splitlines()) == 1


def test_the_trainer_knows_no_rule_by_name() -> None:
    """Neither a registered objective nor the class of its parameters, in code or in a string; documentation may name them."""
    known = set(names()) | {spec(name).params.__name__ for name in names()}
    for path in sorted((ROOT / "cppo" / "training").glob("*.py")):
        tree = ast.parse(path.read_text())
        documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        words: set[str] = set()
        for node in ast.walk(tree):
            match node:
                case ast.Constant(value=str() as text) if id(node) not in documentation:
                    words |= set(re.findall(r"\w+", text))
                case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
                    words |= set(name.split("."))
        # The package has the name of a rule. Only the project that trackers are told of is called so.
        named = words & known - ({"cppo"} if path.name == "distributed.py" else set())
        assert not named, f"{path.name}: {named}"
        assert not {word for word in words if word.startswith("delta")}, path.name
