"""Two processes train as one, through DDP and FSDP2; micro-batches, bfloat16 and checkpointing keep the numbers."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny import ROOT, chain_model, chain_tokenizer

from cppo.models.load import load_pretrained, load_tokenizer, save_pretrained
from cppo.models.logprobs import token_logprobs
from cppo.results.run_folder import RunFolder
from cppo.rewards import Judge
from cppo.rollout.torch_engine import TorchEngine
from cppo.suite.config import RunConfig, Scale
from cppo.suite.suite import Suite, load_suite
from cppo.training.critic import ValueModel
from cppo.training.distributed import check_trackers, make_accelerator, rank_slice
from cppo.training.run import train
from cppo.training.train import StepMetrics, Trainer

# prompts, prompts per minibatch, scale. Two ranks get 1 and 2 of 3 prompts; in pieces of 5 rows the first has one piece, then
# none. A minibatch of 1 prompt leaves the first rank without a row in every update.
SETTINGS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "ddp": (6, 3, {"sharding": "ddp", "micro_rows": 5}),
    "fsdp2": (6, 3, {"sharding": "fsdp2", "micro_rows": 5}),
    "rowless": (3, 1, {"sharding": "fsdp2"}),
    "bf16": (6, 3, {"sharding": "fsdp2", "precision": "bfloat16", "gradient_checkpointing": True}),
}
COMPARED = ("ddp/ppo", "ddp/cppo", "fsdp2/ppo", "fsdp2/cppo", "rowless/cppo")
STOPPED, CONTINUED = "ddp/dppo", "fsdp2/dppo"


def suite_in(folder: Path) -> Suite:
    raw = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    plain = raw["settings"]["tiny"] | {
        "iterations": 2,
        "checkpoint_every": 1,
        "optimizer": {"lr": 3e-3, "warmup_updates": 1},
    }
    plain["model"]["layers"] = 2
    raw["settings"] = {
        name: plain | {"rollout": plain["rollout"] | {"prompts": prompts, "minibatch": minibatch}, "scale": scale}
        for name, (prompts, minibatch, scale) in SETTINGS.items()
    }
    raw["rules"] = [x for x in raw["rules"] if x["name"] in ("ppo", "dppo", "cppo")]
    raw["rules"][-1]["params"] = {"delta": 0.004, "delta_b": 0.002}
    raw["seeds"] = [0]
    (folder / "suite.yaml").write_text(yaml.safe_dump(raw))
    return load_suite(folder / "suite.yaml")


def find(suite: Suite, name: str) -> RunConfig:
    return next(run for run in suite.runs() if f"{run.setting_name}/{run.rule_name}" == name)


def alone(run: RunConfig, scale: Scale | None = None) -> RunConfig:
    """The run with another scale; None = one process, whole minibatches, float32."""
    return run.model_copy(update={"setting": run.setting.model_copy(update={"scale": scale})})


def train_here(run: RunConfig, base: Path, folder: Path) -> None:
    train(run, base, run.setting.task.load(run.setting_name)[0]["train"], folder)


class Stopped(Exception):
    """Stands for a kill."""


@pytest.fixture(autouse=True)
def rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of `ranks`, which need no worker."""
    monkeypatch.setattr(Judge, "verdict", ranks.reward)
    monkeypatch.setattr(Judge, "start", lambda self: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """suite.yaml and base/, an untrained model."""
    folder = tmp_path_factory.mktemp("ranks")
    suite = suite_in(folder)
    save_pretrained(chain_model(suite.bases()[0].setting.model, "tiny"), folder / "base", chain_tokenizer())
    return folder


def train_all(folder: Path) -> None:
    """one/SETTING/RULE by one process; two/SETTING/RULE by two, some of them by one before."""
    suite, base = load_suite(folder / "suite.yaml"), folder / "base"
    for name in (*COMPARED, STOPPED, CONTINUED, "bf16/cppo"):
        train_here(alone(find(suite, name)), base, folder / "one" / name)
    original = Trainer.step

    def step(self: Trainer) -> None:
        if self.iteration == 1:
            raise Stopped
        original(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Trainer, "step", step)
        train_here(find(suite, CONTINUED), base, folder / "two" / CONTINUED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    entries = [*COMPARED, f"{STOPPED}@1", CONTINUED, "bf16/cppo"]
    arguments = [str(ROOT / "tests" / "ranks.py"), str(folder / "suite.yaml"), str(base), str(folder / "two"), *entries]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def rows(folder: Path, stream: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{stream}.jsonl").read_text().splitlines()]


def assert_close(a: object, b: object, where: str) -> None:
    """Equal structure and texts, numbers within 1e-5 relative or 2e-6 absolute.

    A prefix threshold is a small difference of two sums over tokens: on one kind of processor it moves by 1.1e-6.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_close(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list) and isinstance(b, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_close(x, y, f"{where}[{i}]")
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-5, abs=2e-6), where
    else:
        assert a == b, where


def assert_same_run(one: Path, two: Path) -> None:
    for stream in ("metrics", "positions", "tokens"):
        assert_close(rows(one, stream), rows(two, stream), f"{two}/{stream}")
    for file in ("state/000002/policy", "state/000002/optimizer", "checkpoints/iteration-2/model"):
        first, second = (load_file(path / f"{file}.safetensors") for path in (one, two))
        assert first.keys() == second.keys()
        for name in first:
            assert torch.allclose(first[name], second[name], rtol=1e-5, atol=1e-5), (file, name)
    assert (one / "DONE").read_text() == (two / "DONE").read_text()


def test_two_processes_train_as_one(folder: Path, subtests: pytest.Subtests) -> None:
    """One test, for all of it is trained at once."""
    train_all(folder)
    for name in COMPARED:
        with subtests.test("losses and weights", name=name):
            check_compared(name, folder)
    for name in (STOPPED, CONTINUED):
        with subtests.test("going on under another number of processes", name=name):
            check_continued(name, folder)
    with subtests.test("bfloat16 under FSDP2"):
        check_bfloat16(folder)


def check_compared(name: str, folder: Path) -> None:
    """Ranks have 1 and 2 of 3 prompts, or 0 and 1 of 1, responses of uneven length, some groups without a signal."""
    one, two = folder / "one" / name, folder / "two" / name
    assert_same_run(one, two)
    metrics, base = rows(one, "metrics"), load_file(folder / "base" / "model.safetensors")
    assert all(row["grad_norm"] > 0 and row["truncated"] < 1 for row in metrics)
    assert any(row["unjudged"] > 0 for row in metrics) and any(0 < row["zero_variance"] < 1 for row in metrics)
    after = load_file(one / "checkpoints" / "iteration-2" / "model.safetensors")
    assert any((after[key] - base[key]).abs().max() > 1e-3 for key in base), "no weight moved: nothing was compared"
    if name.endswith("/ppo"):
        first, second = (load_file(path / "state/000002/critic.safetensors") for path in (one, two))
        worst = max(float((first[key] - second[key]).abs().max()) for key in first)
        assert worst < 1e-3, worst  # its AdamW takes steps of up to 0.03, also where a gradient is nearly rounding
    else:
        assert any(0 < row["mask_share"] < 1 for row in metrics)
        assert len(rows(one, "tokens")) == 2 * min(8, 4 * SETTINGS[name.split("/")[0]][1])


def check_continued(name: str, folder: Path) -> None:
    """Two ranks, of which one got SIGTERM, then one process; and one process, then two sharded ranks."""
    two = folder / "two" / name
    if name == STOPPED:
        assert not (two / "DONE").exists() and [row["iteration"] for row in rows(two, "metrics")] == [1]
        train_here(find(load_suite(folder / "suite.yaml"), name), folder / "base", two)
    assert_same_run(folder / "one" / name, two)


def check_bfloat16(folder: Path) -> None:
    """float32 masters, and an entropy near float32's."""
    one, two = folder / "one" / "bf16" / "cppo", folder / "two" / "bf16" / "cppo"
    state = {
        **load_file(two / "state/000002/policy.safetensors"),
        **load_file(two / "state/000002/optimizer.safetensors"),
    }
    assert {x.dtype for x in state.values()} == {torch.float32}
    first, second = (rows(path, "metrics")[0] for path in (one, two))
    assert second["entropy"] == pytest.approx(first["entropy"], rel=2e-2) and second["entropy"] != first["entropy"]


# In this process ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_state() -> Iterator[None]:
    """accelerate keeps a process's precision for good: forget it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def trainer_of(run: RunConfig, base: Path, folder: Path, checkpointing: bool = False) -> Trainer:
    policy = load_pretrained(base)
    if checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        policy.train()
    critic = ValueModel(load_pretrained(base)) if run.rule.advantage == "gae" else None
    problems = run.setting.task.load(run.setting_name)[0]["train"]
    accelerator = make_accelerator(run.setting.scale)
    return Trainer(
        run,
        RunFolder(folder),
        problems,
        policy,
        load_tokenizer(base),
        critic,
        Judge(),
        accelerator,
        TorchEngine(policy),
    )


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Of the first minibatch, policy's and critic's."""
    batch = trainer.builder.batch(1, trainer.builder.collect(1))
    trainer.update(batch, 0, StepMetrics({}))
    modules = {"policy": trainer.policy, "critic": trainer.value_model}
    found = {f"{k}.{n}": p.grad for k, m in modules.items() if m is not None for n, p in m.named_parameters()}
    assert all(grad is not None for grad in found.values())
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("rule", ["ppo", "cppo"])
def test_micro_batches_have_the_gradient_of_the_whole_minibatch(rule: str, folder: Path, tmp_path: Path) -> None:
    run = find(load_suite(folder / "suite.yaml"), f"ddp/{rule}")
    whole = gradients(trainer_of(alone(run), folder / "base", tmp_path))
    assert max(float(grad.abs().max()) for grad in whole.values()) > 1e-2
    for size in (1, 3):
        parts = gradients(trainer_of(alone(run, Scale(micro_rows=size)), folder / "base", tmp_path))
        assert all(torch.allclose(parts[name], whole[name], rtol=0, atol=1e-6) for name in whole)


def test_gradient_checkpointing_recomputes_and_changes_no_gradient(folder: Path, tmp_path: Path) -> None:
    run = alone(find(load_suite(folder / "suite.yaml"), "ddp/cppo"))
    found, passes = {}, {}
    for checkpointing in (False, True):
        trainer, count = trainer_of(run, folder / "base", tmp_path, checkpointing), []
        batch = trainer.builder.batch(1, trainer.builder.collect(1))
        trainer.policy.model.layers[0].self_attn.register_forward_hook(lambda *_, count=count: count.append(1))
        trainer.update(batch, 0, StepMetrics({}))
        found[checkpointing] = [p.grad for p in trainer.policy.parameters()]
        passes[checkpointing] = len(count)
    assert passes == {False: 1, True: 2}
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(found[False], found[True], strict=True))


def test_bfloat16_computes_in_half_and_keeps_masters_log_probabilities_and_loss_in_float32(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_state: None
) -> None:
    import cppo.training.train as module

    seen: dict[str, Any] = {}
    original = module.reduce_terms

    def spy(terms: Any, *args: Any) -> Any:
        loss = original(terms, *args)
        seen.update(loss=loss.detach())
        return loss

    def logp_of(*args: Any, **kwargs: Any) -> Any:
        now = token_logprobs(*args, **kwargs)
        seen.update(logp=now.logp.detach())
        return now

    monkeypatch.setattr(module, "reduce_terms", spy)
    monkeypatch.setattr(module, "token_logprobs", logp_of)
    run = find(load_suite(folder / "suite.yaml"), "ddp/ppo")
    found = {}
    for scale in (None, Scale(precision="bfloat16")):
        AcceleratorState._reset_state(reset_partial_state=True)
        trainer = trainer_of(alone(run, scale), folder / "base", tmp_path)
        batch = trainer.builder.batch(1, trainer.builder.collect(1))
        hidden: list[torch.dtype] = []
        layer = trainer.policy.model.layers[0].mlp.up_proj
        layer.register_forward_hook(lambda module, x, y, hidden=hidden: hidden.append(y.dtype))
        trainer.update(batch, 0, StepMetrics({}))
        tensors = [*trainer.policy.parameters(), *trainer.actor.optimizer_state().values()]
        assert {x.dtype for x in tensors} == {torch.float32}
        assert seen["logp"].dtype == seen["loss"].dtype == batch.rollouts.logp.dtype == torch.float32
        found[scale is None] = (hidden[0], float(seen["loss"]), batch.rollouts.logp[0, 0])
    assert (found[True][0], found[False][0]) == (torch.float32, torch.bfloat16)
    assert found[False][1] == pytest.approx(found[True][1], abs=2e-2)
    assert found[False][2] != found[True][2]  # the rollout's model computes in bfloat16 too


def test_shares_of_ranks_are_neighbours_and_cover_everything() -> None:
    class Rank:
        def __init__(self, rank: int, count: int) -> None:
            self.process_index, self.num_processes = rank, count

    for count in range(9):
        for world in (1, 2, 3, 5):
            shares = [rank_slice(Rank(rank, world), count) for rank in range(world)]  # type: ignore[arg-type]
            assert [i for share in shares for i in share] == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_tensorboard_gets_every_iteration_and_changes_no_file(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = alone(find(load_suite(folder / "suite.yaml"), "ddp/cppo"))
    problems, tracked = run.setting.task.load(run.setting_name)[0]["train"], tmp_path / "tracked"
    train(run, folder / "base", problems, tracked, ("tensorboard",))
    train(run, folder / "base", problems, tmp_path / "plain")
    assert (tracked / "metrics.jsonl").read_bytes() == (tmp_path / "plain" / "metrics.jsonl").read_bytes()
    events = EventAccumulator(str(tracked / "trackers" / "cppo")).Reload()
    for name in ("loss", "mask_share", "reward"):
        logged = {event.step: event.value for event in events.Scalars(name)}
        assert logged == {row["iteration"]: pytest.approx(row[name]) for row in rows(tracked, "metrics")}


def test_a_missing_tracker_is_an_error_before_training() -> None:
    with pytest.raises(ValueError, match="report_to: cppo_no_such is not installed; `pip install cppo_no_such`"):
        check_trackers(["cppo_no_such"])
