"""Models and tokenizers of generated task families: real architectures made small."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from cppo.suite.config import Model
from cppo.system.seeds import seed
from cppo.tasks.types import SPECIAL

PAD, EOS, UNK = range(3)


def create_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are these texts, in the order of their ids, the special ones first.

    Longer texts are matched first.
    """
    core = Tokenizer(models.WordLevel({text: i for i, text in enumerate(vocabulary)}, unk_token=SPECIAL[UNK]))
    longer = sorted((text for text in vocabulary[len(SPECIAL) :] if len(text) > 1), key=len, reverse=True)
    core.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*map(re.escape, longer), "."])), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=SPECIAL[PAD], eos_token=SPECIAL[EOS], unk_token=SPECIAL[UNK]
    )


def create_model(model: Model, setting_name: str, vocabulary_size: int) -> PreTrainedModel:
    """A freshly initialised float32 model of a real architecture, with the weights of this setting's seed.

    vocabulary_size: the number of tokens.
    """
    shape: dict[str, Any] = {
        "vocab_size": vocabulary_size,
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
        torch.manual_seed(seed("weights", setting_name))
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
