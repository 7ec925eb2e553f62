"""Rollouts: responses sampled from the frozen policy mu, with what was recorded of mu at sampling."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from cppo.suite.config import Scale


@dataclass(frozen=True)
class Record:
    """What a rollout keeps of mu besides the sampled token's log-probability."""

    top_k: int = 0
    """K: the likeliest tokens of each position are kept with their log-probabilities; 0 = none."""
    full: bool = False
    """Whether the whole distribution is kept (small vocabularies only)."""


SAMPLED_ONLY = Record()
"""Keep the sampled token's log-probability only."""


@dataclass(frozen=True)
class Rollouts:
    """B sampled responses, right-padded to T tokens. Log-probabilities are float32, after the temperature."""

    prompts: tuple[tuple[int, ...], ...]
    """B prompts as token ids."""
    responses: Tensor
    """[B, T] int64 token ids. The end-of-sequence token belongs to the response."""
    mask: Tensor
    """[B, T] bool: the tokens that are trained. A row may have holes: tokens that were not sampled, such as a tool's."""
    truncated: Tensor
    """[B] bool: reached the longest length without an end-of-sequence token."""
    logp: Tensor
    """[B, T] log mu(y_t), 0 in padding."""
    topk_ids: Tensor | None = None
    """[B, T, K] int32, likeliest first."""
    topk_logp: Tensor | None = None
    """[B, T, K] their log-probabilities."""
    logp_all: Tensor | None = None
    """[B, T, V] log-probabilities of the whole vocabulary."""

    @property
    def lengths(self) -> Tensor:
        """[B] the number of trained tokens of each response."""
        return self.mask.sum(-1)

    def token_lists(self) -> list[list[int]]:
        """B responses, their trained tokens only."""
        return [ids[mask].tolist() for ids, mask in zip(self.responses, self.mask, strict=True)]

    def rows(self, index: Tensor) -> "Rollouts":
        """These rows, trimmed after the last trained token of any of them."""
        # Not the number of trained tokens: a mask may have holes.
        trained = self.mask[index].any(0).nonzero()
        width = int(trained.max()) + 1 if len(trained) else 1

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[index, :width]

        return Rollouts(
            prompts=tuple(self.prompts[i] for i in index.tolist()),
            responses=self.responses[index, :width],
            mask=self.mask[index, :width],
            truncated=self.truncated[index],
            logp=self.logp[index, :width],
            topk_ids=pick(self.topk_ids),
            topk_logp=pick(self.topk_logp),
            logp_all=pick(self.logp_all),
        )

    def to(self, device: torch.device | str) -> "Rollouts":
        """The same rollouts on another device."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        moved: dict[str, Any] = {name: x.to(device) for name, x in values if isinstance(x, Tensor)}
        return replace(self, **moved)


def concatenate(parts: Sequence[Rollouts]) -> Rollouts:
    """All rows of all parts, padded to the longest response."""
    width = max(part.responses.shape[1] for part in parts)

    def stack(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        if tensors[0] is None:
            return None
        return torch.cat([widen(tensor, width) for tensor in tensors])

    responses, mask, logp = stack("responses"), stack("mask"), stack("logp")
    assert responses is not None and mask is not None and logp is not None
    return Rollouts(
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
        responses=responses,
        mask=mask,
        truncated=torch.cat([part.truncated for part in parts]),
        logp=logp,
        topk_ids=stack("topk_ids"),
        topk_logp=stack("topk_logp"),
        logp_all=stack("logp_all"),
    )


def widen(x: Tensor, width: int) -> Tensor:
    """x [B, T, ...], filled with zeros (False) up to `width` columns."""
    return torch.cat([x, x.new_zeros(x.shape[0], width - x.shape[1], *x.shape[2:])], 1)


class EngineDied(ValueError):
    """The process of an engine has ended."""


class Policy(Protocol):
    """The policy in training, as an engine sees it when the engine takes over the policy's weights."""

    module: PreTrainedModel
    accelerator: Accelerator

    def weights(self) -> dict[str, Tensor]:
        """Whole tensors on the CPU of the main process, nothing on the other ranks. Every rank must call it."""
        ...


class Engine(Protocol):
    """Samples responses. In training every rank has an engine, for the rank's own prompts."""

    separate: bool
    """Whether it has weights of its own. `sync` brings them, and the trainer compares the engine's log-probabilities with its
    own in every iteration. An engine that is not separate samples from the policy, whose parameters the caller gathers."""

    @classmethod
    def start(cls, checkpoint: str | Path, policy: PreTrainedModel | None, scale: Scale | None) -> Self:
        """The engine with a checkpoint's weights, beside `policy` in training, otherwise with a GPU to itself.

        Raises ValueError when it does not start.
        """
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        uniforms: Tensor,
        temperature: float,
        top_p: float = 1.0,
        record: Record = SAMPLED_ONLY,
    ) -> Rollouts:
        """One response per prompt, of at most T tokens.

        uniforms: [B, T] in [0, 1), the sampling noise of each row and position, or what it is seeded from.
        top_p: sample from the smallest set of tokens with at least this probability. The recorded log-probabilities
        are those before this cut, or NaN where an engine does not know them.
        """
        ...

    def sync(self, policy: Policy) -> None:
        """Sample from the policy's present weights from now on. Every rank must call it."""
        ...

    def sleep(self) -> None:
        """Leave the accelerator to the updates until the next `sync`."""
        ...

    def close(self) -> None:
        """End the processes that the engine started."""
        ...
