"""From samples to batches: anchors, shaping, dynamic sampling."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import ROOT, chain_model, chain_tokenizer, run_of

from cppo.advantages import Outcomes, estimator, zero_variance
from cppo.diagnostics import Stopwatch, by_token
from cppo.models.logprobs import token_logprobs
from cppo.objectives import Terms, Tokens
from cppo.rewards import Judge
from cppo.rollout.torch_engine import TorchEngine
from cppo.rollout.types import Rollouts, concatenate
from cppo.suite.config import RunConfig
from cppo.suite.suite import load_suite, objective_of
from cppo.training.batches import Batch, BatchBuilder, GradedRollouts
from cppo.training.distributed import Learner, make_accelerator


def run_with(folder: Path, entry: dict[str, Any], **rollout: Any) -> RunConfig:
    """smoke's run of one rule, with changed keys of its rollout."""
    raw = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    raw["rules"] = [{"name": "x", **entry}]
    raw["settings"]["tiny"]["rollout"] |= rollout
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(raw))
    return run_of(load_suite(path), "x")


def builder(run: RunConfig) -> BatchBuilder:
    problems = run.setting.task.load(run.setting_name)[0]["train"]
    model, optimizer = chain_model(run.setting.model, run.setting_name), run.setting.optimizer
    policy = Learner(make_accelerator(None), model, optimizer.lr, optimizer)
    rule, engine = objective_of(run.rule), TorchEngine(model)
    return BatchBuilder(run, rule, problems, policy, chain_tokenizer(), None, Judge(), Stopwatch(), engine)


@pytest.fixture(autouse=True)
def rewards_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained model solves nothing: reward every third length instead, so that some groups are flat and some not."""
    monkeypatch.setattr(Judge, "verdict", lambda self, response, gold: float(len(response) % 3 == 0))


TOP_K = {"objective": "dppo", "divergence": {"estimator": "top_k", "k": 3}}


def test_recomputed_anchor_is_the_policy_before_the_first_update(tmp_path: Path) -> None:
    """Log-probabilities and top-K are the current policy's own; the sampled tokens stay."""
    run = run_with(tmp_path, {**TOP_K, "anchor": "recomputed"})
    made = builder(run)
    sampled = made.sample(1)
    with torch.no_grad():
        for parameter in made.policy.module.parameters():
            parameter.mul_(1.5)  # the engine's weights and the trainer's now differ
    batch = made.batch(1, sampled)
    assert torch.equal(batch.rollouts.responses, sampled.rollouts.responses)
    assert not torch.allclose(batch.rollouts.logp, sampled.rollouts.logp, atol=1e-2)
    now = token_logprobs(
        made.policy.module, sampled.rollouts.prompts, sampled.rollouts.responses, sampled.rollouts.mask, 1.0, full=True
    )
    assert now.logp_all is not None and batch.rollouts.topk_ids is not None and batch.rollouts.topk_logp is not None
    assert torch.equal(batch.rollouts.logp, now.logp)
    values, ids = now.logp_all.topk(3, -1)
    mask = sampled.rollouts.mask
    assert torch.equal(batch.rollouts.topk_ids[mask], ids[mask])
    assert torch.allclose(batch.rollouts.topk_logp[mask], values[mask])


def test_decoupled_anchor_weights_the_advantages(tmp_path: Path) -> None:
    """A_t min(pi_old / mu, C), token by token; with equal weights of engine and trainer nothing changes."""
    run = run_with(tmp_path, {"objective": "grpo", "anchor": "decoupled", "tis_cap": 1.2})
    made = builder(run)
    sampled = made.sample(1)
    mask = sampled.rollouts.mask
    plain, _ = estimator("grpo")(Outcomes(sampled.rewards, mask, 4))
    assert torch.allclose(made.batch(1, sampled).advantages, plain, atol=1e-4)
    with torch.no_grad():
        for parameter in made.policy.module.parameters():
            parameter.mul_(1.5)
    batch = made.batch(1, sampled)
    weight = (batch.rollouts.logp - sampled.rollouts.logp).exp().clamp(max=1.2)
    assert bool((weight[mask] == 1.2).any()) and bool((weight[mask] < 1).any())
    assert torch.allclose(batch.advantages, plain * weight)


def test_overlong_shaping_lowers_rewards_near_the_limit_only(tmp_path: Path) -> None:
    """24 tokens at most, buffer 10: 0 up to 14 tokens, then a tenth per token, -1 at 24. Verdicts stay as they are."""
    run = run_with(tmp_path, {"objective": "grpo"}, overlong_buffer=10)
    sampled = builder(run).sample(1)
    lengths = sampled.rollouts.lengths
    expected = sampled.verdicts - ((lengths - 14).clamp(min=0) / 10)
    assert torch.allclose(sampled.rewards, expected.float())
    assert bool((lengths > 14).any()) and bool((lengths < 14).any())


def flat(sampled: GradedRollouts) -> int:
    return int(zero_variance(sampled.rewards, 4)[::4].sum())


def test_dynamic_sampling_replaces_flat_groups_while_it_may(tmp_path: Path) -> None:
    """Every replacement is a later prompt with variance; informative groups stay; the number of prompts is kept."""
    plain = builder(run_with(tmp_path, {"objective": "grpo"})).collect(1)
    more = builder(run_with(tmp_path, {"objective": "grpo"}, resample=3)).collect(1)
    assert flat(plain) > flat(more) >= 0
    assert len(more.rewards) == len(plain.rewards) == len(more.problems)
    informative = ~zero_variance(plain.rewards, 4)
    kept = {p.id for p, keep in zip(plain.problems, informative.tolist(), strict=True) if keep}
    assert kept <= {p.id for p in more.problems}
    for row, problem in enumerate(more.problems):
        assert problem == more.problems[row - row % 4]  # a prompt's rows are neighbours


def test_concatenated_rollouts_keep_their_rows(tmp_path: Path) -> None:
    made = builder(run_with(tmp_path, TOP_K))
    a, b = made.sample(1).rollouts.rows(torch.arange(4)), made.sample(2).rollouts
    joined = concatenate([a, b])
    back = joined.rows(torch.arange(4, 4 + len(b.mask)))
    for name in ("responses", "mask", "logp", "topk_ids", "topk_logp", "truncated"):
        assert torch.equal(getattr(back, name), getattr(b, name)), name
    assert torch.equal(joined.mask[:4].sum(-1), a.lengths) and back.prompts == b.prompts


# Masks with holes: tokens that were not sampled, such as a tool's -----------------------------------------------------


def holed() -> Rollouts:
    """Three responses of 6, 3 and 5 columns; the first has its trained tokens in columns 0, 1, 4, 5."""
    mask = torch.tensor([[1, 1, 0, 0, 1, 1], [0, 1, 1, 0, 0, 0], [1, 0, 0, 1, 1, 0]]).bool()
    responses = torch.arange(1, 19).view(3, 6)
    logp = -responses / 10.0
    topk = torch.stack([responses, responses + 1], -1)
    full = -torch.arange(3 * 6 * 4).view(3, 6, 4) / 10.0
    truncated = torch.tensor([True, False, True])
    return Rollouts(((1, 2), (3,), (4, 5)), responses, mask, truncated, logp, topk.int(), -topk / 10.0, full)


def test_rows_of_a_mask_with_holes_keep_all_their_trained_tokens() -> None:
    """Trimmed after the last trained token, which is not the number of trained tokens."""
    whole = holed()
    assert whole.lengths.tolist() == [4, 2, 3]
    assert whole.token_lists() == [[1, 2, 5, 6], [8, 9], [13, 16, 17]]
    for index, width in (([0], 6), ([1], 3), ([2, 1], 5), ([2, 0, 1], 6)):
        part = whole.rows(torch.tensor(index))
        assert part.mask.shape == (len(index), width)
        assert part.token_lists() == [whole.token_lists()[i] for i in index]
        for name in ("responses", "logp", "topk_ids", "topk_logp", "logp_all"):
            before, after = getattr(whole, name)[torch.tensor(index)], getattr(part, name)
            assert torch.equal(after, before[:, :width]), name
        assert part.prompts == tuple(whole.prompts[i] for i in index)


def test_concatenated_rows_with_holes_keep_all_their_trained_tokens() -> None:
    whole = holed()
    joined = concatenate([whole.rows(torch.tensor([1])), whole.rows(torch.tensor([2, 0]))])
    assert joined.token_lists() == [whole.token_lists()[i] for i in (1, 2, 0)]
    assert joined.logp[joined.mask].tolist() == [float(x) for i in (1, 2, 0) for x in whole.logp[i][whole.mask[i]]]


def test_a_micro_batch_with_holes_keeps_all_its_trained_tokens() -> None:
    """Advantages, positions, values and returns stay beside their tokens; a row without a verdict is not judged."""
    whole = holed()
    columns = {name: torch.rand(3, 6) for name in ("advantages", "values", "returns")}
    rewards, position = torch.tensor([1.0, math.nan, 0.0]), whole.mask.cumsum(-1)
    batch = Batch((), whole, rewards, rewards, position=position, **columns)
    for index in ([0, 1], [2]):
        rows = torch.tensor(index)
        part = batch.micro_batch(rows, torch.device("cpu"))
        inside = whole.mask[rows]
        assert part.rollouts.token_lists() == [whole.token_lists()[i] for i in index]
        for name, column in (*columns.items(), ("position", position)):
            assert torch.equal(getattr(part, name)[part.rollouts.mask], column[rows][inside]), name
        assert part.judged.sum(-1).tolist() == [0 if i == 1 else int(whole.lengths[i]) for i in index]


def test_a_token_dump_with_holes_has_all_trained_tokens() -> None:
    whole = holed()
    mask, zeros = whole.mask, torch.zeros(3, 6)
    tokens = Tokens(zeros, zeros, torch.arange(18.0).view(3, 6), mask)
    reason = torch.where(mask, torch.tensor([[2], [0], [1]]), 0)
    terms = Terms(zeros, zeros, reason, traces={"shown": whole.logp, "of a row": torch.zeros(3)})
    dumped = by_token(tokens, terms, whole.responses, [10, 11, 12], lambda ids: str(ids[0]), count=3)
    assert [row["row"] for row in dumped] == [10, 12, 11]  # most masked tokens first
    for row in dumped:
        i = row["row"] - 10
        assert row["token"] == [str(token) for token in whole.token_lists()[i]]
        assert row["advantage"] == tokens.advantages[i][mask[i]].tolist()
        assert row["shown"] == whole.logp[i][mask[i]].tolist()
        assert row["reason"] == [(2, 0, 1)[i]] * int(whole.lengths[i])
        assert set(row) == {"row", "token", "advantage", "ratio", "reason", "shown"}


def test_an_unknown_estimator_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown advantage 'x'; known: dr_grpo"):
        estimator("x")
