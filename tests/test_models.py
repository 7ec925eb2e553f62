"""Log-probabilities in chunks against full logits in float64, their memory, and models that would be taken for others."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DENSE, MOE, chain_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from cppo.models.load import load_pretrained
from cppo.models.logprobs import TokenLogprobsFunction, token_logprobs

TOKENS, VOCABULARY, WIDTH, K, TEMPERATURE = 23, 50, 8, 4, 0.7


def batch(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Hidden states and a head with logits of up to about 10, ids, and an upstream gradient that differs by token."""
    g = torch.Generator().manual_seed(3)
    return {
        "hidden": torch.randn(TOKENS, WIDTH, generator=g).to(dtype),
        "weight": torch.randn(VOCABULARY, WIDTH, generator=g).to(dtype),
        "sampled": torch.randint(0, VOCABULARY, (TOKENS,), generator=g),
        "ids": torch.stack([torch.randperm(VOCABULARY, generator=g)[:K] for _ in range(TOKENS)]),
        "upstream": torch.randn(TOKENS, generator=g),
    }


def slow(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers from all logits at once, in float64, by plain autograd."""
    hidden, weight = (given[name].double().requires_grad_() for name in ("hidden", "weight"))
    logp_all = torch.log_softmax(hidden @ weight.T / TEMPERATURE, -1)
    logp = logp_all[torch.arange(TOKENS), given["sampled"]]
    to_hidden, to_weight = torch.autograd.grad((logp * given["upstream"].double()).sum(), (hidden, weight))
    return {
        "logp": logp.detach(),
        "entropy": -(logp_all.exp() * logp_all).sum(-1).detach(),
        "topk_logp": logp_all.gather(-1, given["ids"]).detach(),
        "logp_all": logp_all.detach(),
        "to_hidden": to_hidden,
        "to_weight": to_weight,
    }


def fast(given: dict[str, Tensor]) -> dict[str, Tensor]:
    hidden, weight = (given[name].clone().requires_grad_() for name in ("hidden", "weight"))
    arguments: Any = (hidden, weight, given["sampled"], TEMPERATURE, given["ids"], 0, True)
    logp, entropy, ids, topk_logp, logp_all = TokenLogprobsFunction.apply(*arguments)  # type: ignore[no-untyped-call]
    assert logp.requires_grad and not any(x.requires_grad for x in (entropy, topk_logp, logp_all))
    assert torch.equal(ids, given["ids"])
    to_hidden, to_weight = torch.autograd.grad((logp * given["upstream"]).sum(), (hidden, weight))
    return {
        "logp": logp.detach(),
        "entropy": entropy,
        "topk_logp": topk_logp,
        "logp_all": logp_all,
        "to_hidden": to_hidden,
        "to_weight": to_weight,
    }


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("rows", [1, 5, TOKENS, 1000])
def test_chunks_equal_full_logits_in_float64(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and both gradients to 1e-5, whether the chunks divide the tokens or not."""
    monkeypatch.setattr("cppo.models.logprobs.CHUNK_ELEMENTS", rows * VOCABULARY)
    found, expected = fast(batch()), slow(batch())
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert relative_error(found[name], value) < 1e-5, name


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_inputs_have_float32_log_probabilities(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact for the bfloat16 numbers they come from, under autocast too; gradients are those, rounded to bfloat16."""
    monkeypatch.setattr("cppo.models.logprobs.CHUNK_ELEMENTS", 5 * VOCABULARY)
    given = batch(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = fast(given)
    expected = slow(given)
    for name in ("logp", "entropy", "topk_logp", "logp_all"):
        assert found[name].dtype == torch.float32
        assert relative_error(found[name], expected[name]) < 1e-5, name
    rounded = torch.log_softmax((given["hidden"] @ given["weight"].T).float() / TEMPERATURE, -1)
    assert relative_error(rounded, expected["logp_all"]) > 1e-3  # what logits in bfloat16 would cost
    for name in ("to_hidden", "to_weight"):
        assert found[name].dtype == torch.bfloat16
        assert torch.allclose(found[name].double(), expected[name], rtol=2**-8, atol=1e-6), name


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, finds the size of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def ragged(model_vocabulary: int) -> tuple[list[list[int]], Tensor, Tensor]:
    """Prompts of two lengths; responses of 9, 4, 0 and 6 trained tokens, one with a hole."""
    g = torch.Generator().manual_seed(5)
    responses = torch.randint(3, model_vocabulary, (4, 9), generator=g)
    mask = torch.arange(9) < torch.tensor([9, 4, 0, 7]).unsqueeze(1)
    mask[3, 2] = False
    return [[4, 5, 6], [7, 8], [9, 4, 5], [6, 7]], responses, mask


def test_the_logits_of_all_tokens_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, no tensor is larger than a chunk of logits or the head's weight."""
    monkeypatch.setattr("cppo.models.logprobs.CHUNK_ELEMENTS", 10 * VOCABULARY)
    given = batch()
    hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()
    with Largest() as seen:
        arguments: Any = (hidden, weight, given["sampled"], TEMPERATURE, given["ids"], 0, False)
        logp, *_ = TokenLogprobsFunction.apply(*arguments)  # type: ignore[no-untyped-call]
        logp.sum().backward()
    assert seen.elements == 10 * VOCABULARY > weight.numel()


@pytest.mark.parametrize("tied", [True, False])
def test_a_models_gradients_equal_those_of_full_logits(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parameter, the embedding that is also the head included, on ragged rows with a hole and an empty one."""
    model = chain_model(DENSE.model_copy(update={"tied": tied}), "test")
    vocabulary: int = model.config.vocab_size
    prompts, responses, mask = ragged(vocabulary)
    monkeypatch.setattr("cppo.models.logprobs.CHUNK_ELEMENTS", 2 * vocabulary)
    upstream = torch.arange(1.0, 1 + mask.numel()).view_as(mask) * mask
    now = token_logprobs(model, prompts, responses, mask, TEMPERATURE, top_k=2)
    (now.logp * upstream).sum().backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model = model.double()
    model.zero_grad()
    for row, prompt in enumerate(prompts):  # row by row, without padding
        length = len(prompt)
        ids = torch.tensor([[*prompt, *responses[row].tolist()]])
        logp_all = torch.log_softmax(model(input_ids=ids).logits[0, length - 1 : -1] / TEMPERATURE, -1)
        logp = logp_all.gather(-1, responses[row].unsqueeze(-1)).squeeze(-1)
        inside = mask[row]
        assert torch.allclose(now.logp[row][inside].double(), logp[inside], rtol=1e-5, atol=1e-5)
        assert now.topk_ids is not None and torch.equal(now.topk_ids[row][inside], logp_all.topk(2, -1).indices[inside])
        assert not now.logp[row][~inside].any() and not now.entropy[row][~inside].any()
        (logp * upstream[row].double()).sum().backward()
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert relative_error(found[name], parameter.grad) < 1e-5, name


def test_no_trained_token_gives_zero_gradients() -> None:
    """A rank whose rows train nothing still takes part in the backward pass."""
    model = chain_model(DENSE, "test")
    prompts, responses, mask = ragged(model.config.vocab_size)
    now = token_logprobs(model, prompts, responses, mask & False, 1.0, topk_ids=responses.unsqueeze(-1))
    assert now.topk_logp is not None and now.topk_logp.shape == (*mask.shape, 1)
    now.logp.sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


# Checkpoints whose head is not a plain linear map ---------------------------------------------------------------------

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


def bias() -> PreTrainedModel:
    return GPTJForCausalLM(GPTJConfig(vocab_size=9, n_embd=8, n_layer=1, n_head=2, rotary_dim=4))


def granite(scaling: float) -> PreTrainedModel:
    shape = {name: value for name, value in SMALL.items() if name != "head_dim"}
    return GraniteForCausalLM(GraniteConfig(**shape, logits_scaling=scaling))


def gemma2(cap: float | None) -> PreTrainedModel:
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, query_pre_attn_scalar=8, final_logit_softcapping=cap))


def llama(tied: bool) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (bias, "the output head has a bias, which is not supported; take another checkpoint"),
        (
            partial(granite, 8.0),
            r"its logits differ by \S+% from the last hidden states times the output head's weight",
        ),
        (
            partial(gemma2, 30.0),
            r"its logits differ by \S+% from the last hidden states times the output head's weight",
        ),
    ],
    ids=["bias", "granite", "gemma2"],
)
def test_a_head_that_is_not_a_plain_linear_map_is_refused(
    model: Callable[[], PreTrainedModel], message: str, tmp_path: Path
) -> None:
    """Trainer and torch engine would agree with each other on another model than the checkpoint's, without a word."""
    model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}: {message}") as error:
        load_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "model",
    [
        partial(llama, True),
        partial(llama, False),
        partial(chain_model, DENSE),
        partial(chain_model, DENSE.model_copy(update={"tied": False})),
        partial(chain_model, MOE),
        partial(granite, 1.0),
        partial(gemma2, None),
    ],
    ids=[
        "llama tied",
        "llama",
        "qwen3 tied",
        "qwen3",
        "qwen3 experts",
        "granite without scaling",
        "gemma2 without cap",
    ],
)
def test_a_plain_head_is_loaded_whatever_the_size_of_its_logits(
    model: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    """Its log-probabilities are then the model's own."""
    for scale in (1.0, 50.0):
        made = model()
        with torch.no_grad():
            made.get_output_embeddings().weight.mul_(scale)
        made.save_pretrained(tmp_path)
        loaded = load_pretrained(tmp_path)
        assert not loaded.get_output_embeddings()._forward_hooks
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            expected = torch.log_softmax(loaded(input_ids=ids).logits[0, :-1].float(), -1)
            found = token_logprobs(loaded, [[5]], ids[:, 1:], torch.ones(1, 3, dtype=torch.bool), 1.0, full=True)
        assert found.logp_all is not None and torch.allclose(found.logp_all[0], expected, atol=1e-4)
