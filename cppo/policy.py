"""Causal language models as policies: make, load, and read the statistics that training needs.

Legend: B rows, L prompt + response tokens, T response tokens, N trained tokens, H hidden width, V vocabulary, K top-K.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from cppo.config import Model
from cppo.problems import SPECIAL, VOCABULARY
from cppo.seeds import seed

PAD, EOS, UNK = range(3)
# Logits are made for so many vocabulary entries at a time, so that [B, T, V] never exists (64 MiB in float32).
CHUNK_ELEMENTS = 2**24


def create_tokenizer() -> PreTrainedTokenizerFast:
    """The embedded suite's tokenizer: a character a token, and one token for the opening of the box."""
    core = Tokenizer(models.WordLevel({text: i for i, text in enumerate(VOCABULARY)}, unk_token=SPECIAL[UNK]))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|."), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=SPECIAL[PAD], eos_token=SPECIAL[EOS], unk_token=SPECIAL[UNK]
    )


def create_model(model: Model, setting: str) -> PreTrainedModel:
    """A freshly initialised model of a real architecture, float32, with the weights of this setting's seed."""
    shape: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.intermediate_size,
        "max_position_embeddings": 1024,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": model.tied,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "initializer_range": 0.05,  # suits widths of 64 to 128; the default 0.02 is for thousands
        "dtype": "float32",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed("weights", setting))
        if model.architecture == "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**shape))
        return Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **shape,
                moe_intermediate_size=model.intermediate_size,
                num_experts=model.experts,
                num_experts_per_tok=model.experts_per_token,
                norm_topk_prob=True,
            )
        )


def save_pretrained(model: PreTrainedModel, folder: str | Path) -> None:
    """Write model and tokenizer as an ordinary Hugging Face checkpoint (safetensors)."""
    model.save_pretrained(folder)
    create_tokenizer().save_pretrained(folder)


def load_pretrained(folder: str | Path) -> PreTrainedModel:
    """The float32 model in a checkpoint folder. Raises ValueError when there is none; never runs code from it."""
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder}: no Hugging Face checkpoint (config.json is missing)")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: not a loadable checkpoint: {str(error).splitlines()[0]}") from None
    assert isinstance(model, PreTrainedModel)
    return model


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a checkpoint folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


@dataclass(frozen=True)
class Statistics:
    """The policy at sampled tokens, float32; values outside the mask are 0."""

    logp: Tensor
    """[B, T] log-probability of the sampled token; the only field with a gradient."""
    entropy: Tensor
    """[B, T] in nats."""
    topk_ids: Tensor | None
    """[B, T, K] the given ids, or the policy's own likeliest where `top_k` asked for them."""
    topk_logp: Tensor | None
    """[B, T, K] log-probabilities of these ids."""
    logp_all: Tensor | None
    """[B, T, V] the whole distribution, where asked for."""


def join(prompts: Sequence[Sequence[int]], responses: Tensor) -> tuple[Tensor, Tensor]:
    """Right-padded prompt + response ids [B, L] and the prompts' lengths [B]."""
    lengths = torch.tensor([len(p) for p in prompts], dtype=torch.int64)
    width = responses.shape[1]
    ids = torch.full((len(prompts), int(lengths.max()) + width), PAD, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.as_tensor(prompt)
    ids.scatter_(1, lengths.unsqueeze(1) + torch.arange(width), responses)
    return ids, lengths


def response_hidden(model: PreTrainedModel, prompts: Sequence[Sequence[int]], responses: Tensor) -> Tensor:
    """Hidden states [B, T, H] from which each response token was predicted.

    Rows are right-padded and attention is causal, so no padding mask is needed and none is given (it would be slower).
    """
    ids, lengths = join(prompts, responses)
    hidden = model.base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state  # [B, L, H]
    index = (lengths.unsqueeze(1) - 1 + torch.arange(responses.shape[1])).to(hidden.device)
    at_responses: Tensor = hidden.gather(1, index.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
    return at_responses


def statistics(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Tensor,
    mask: Tensor,
    temperature: float,
    topk_ids: Tensor | None = None,
    top_k: int = 0,
    full: bool = False,
) -> Statistics:
    """Log-probabilities, entropy and top-K log-probabilities of the policy at sampled tokens.

    prompts: B lists of ids; responses [B, T] ids; mask [B, T] bool; topk_ids [B, T, K]: ids to look up; top_k: find the
    policy's own K likeliest instead; full: also return [B, T, V].
    The output head is applied to masked-in tokens only and in chunks that are recomputed in the backward pass, so the
    logits of the whole batch never exist at once (unless `full` asks for them).
    """
    hidden = response_hidden(model, prompts, responses)[mask]  # [N, H]
    sampled = responses[mask]
    ids = topk_ids[mask].long() if topk_ids is not None else None
    head = model.get_output_embeddings()
    rows = max(CHUNK_ELEMENTS // head.weight.shape[0], 1)

    def part(hidden: Tensor, sampled: Tensor, ids: Tensor | None) -> tuple[Tensor, ...]:
        logp = torch.log_softmax(head(hidden).float() / temperature, -1)
        found = [logp.gather(-1, sampled.unsqueeze(-1)).squeeze(-1)]
        with torch.no_grad():
            found.append(-(logp.exp() * logp).sum(-1))
            if ids is not None:
                found += [ids, logp.gather(-1, ids)]
            elif top_k:
                values, own = logp.topk(top_k, -1)
                found += [own, values]
            if full:
                found.append(logp.detach())
        return tuple(found)

    pieces = []
    for start in range(0, max(len(hidden), 1), rows):
        stop = start + rows
        arguments = (hidden[start:stop], sampled[start:stop], ids[start:stop] if ids is not None else None)
        if len(hidden) > rows and torch.is_grad_enabled():
            pieces.append(checkpoint(part, *arguments, use_reentrant=False))
        else:
            pieces.append(part(*arguments))
    columns = [torch.cat(c) for c in zip(*pieces, strict=True)]

    def scatter(values: Tensor) -> Tensor:
        out = values.new_zeros(*mask.shape, *values.shape[1:])
        return out.masked_scatter(mask.reshape(*mask.shape, *[1] * (values.dim() - 1)), values)

    logp, entropy, *rest = (scatter(c) for c in columns)
    found_ids, topk = (rest.pop(0), rest.pop(0)) if topk_ids is not None or top_k else (None, None)
    return Statistics(logp, entropy, found_ids, topk, rest.pop(0) if full else None)
