"""Sampling: which token a row's noise chooses, and which tokens end a response."""

import torch
from torch import Tensor
from transformers import GenerationConfig


def end_tokens(config: GenerationConfig) -> tuple[int, ...]:
    """Ids that end a response, one or several, from a model's generation configuration. Raises ValueError when it has none."""
    ids = config.eos_token_id
    if ids is None:
        raise ValueError(
            "generation_config.json: eos_token_id is missing; a model needs a token that ends its responses"
        )
    return tuple(ids) if isinstance(ids, list) else (ids,)


def sample(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Sampling by the inverse of the cumulative distribution function (CDF).

    logits [B, V], uniforms [B] in [0, 1) -> (ids [B], log-probabilities [B, V] at the temperature, before the cut by top_p).
    """
    logp = torch.log_softmax(logits.float() / temperature, -1)
    probability = logp.exp()
    if top_p < 1:
        ordered, order = probability.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # the likelier tokens have enough probability already
        probability = probability.scatter(-1, order, ordered.masked_fill(outside, 0))
    cdf = probability.cumsum(-1)
    # The last entry is the total: below 1 under top_p, because the tokens outside were removed without renormalising.
    threshold = uniforms.unsqueeze(-1) * cdf[:, -1:]
    ids = (cdf <= threshold).sum(-1)  # the first entry whose CDF exceeds the threshold
    # By rounding, u * total can reach the total. Then the last token that has any probability is taken.
    last = probability.shape[-1] - 1 - (probability.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(ids, last), logp
