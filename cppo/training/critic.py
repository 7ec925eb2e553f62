"""The critic: a value model of its own, started from the base model, with its own loss and optimiser.

Rules never see values. The critic enters through the advantages only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cppo.models.logprobs import response_hidden


class ValueModel(nn.Module):
    """A language model's trunk with a scalar head, which is zero at the start: V_t = expected outcome before token t."""

    def __init__(self, trunk: PreTrainedModel) -> None:
        super().__init__()
        self.trunk = trunk.base_model  # without the output head, which no gradient would reach
        self.head = nn.Linear(trunk.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, prompts: Sequence[Sequence[int]], responses: Tensor) -> Tensor:
        """Values [B, T] of the states from which the response tokens are sampled."""
        values: Tensor = self.head(response_hidden(self.trunk, prompts, responses))
        return values.squeeze(-1).float()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float, count: float) -> Tensor:
    """1/2 sum max((V - R)^2, (V_clip - R)^2) / count with V_clip = V clipped to V_old +- clip; all [B, T].

    count: the trained tokens of the whole optimiser step. Source: proximal policy optimisation (PPO, arXiv:1707.06347) as in
    verl, which clips values.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    error = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * torch.where(mask, error, 0).sum() / count
