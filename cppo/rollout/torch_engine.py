"""Rollout engine on transformers' own layers: a loop with a cache of keys and values that runs on any device.

Five things make it fast at small size. The cache is preallocated. Prompts are grouped by equal length, so that there is no
padding and no attention mask. Every distinct prompt is prefilled once. Finished rows are dropped. Log-probabilities are
taken from the sampling logits instead of a second forward pass.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from cppo.models.load import device_of, load_pretrained
from cppo.rollout.sampling import end_tokens, sample
from cppo.rollout.types import SAMPLED_ONLY, Policy, Record, Rollouts
from cppo.suite.config import Scale

DROP_BELOW = 0.75
"""Finished rows are dropped from the cache when a smaller share than this is active: each drop copies the cache."""


class PreallocatedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer in buffers of their final length, written in place. Shapes [B, heads, length, dim]."""

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, dim = key_states.shape
        self.keys = key_states.new_empty(batch, heads, self.capacity, dim)
        self.values = value_states.new_empty(batch, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        start, self.length = self.length, self.length + key_states.shape[-2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be repeated."""
        assert self.keys is not None and self.values is not None
        self.keys = self.keys.index_select(0, rows)
        self.values = self.values.index_select(0, rows)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity


class TorchEngine:
    """Samples from a model in this process. It sees the model's current weights, so nothing is synchronised."""

    separate = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.ends = end_tokens(model.generation_config)

    @classmethod
    def start(cls, checkpoint: str | Path, policy: PreTrainedModel | None, scale: Scale | None) -> "TorchEngine":
        """See `cppo.rollout.types.Engine`."""
        return cls(load_pretrained(checkpoint).to(device_of(scale)) if policy is None else policy)

    def sync(self, policy: Policy) -> None:
        """Do nothing: it samples from the policy itself."""

    def sleep(self) -> None:
        """Do nothing: it holds no memory between rollouts."""

    def close(self) -> None:
        """Do nothing: it started no process."""

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        uniforms: Tensor,
        temperature: float,
        top_p: float = 1.0,
        record: Record = SAMPLED_ONLY,
    ) -> Rollouts:
        """See `cppo.rollout.types.Engine`. It works on the model's device; the responses come back in main memory."""
        rows, width = uniforms.shape
        device = self.model.device
        assert rows == len(prompts)
        training = self.model.training
        self.model.eval()
        out = _Output(rows, width, record, self.model.config.vocab_size, torch.tensor(self.ends, device=device))
        uniforms = uniforms.to(device)
        by_length: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(row)
        for group in by_length.values():
            group_rows = torch.tensor(group, device=device)
            self._decode([tuple(prompts[i]) for i in group], group_rows, uniforms, temperature, top_p, out)
        self.model.train(training)
        return out.rollouts(tuple(tuple(p) for p in prompts)).to("cpu")

    def _decode(
        self,
        prompts: list[tuple[int, ...]],
        rows: Tensor,
        uniforms: Tensor,
        temperature: float,
        top_p: float,
        out: "_Output",
    ) -> None:
        """Sample the responses of prompts of one length into `out` at `rows`."""
        distinct = list(dict.fromkeys(prompts))
        place = {prompt: i for i, prompt in enumerate(distinct)}
        capacity = len(prompts[0]) + uniforms.shape[1]
        layers = [PreallocatedLayer(capacity) for _ in range(self.model.config.num_hidden_layers)]
        cache = Cache(layers=layers)
        logits = self._forward(torch.tensor(distinct, device=rows.device), cache)
        copies = torch.tensor([place[prompt] for prompt in prompts], device=rows.device)
        logits = logits[copies]
        for layer in layers:
            layer.select(copies)
        active = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        for t in range(uniforms.shape[1]):
            ids, logp = sample(logits, uniforms[rows, t], temperature, top_p)
            out.write(rows[active], t, ids[active], logp[active])
            active &= ~torch.isin(ids, out.ends)
            remaining = int(active.sum())
            if remaining == 0 or t + 1 == uniforms.shape[1]:
                break
            if remaining < DROP_BELOW * len(rows):
                kept = active.nonzero().squeeze(-1)
                rows, ids, active = rows[kept], ids[kept], active[kept]
                for layer in layers:
                    layer.select(kept)
            logits = self._forward(ids.unsqueeze(-1), cache)

    def _forward(self, ids: Tensor, cache: Cache) -> Tensor:
        """Logits [B, V] after the last of these tokens."""
        hidden = self.model.base_model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
        head = self.model.get_output_embeddings().weight
        # Logits are float32, as the trainer's are (see `TokenLogprobsFunction`).
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.nn.functional.linear(hidden[:, -1].float(), head.float())


class _Output:
    """Result tensors, filled column by column."""

    def __init__(self, rows: int, width: int, record: Record, vocabulary: int, ends: Tensor) -> None:
        self.record, self.ends = record, ends
        zeros = partial(torch.zeros, device=ends.device)
        self.responses = zeros(rows, width, dtype=torch.int64)
        self.mask = zeros(rows, width, dtype=torch.bool)
        self.logp = zeros(rows, width)
        k = record.top_k
        self.topk_ids = zeros(rows, width, k, dtype=torch.int32) if k else None
        self.topk_logp = zeros(rows, width, k) if k else None
        self.logp_all = zeros(rows, width, vocabulary) if record.full else None

    def write(self, rows: Tensor, t: int, ids: Tensor, logp: Tensor) -> None:
        """Column t of these rows: sampled ids [b] and the log-probabilities [b, V] they were drawn from."""
        self.responses[rows, t] = ids
        self.mask[rows, t] = True
        self.logp[rows, t] = logp.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        if self.topk_ids is not None and self.topk_logp is not None:
            values, indices = logp.topk(self.record.top_k, -1)
            self.topk_ids[rows, t] = indices.int()
            self.topk_logp[rows, t] = values
        if self.logp_all is not None:
            self.logp_all[rows, t] = logp

    def rollouts(self, prompts: tuple[tuple[int, ...], ...]) -> Rollouts:
        """The finished rollouts, trimmed to the longest response."""
        longest = int(self.mask.sum(-1).max())
        last = self.responses.gather(1, (self.mask.sum(-1, keepdim=True) - 1).clamp(min=0)).squeeze(1)
        parts = (self.responses, self.mask, self.logp, self.topk_ids, self.topk_logp, self.logp_all)
        responses, mask, logp, ids, topk, full = (None if p is None else p[:, :longest] for p in parts)
        assert responses is not None and mask is not None and logp is not None
        return Rollouts(prompts, responses, mask, ~torch.isin(last, self.ends), logp, ids, topk, full)
