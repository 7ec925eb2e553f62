"""TrustRegionTrainer against the installed TRL: real training on a CPU, compared with the loss written out by hand.

The hand-written side shares nothing with TRL: it right-pads, computes log-probabilities with `cppo.models.logprobs`, and
takes mu from the weights that sampled. "TRL's own" is GRPOTrainer's loss on the same batch, called on the same trainer.
"""

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from tiny import DENSE, MOE
from torch import Tensor
from torch.nn.functional import pad

from cppo import divergences
from cppo.integrations import SampledTokenLoss
from cppo.loss import policy_loss
from cppo.models.create import create_model, create_tokenizer
from cppo.models.logprobs import token_logprobs
from cppo.objectives import Tokens, names, objective
from cppo.suite.setting import Model
from cppo.tasks.chain import ChainTask
from cppo.tasks.types import SPECIAL

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[trl]'")
from cppo.integrations.trl import TrustRegionTrainer, trained  # noqa: E402

TEMPERATURE = 0.9
VOCABULARY = (*SPECIAL, *ChainTask.alphabet)
LENGTH = 24
BINARY_TV = {"estimator": "binary", "kind": "tv"}
CPPO = {"delta": 0.02, "delta_b": 0.002}
# Where a default would drop every response of this test's strong drift.
WIDER: dict[str, dict[str, Any]] = {"gspo": {"clip_low": 0.25, "clip_high": 0.25}, "trm": {"delta_max": 0.2}}


def digits(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(c.isdigit() for c in completion)) for completion in completions]


def arguments(folder: Path, **changes: Any) -> Any:
    """8 completions of 2 prompts a generation in 2 micro-batches of one optimiser step, used for 2 steps."""
    chosen: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "num_iterations": 2,
        "max_steps": 2,
        "max_completion_length": LENGTH,
        "temperature": TEMPERATURE,
        "learning_rate": 0.03,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 4,
    }
    return trl.GRPOConfig(str(folder), **{**chosen, **changes})


@dataclass(frozen=True)
class Step:
    """One micro-batch."""

    weights: dict[str, Tensor]
    """Before it."""
    batch: dict[str, Any]
    loss: float
    gradients: dict[str, Tensor]
    """After its backward pass, so with those of earlier micro-batches of the same optimiser step."""


class Recorder(TrustRegionTrainer):
    """Remembers every micro-batch."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Tensor:
        inner = self.accelerator.unwrap_model(model)
        weights = {name: value.clone() for name, value in inner.state_dict().items()}
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        gradients = {name: p.grad.clone() for name, p in inner.named_parameters() if p.grad is not None}
        self.steps = [*getattr(self, "steps", []), Step(weights, self.batch, float(loss), gradients)]
        return loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self.batch = inputs
        return super()._compute_loss(model, inputs)


def recorder(folder: Path, model: Model = DENSE, changes: dict[str, Any] | None = None, **options: Any) -> Recorder:
    data = Dataset.from_dict({"prompt": ["3a-8b*9c+5>", "7a+1>", "2a*3b-4>", "9>"]})
    return Recorder(
        create_model(model, "trl", len(VOCABULARY)),
        digits,
        arguments(folder, **(changes or {})),
        train_dataset=data,
        processing_class=create_tokenizer(VOCABULARY),
        **options,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Recorder:
    trainer = recorder(tmp_path_factory.mktemp("trl"), objective="cppo", params=CPPO, divergence=BINARY_TV)
    trainer.train()
    assert len(trainer.steps) == 4 and trainer.state.global_step == 2
    return trainer


def joined(batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Micro-batches as one batch; TRL pads prompts on the left and completions on the right, on each rank by itself."""
    keys = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "rollout_logp", "advantages")
    out = {}
    for key in keys:
        width = max(batch[key].shape[-1] for batch in batches)
        pads = [width - batch[key].shape[-1] if batch[key].dim() == 2 else 0 for batch in batches]
        sides = [(n, 0) if key.startswith("prompt") else (0, n) for n in pads]
        out[key] = torch.cat([pad(batch[key], side) for batch, side in zip(batches, sides, strict=True)])
    return out


def logp_by_hand(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """[B, T] with `cppo.models.logprobs`, from prompts without padding."""
    pairs = zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    prompts = [ids[mask.bool()].tolist() for ids, mask in pairs]
    mask = batch["completion_mask"].bool()
    return token_logprobs(model, prompts, batch["completion_ids"], mask, TEMPERATURE).logp  # type: ignore[arg-type]


def tokens_by_hand(model: Any, anchor: dict[str, Tensor], batch: dict[str, Any], mask: Tensor) -> Tokens:
    """Binary-TV tokens of `model`, with mu from the weights `anchor`."""
    sampler = create_model(DENSE, "trl", len(VOCABULARY))
    sampler.load_state_dict(anchor)
    with torch.no_grad():
        rollout_logp = logp_by_hand(sampler, batch)
    logp = logp_by_hand(model, batch)
    advantages = batch["advantages"].unsqueeze(1).expand_as(mask)
    return Tokens(logp, rollout_logp, advantages, mask, divergences.binary(logp, rollout_logp, "tv"))


def gradients_of(loss: Tensor, model: Any) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Gradients agree to `tolerance` of the largest entry, which is not 0."""
    assert found.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 1e-4
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=tolerance * scale, rtol=0, msg=name)


@pytest.mark.parametrize("update", [0, 1])
def test_two_steps_of_training_equal_the_loss_by_hand(run: Recorder, update: int) -> None:
    """Loss, gradient and logged metrics of each optimiser step, which TRL computed in two micro-batches."""
    steps = run.steps[2 * update : 2 * update + 2]
    loss = sum(step.loss for step in steps)
    logged = run.state.log_history[update]
    assert_update_by_hand(
        joined([step.batch for step in steps]),
        run.steps[0].weights,
        steps[0].weights,
        loss,
        steps[-1].gradients,
        logged,
    )
    if update == 1:
        assert logged["mask_share/threshold"] > 0 and logged["mask_share/budget"] > 0 and logged["divergence"] > 1e-3


def assert_update_by_hand(
    batch: dict[str, Tensor],
    sampler: dict[str, Tensor],
    weights: dict[str, Tensor],
    loss: float,
    gradients: dict[str, Tensor],
    logged: dict[str, float],
) -> None:
    """One optimiser step on the rows of `batch`, sampled by the weights `sampler`, at the weights `weights`."""
    mask = batch["completion_mask"].bool()
    assert len(set(mask.sum(-1).tolist())) > 3, "rows of different lengths"
    model = create_model(DENSE, "trl", len(VOCABULARY))
    model.load_state_dict(weights)
    tokens = tokens_by_hand(model, sampler, batch, mask)
    expected, metrics = policy_loss(objective("cppo", **CPPO), tokens)
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    assert_close(gradients, gradients_of(expected, model))
    assert logged["loss"] == pytest.approx(expected.item(), abs=1e-4)  # transformers rounds it
    for name, (total, count) in metrics.items():
        assert logged[name] == pytest.approx(total / count, abs=1e-6), name


def rank(index: int, port: int, folder: Path) -> None:
    """One of two processes: trains 2 steps of 4 rows each and saves its part of the second."""
    os.environ.update(
        RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    AcceleratorState._reset_state(reset_partial_state=True)  # the parent's says that there is one process
    changes = {"gradient_accumulation_steps": 1, "steps_per_generation": 1}
    trainer = recorder(folder, changes=changes, objective="cppo", params=CPPO, divergence=BINARY_TV)
    trainer.train()
    first, last = trainer.steps
    saved = (last.batch, first.weights, last.weights, last.loss, last.gradients, trainer.state.log_history)
    torch.save(saved, folder / f"rank{index}.pt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which autograd cannot survive beside a GPU")
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """The second update on 8 rows, 4 on each of two processes: what both together computed is the loss by hand."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = torch.multiprocessing.get_context("fork")  # importing TRL anew takes 10 seconds
    ranks = [fork.Process(target=rank, args=(index, port, tmp_path)) for index in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
        assert process.exitcode == 0
    parts = [torch.load(tmp_path / f"rank{index}.pt") for index in range(2)]
    batch = joined([part[0] for part in parts])
    _, sampler, weights, _, gradients, history = parts[0]
    loss = sum(part[3] for part in parts) / 2  # each rank's is scaled for gradients that are averaged
    assert_update_by_hand(batch, sampler, weights, loss, gradients, history[1])


def test_mu_stays_over_the_updates_of_a_rollout(run: Recorder) -> None:
    """The second update's ratios refer to the weights that sampled, not to those of the update before."""
    first, second = joined([step.batch for step in run.steps[:2]]), joined([step.batch for step in run.steps[2:]])
    assert torch.equal(first["rollout_logp"], second["rollout_logp"])
    for batch, step, same in ((first, run.steps[0], True), (second, run.steps[2], False)):
        model = create_model(DENSE, "trl", len(VOCABULARY))
        model.load_state_dict(step.weights)
        with torch.no_grad():
            log_ratio = logp_by_hand(model, batch) - batch["rollout_logp"]
        largest = float(log_ratio[batch["completion_mask"].bool()].abs().max())
        assert largest < 1e-5 if same else largest > 0.1


def tool_call(batch: dict[str, Any]) -> dict[str, Any]:
    """The micro-batch with holes: two tokens of the second row and one of the third are tool output."""
    tool = torch.ones_like(batch["completion_mask"])
    tool[1, 1:3] = tool[2, 0] = 0
    return {**batch, "tool_mask": tool}


@pytest.mark.parametrize("name", names())
def test_every_objective_equals_the_loss_by_hand(run: Recorder, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the second update, with holes in the mask."""
    settings = WIDER.get(name, {})
    divergence = BINARY_TV if "divergence" in objective(name, **settings).needs else None
    batch = {**tool_call(run.steps[3].batch), "denominator": 17.0}
    mask = trained(batch)
    assert not torch.equal(mask, batch["completion_mask"].bool())
    model = create_model(DENSE, "trl", len(VOCABULARY))
    model.load_state_dict(run.steps[3].weights)
    run.model.load_state_dict(run.steps[3].weights)
    monkeypatch.setattr(run, "rule", SampledTokenLoss.of(name, settings, divergence))
    found = run._compute_loss(run.model, batch)
    tokens = tokens_by_hand(model, run.steps[0].weights, batch, mask)
    loss, _ = policy_loss(objective(name, **settings), tokens, denominator=17.0)
    assert found.item() == pytest.approx(loss.item(), abs=1e-5)
    assert_close(gradients_of(found, run.model), gradients_of(loss, model), 3e-5)


CLIP = {"clip_low": 0.25, "clip_high": 0.25}
SEQUENCE = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
OWN: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    # label: objective, its settings, aggregation, TRL's settings
    "grpo, dapo": ("grpo", CLIP, "token-mean", {"loss_type": "dapo"}),
    "grpo, grpo": ("grpo", CLIP, "seq-mean-token-mean", {"loss_type": "grpo"}),
    "grpo, dr_grpo": ("grpo", CLIP, "seq-mean-token-sum-norm", {"loss_type": "dr_grpo"}),
    "grpo, two-sided": ("grpo", {**CLIP, "dual_clip": 1.5}, "token-mean", {"loss_type": "dapo", "delta": 1.5}),
    "gspo": ("gspo", CLIP, "seq-mean-token-mean", SEQUENCE),
    "cispo": ("cispo", {"clip_high": 0.25}, "token-mean", {"loss_type": "cispo", "epsilon_high": 1.25}),
    "sapo": ("sapo", {}, "seq-mean-token-mean", {"loss_type": "sapo"}),
}


@pytest.mark.parametrize("label", OWN)
def test_gradient_equals_trls_own(run: Recorder, label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one micro-batch of the second update. The clip rules' losses differ by constants that have no gradient."""
    name, settings, aggregation, theirs = OWN[label]
    run.model.load_state_dict(run.steps[3].weights)
    batch = run.steps[3].batch
    monkeypatch.setattr(run.args, "delta", theirs.get("delta"))
    for key, value in {"epsilon_low": 0.25, "epsilon_high": 0.25, **theirs}.items():
        monkeypatch.setattr(run, key, value, raising=False)
    expected = trl.GRPOTrainer._compute_loss(run, run.model, batch)
    whole = joined([step.batch for step in run.steps[2:]])["completion_mask"]
    monkeypatch.setattr(run, "rule", SampledTokenLoss.of(name, settings))
    monkeypatch.setattr(run, "aggregation", aggregation)
    monkeypatch.setattr(run, "horizon", LENGTH if aggregation.endswith("norm") else None)
    run._totals["train"].clear()
    count = float(len(whole) if aggregation.startswith("seq") else whole.sum())
    found = run._compute_loss(run.model, {**batch, "denominator": count})
    assert_close(gradients_of(found, run.model), gradients_of(expected, run.model))
    masked, counted = run._totals["train"]["mask_share"].tolist()
    if name in ("grpo", "gspo"):
        assert 0 < masked < counted
    else:
        assert found.item() == pytest.approx(expected.item(), abs=1e-6)


def test_denominator_is_the_optimiser_steps(run: Recorder) -> None:
    """All trained tokens of both micro-batches, in each of them."""
    count = float(joined([step.batch for step in run.steps[:2]])["completion_mask"].sum())
    assert [step.batch["denominator"] for step in run.steps] == [count] * 4


def test_on_policy_mixture_of_experts(tmp_path: Path) -> None:
    """One update a rollout: TRL has no log-probabilities to anchor on, so mu is computed; the router's loss is TRL's."""
    trainer = recorder(tmp_path, MOE, {"num_iterations": 1, "max_steps": 1}, objective="grpo")
    trainer.train()
    batch = trainer.steps[-1].batch
    assert "old_per_token_logps" not in batch and trainer.aux_loss_enabled
    trainer.model.load_state_dict(trainer.steps[-1].weights)
    mask = trained(batch)
    logp, _, _ = trainer._token_logprobs(trainer.model, batch)
    torch.testing.assert_close(batch["rollout_logp"][mask], logp.detach()[mask], atol=1e-5, rtol=0)
    found, expected = (c._compute_loss(trainer, trainer.model, batch) for c in (Recorder, trl.GRPOTrainer))
    assert_close(gradients_of(found, trainer.model), gradients_of(expected, trainer.model))
    assert trainer.state.log_history[0]["aux_loss"] > 0


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
@pytest.mark.parametrize("updates", [1, 2])
def test_recorded_log_probabilities_are_the_anchor(tmp_path: Path, updates: int) -> None:
    """An engine's own log-probabilities are mu; where it has none (NaN), those of the weights that sampled. Also in eval."""
    completions = [[5, 6, 7, 1], [8, 1], [9, 10, 1], [11]]

    def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
        tokenizer = create_tokenizer(VOCABULARY)
        return {
            "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": [completions[i % 4] for i in range(len(prompts))],
            "logprobs": [[-1.0, float("nan"), -3.0, -4.0][: len(completions[i % 4])] for i in range(len(prompts))],
        }

    trainer = recorder(
        tmp_path,
        changes={"max_steps": 1, "num_iterations": updates},
        objective="dppo",
        divergence=BINARY_TV,
        rollout_func=rollouts,
    )
    trainer.train()
    batch = joined([step.batch for step in trainer.steps])
    assert ("old_per_token_logps" in trainer.steps[0].batch) == (updates > 1), "TRL computes its own only then"
    model = create_model(DENSE, "trl", len(VOCABULARY))
    now = logp_by_hand(model, batch).detach()
    mask, columns = batch["completion_mask"].bool(), torch.arange(batch["completion_mask"].shape[1])
    given = torch.tensor([-1.0, 0.0, -3.0, -4.0])[columns]
    expected = torch.where(columns == 1, now, given.expand_as(now))
    torch.testing.assert_close(batch["rollout_logp"][mask], expected[mask], atol=1e-5, rtol=0)
    logged = trainer.evaluate(trainer.train_dataset)
    assert logged["eval_mask_share"] >= 0 and logged["eval_divergence"] > 0


REFUSED = [
    ({"divergence": {"estimator": "top_k", "kind": "tv", "k": 20}}, {}, "divergence.estimator: top_k"),
    ({"divergence": {"estimator": "exact", "kind": "kl"}}, {}, "divergence.estimator: exact"),
    ({"divergence": {"estimator": "k3"}}, {}, "divergence.estimator: k3"),
    ({"divergence": {"kind": "js"}}, {}, "divergence.kind: 'js'"),
    ({"divergence": {"estimator": "binary", "k": 20}}, {}, "divergence.k: unknown"),
    ({"divergence": None}, {}, "divergence: objective cppo needs one"),
    ({"objective": "unheard_of"}, {}, "unknown objective 'unheard_of'"),
    ({"params": {"detla": 0.1}}, {}, "detla: unknown parameter of objective cppo"),
    ({"params": {"shuffle": True}}, {}, "objective cppo needs position with these params"),
    ({"aggregation": "bnpo"}, {}, "aggregation: 'bnpo'"),
    ({"horizon": 9}, {}, "horizon: aggregation token-mean takes no horizon"),
    ({}, {"beta": 0.1}, "args.beta: belongs to TRL's own loss"),
    ({}, {"loss_type": "grpo"}, "args.loss_type: belongs to TRL's own loss"),
    ({}, {"epsilon_high": 0.28}, "args.epsilon_high: belongs to TRL's own loss"),
    ({}, {"top_p": 0.9}, "args.top_p: 0.9 truncates"),
    ({}, {"generation_kwargs": {"top_k": 50}}, "args.top_k: 50 truncates"),
    ({}, {"generation_kwargs": {"temperature": 0.5}}, "args.generation_kwargs: give temperature"),
    ({}, {"gradient_accumulation_steps": 4, "steps_per_generation": 1}, "gradient_accumulation_steps: 4 must divide"),
]


@pytest.mark.parametrize(("options", "changes", "message"), REFUSED, ids=[r[2] for r in REFUSED])
def test_refused_in_one_line(tmp_path: Path, options: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    """Before a model is loaded."""
    with pytest.raises(ValueError) as caught:
        TrustRegionTrainer(
            "no/such/model", digits, arguments(tmp_path, **changes), **{"divergence": BINARY_TV, **options}
        )
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_horizon_defaults_to_the_longest_completion(run: Recorder, tmp_path: Path) -> None:
    trainer = recorder(tmp_path, objective="pg", aggregation="seq-mean-token-sum-norm")
    assert trainer.horizon == LENGTH
    assert run.horizon is None


def test_a_step_without_trained_tokens_has_loss_0(tmp_path: Path) -> None:
    """All completions are truncated, and truncated ones are left out of the loss: 0, not NaN or an error."""
    trainer = recorder(
        tmp_path, changes={"mask_truncated_completions": True, "max_completion_length": 1}, objective="grpo"
    )
    trainer.train()
    assert not any(trained(step.batch).any() for step in trainer.steps)
    assert [step.loss for step in trainer.steps] == [0.0] * 4
    assert trainer.state.log_history[0]["mask_share"] is None
