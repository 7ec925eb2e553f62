"""The KV-cache loop samples from the model it is given, and records what the trainer computes."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from tiny import DENSE, MOE, chain_model, chain_tokenizer

from cppo.diagnostics import mismatch_metrics
from cppo.models.create import EOS
from cppo.models.load import save_pretrained
from cppo.models.logprobs import token_logprobs
from cppo.rollout.engines import ENGINES, EngineSpec
from cppo.rollout.sampling import sample
from cppo.rollout.start import start_engine
from cppo.rollout.torch_engine import TorchEngine
from cppo.rollout.types import Record
from cppo.suite.config import Model, Scale
from cppo.system.seeds import uniforms

PROMPTS = ["3a-8>", "3a-8>", "1a+2b*3>", "7a*9b-1c+5>", "1a+2b*3>"]  # three lengths, repeats


def prompt_ids() -> list[list[int]]:
    tokenizer = chain_tokenizer()
    return [tokenizer(text).input_ids for text in PROMPTS]


@pytest.mark.parametrize("model", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_recorded_log_probabilities_equal_the_trainers(model: Model, temperature: float) -> None:
    """GradedRollouts, top-K and full log-probabilities agree to 1e-4 in float32 at the same weights (seen: 1e-6)."""
    policy = chain_model(model, "test")
    rollouts = TorchEngine(policy).generate(
        prompt_ids(), uniforms(5, 12, "test"), temperature, record=Record(top_k=3, full=True)
    )
    assert len(set(rollouts.lengths.tolist())) > 1 or bool(rollouts.truncated.all())
    now = token_logprobs(
        policy, rollouts.prompts, rollouts.responses, rollouts.mask, temperature, topk_ids=rollouts.topk_ids, full=True
    )
    assert torch.allclose(now.logp, rollouts.logp, atol=1e-4)
    assert now.topk_logp is not None and rollouts.topk_logp is not None
    assert torch.allclose(now.topk_logp, rollouts.topk_logp, atol=1e-4)
    assert now.logp_all is not None and rollouts.logp_all is not None
    assert torch.allclose(now.logp_all, rollouts.logp_all, atol=1e-4)
    entropy = -(rollouts.logp_all.exp() * rollouts.logp_all).sum(-1)
    assert torch.allclose(now.entropy[rollouts.mask], entropy[rollouts.mask], atol=1e-4)


def test_cached_decoding_equals_a_fresh_forward_pass_for_every_token() -> None:
    """The same responses come out when each token is sampled from a full forward pass without cache or grouping."""
    policy, noise = chain_model(DENSE, "test").eval(), uniforms(5, 12, "test")
    rollouts = TorchEngine(policy).generate(prompt_ids(), noise, 0.9, top_p=0.8)
    for row, prompt in enumerate(prompt_ids()):
        ids, expected = list(prompt), []
        for t in range(12):
            with torch.no_grad():
                logits = policy(input_ids=torch.tensor([ids])).logits[:, -1]
            token, _ = sample(logits, noise[row, t : t + 1], 0.9, 0.8)
            ids.append(int(token))
            expected.append(int(token))
            if expected[-1] == EOS:
                break
        assert rollouts.responses[row, rollouts.mask[row]].tolist() == expected
        assert bool(rollouts.truncated[row]) == (expected[-1] != EOS)


def test_any_of_the_models_end_tokens_ends_a_response() -> None:
    """A generation configuration may list several: what came first of them is the last token, and not truncated."""
    policy, noise = chain_model(DENSE, "test"), uniforms(40, 30, "test")
    prompts = prompt_ids() * 8
    one = TorchEngine(policy).generate(prompts, noise, 1.0).token_lists()
    ends = [EOS, 5, 9]
    policy.generation_config.eos_token_id = ends
    several = TorchEngine(policy).generate(prompts, noise, 1.0)
    for ids, longer, truncated in zip(several.token_lists(), one, several.truncated.tolist(), strict=True):
        first = next((i for i, token in enumerate(longer) if token in ends), None)
        assert ids == (longer if first is None else longer[: first + 1])
        assert truncated == (first is None)
    assert {ids[-1] for ids in several.token_lists()} >= {5, 9}
    policy.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="eos_token_id is missing"):
        TorchEngine(policy)


def test_the_engine_is_the_scales(tmp_path: Path) -> None:
    """The policy itself in training, the checkpoint in evaluation; vLLM is imported only where it is asked for."""
    policy = chain_model(DENSE, "test")
    save_pretrained(policy, tmp_path, chain_tokenizer())
    assert isinstance(beside := start_engine(None, tmp_path, policy), TorchEngine) and beside.model is policy
    assert isinstance(alone := start_engine(Scale(), tmp_path), TorchEngine)
    assert torch.equal(alone.model.get_input_embeddings().weight, policy.get_input_embeddings().weight)
    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(ValueError, match=r"^scale\.engine: vllm is not installed; docs/cluster\.md"):
            start_engine(Scale(engine="vllm"), tmp_path, policy)


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_engine.py").write_text("import cppo_no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    entry = EngineSpec("my_engine", "MyEngine", full=False, install="pip install cppo-no-such-package")
    monkeypatch.setitem(ENGINES, "mine", entry)
    with pytest.raises(ValueError) as error:
        start_engine(Scale(engine="mine"), tmp_path)
    assert str(error.value) == ("scale.engine: cppo_no_such_package is not installed; pip install cppo-no-such-package")


def test_an_engine_that_nobody_registered_is_named_in_the_suite() -> None:
    with pytest.raises(ValidationError, match="engine: 'sglang' is not one of torch, vllm"):
        Scale(engine="sglang")


def test_mismatch_quantiles() -> None:
    """Over trained tokens only, of ragged rows, against sorting by hand."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(101) < torch.tensor([[101], [60], [40]])
    mask[0, 50:] &= torch.arange(51) % 2 == 0  # holes
    mu = -3 * torch.rand(3, 101, generator=generator)
    pi = mu + 0.1 * torch.randn(3, 101, generator=generator)
    found = mismatch_metrics(torch.where(mask, pi, 7), torch.where(mask, mu, -9), mask)
    pairs = [(p, m) for p, m, inside in zip(pi.flatten(), mu.flatten(), mask.flatten(), strict=True) if inside]
    for name, errors in (
        ("mismatch_logp", sorted(float(abs(p - m)) for p, m in pairs)),
        ("mismatch_prob", sorted(abs(math.exp(p) - math.exp(m)) for p, m in pairs)),
    ):
        for label, q in (("q50", 0.5), ("q90", 0.9), ("q99", 0.99), ("max", 1.0)):
            place = q * (len(errors) - 1)
            low, high = errors[math.floor(place)], errors[math.ceil(place)]
            expected = low + (place - math.floor(place)) * (high - low)
            assert found[f"{name}/{label}"] == (pytest.approx(expected, rel=1e-5), 1.0)


def test_a_rows_response_depends_on_its_own_noise_only() -> None:
    """Order of rows and company in the batch change nothing: what makes common random numbers common."""
    policy, noise = chain_model(DENSE, "test"), uniforms(5, 12, "test")
    whole = TorchEngine(policy).generate(prompt_ids(), noise, 1.0)
    order = torch.tensor([3, 0, 4])
    part = TorchEngine(policy).generate([prompt_ids()[i] for i in order], noise[order], 1.0)
    for row, i in enumerate(order.tolist()):
        assert part.responses[row, part.mask[row]].tolist() == whole.responses[i, whole.mask[i]].tolist()
        assert torch.allclose(part.logp[row, part.mask[row]], whole.logp[i, whole.mask[i]], atol=1e-5)


def test_sampling_follows_the_distribution() -> None:
    """Frequencies of 40,000 draws are within four standard errors of softmax(logits / T)."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -30.0])
    n = 40_000
    ids, logp = sample(logits.expand(n, -1), uniforms(1, n, "draws")[0], 0.7, 1.0)
    expected = torch.softmax(logits / 0.7, -1)
    assert torch.allclose(logp[0].exp(), expected, atol=1e-6)
    frequency = torch.bincount(ids, minlength=5) / n
    assert ((frequency - expected).abs() <= 4 * (expected * (1 - expected) / n).sqrt() + 1e-6).all()


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, {3}), (0.6, {3}), (0.65, {3, 1}), (0.87, {3, 1}), (0.89, {3, 1, 0}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: set[int]) -> None:
    """Probabilities 0.0871, 0.2369, 0.0321, 0.6439: the nucleus grows with top_p, in order of probability."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    ids, logp = sample(logits.expand(5000, -1), uniforms(1, 5000, "nucleus")[0], 1.0, top_p)
    assert set(ids.tolist()) == kept
    assert torch.allclose(logp[0], torch.log_softmax(logits, -1))  # recorded before the cut


def test_extreme_noise_never_picks_an_impossible_token() -> None:
    """u = 0 and u just below 1 stay inside the support."""
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    for u, expected in [(0.0, 1), (1 - 2**-24, 3)]:
        assert sample(logits, torch.tensor([u]), 1.0, 1.0)[0].item() == expected
