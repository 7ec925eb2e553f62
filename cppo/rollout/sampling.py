"""Sampling: which token a row's noise chooses, and which tokens end a response."""

import torch
from torch import Tensor
from transformers import GenerationConfig


def end_tokens(config: GenerationConfig) -> tuple[int, ...]:
    """Ids that end a response: a model's generation configuration names one or several. ValueError when it names none."""
    ids = config.eos_token_id
    if ids is None:
        raise ValueError(
            "generation_config.json: eos_token_id is missing; a model needs a token that ends its responses"
        )
    return tuple(ids) if isinstance(ids, list) else (ids,)


def sample(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling. logits [B, V], uniforms [B] -> (ids [B], log-probabilities [B, V] at the temperature)."""
    logp = torch.log_softmax(logits.float() / temperature, -1)
    probability = logp.exp()
    if top_p < 1:
        ordered, order = probability.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # the mass before it already suffices
        probability = probability.scatter(-1, order, ordered.masked_fill(outside, 0))
    cdf = probability.cumsum(-1)
    threshold = uniforms.unsqueeze(-1) * cdf[:, -1:]
    ids = (cdf <= threshold).sum(-1)  # the first entry whose CDF exceeds the threshold
    # Rounding of u * total can reach the total: then take the last token that has any probability.
    last = probability.shape[-1] - 1 - (probability.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(ids, last), logp
