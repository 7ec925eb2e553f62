"""Log-probabilities of sampled tokens under a causal language model, in memory that does not grow with the vocabulary.

Legend: B rows, L prompt + response tokens, T response tokens, N trained tokens, H hidden width, V vocabulary, K top-K.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

PAD = 0
"""The id after the end of a row. Attention is causal, so that no token of the row sees it."""
CHUNK_ELEMENTS = 2**25
"""Upper bound on the number of logits in one tensor: 128 MiB in float32. Three such tensors exist at once, [B, T, V] never."""


class TokenLogprobs(NamedTuple):
    """The policy at sampled tokens, float32. Values outside the mask are 0. It is a tuple, in which FSDP2 finds the tensors."""

    logp: Tensor
    """[B, T] log-probability of the sampled token, in nats; the only field with a gradient."""
    entropy: Tensor
    """[B, T] entropy of the whole distribution, in nats."""
    topk_ids: Tensor | None
    """[B, T, K] the given ids, or the policy's own likeliest where `top_k` asked for them."""
    topk_logp: Tensor | None
    """[B, T, K] log-probabilities of these ids."""
    logp_all: Tensor | None
    """[B, T, V] log-probabilities of the whole vocabulary, where `full` asked for them."""


def join(prompts: Sequence[Sequence[int]], responses: Tensor) -> tuple[Tensor, Tensor]:
    """Right-padded prompt + response ids [B, L] and the prompts' lengths [B], on the responses' device."""
    longest, width = max(len(p) for p in prompts), responses.shape[1]
    padded = torch.tensor([[*p, *[PAD] * (longest + width - len(p))] for p in prompts], dtype=torch.int64)
    ids = padded.to(responses.device)
    lengths = torch.tensor([len(p) for p in prompts], dtype=torch.int64, device=responses.device)
    ids.scatter_(1, lengths.unsqueeze(1) + torch.arange(width, device=responses.device), responses)
    return ids, lengths


def response_hidden(model: PreTrainedModel, prompts: Sequence[Sequence[int]], responses: Tensor) -> Tensor:
    """Hidden states [B, T, H] from which each response token was predicted.

    Rows are right-padded and attention is causal, so no padding mask is needed. None is given, because it would be slower.
    """
    ids, lengths = join(prompts, responses)
    # These are the head's inputs, to which it is applied as a plain matrix: `cppo.models.load.check_head` has made sure.
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [B, L, H]
    index = lengths.unsqueeze(1) - 1 + torch.arange(responses.shape[1], device=ids.device)
    at_responses: Tensor = hidden.gather(1, index.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
    return at_responses


def token_logprobs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Tensor,
    mask: Tensor,
    temperature: float,
    topk_ids: Tensor | None = None,
    top_k: int = 0,
    full: bool = False,
) -> TokenLogprobs:
    """Log-probabilities, entropy and top-K log-probabilities of the policy at sampled tokens.

    prompts: B lists of ids. responses: [B, T] ids, and mask: [B, T] bool, on the model's device. topk_ids: [B, T, K] ids to
    look up. top_k: find the policy's own K likeliest instead. full: also return [B, T, V].
    The output head is applied to trained tokens only, in chunks that are recomputed in the backward pass. So the logits of
    the whole batch never exist at once, unless `full` asks for them.
    """
    head = model.get_output_embeddings()
    assert head.bias is None  # `check_head` refuses other models
    hidden = response_hidden(model, prompts, responses)[mask]  # [N, H]
    ids = topk_ids[mask].long() if topk_ids is not None else None
    given = (hidden, head.weight, responses[mask], temperature, ids, top_k, full)
    # In this order: logp, entropy, then ids and their log-probabilities where there are any, then the whole distribution.
    columns = TokenLogprobsFunction.apply(*given)  # type: ignore[no-untyped-call]

    def scatter(values: Tensor) -> Tensor:
        out = values.new_zeros(*mask.shape, *values.shape[1:])
        return out.masked_scatter(mask.reshape(*mask.shape, *[1] * (values.dim() - 1)), values)

    logp, entropy, *rest = (scatter(c) for c in columns)
    likeliest, topk_logp = (rest.pop(0), rest.pop(0)) if topk_ids is not None or top_k else (None, None)
    return TokenLogprobs(logp, entropy, likeliest, topk_logp, rest.pop(0) if full else None)


class TokenLogprobsFunction(torch.autograd.Function):
    """The fields of `TokenLogprobs` for N tokens, from hidden states and the output head's weight, in chunks both ways.

    `apply(hidden [N, H], weight [V, H], sampled [N], temperature, ids [N, K] or None, top_k, full)` gives log-probability
    [N] (the only differentiable output) and entropy [N]; with `ids` or `top_k` also ids and log-probabilities [N, K]; with
    `full` also [N, V]. Logits are float32 whatever the inputs are, under autocast too. Rounded to bfloat16 they would move a
    log-probability by hundredths, and thereby divergences by as much as the rules' thresholds.

    A `checkpoint` on every chunk is not used: each would make a [V, H] gradient of its own, whereas one buffer takes them all
    here. Liger (0.8.5) is not used: its nearest kernel, fused_linear_scaled_cross_entropy, looks up the same ids at each token.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        sampled: Tensor,
        temperature: float,
        ids: Tensor | None,
        top_k: int,
        full: bool,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(hidden, weight, sampled)
        ctx.temperature = temperature
        head = weight.float()

        def chunk(part: slice) -> list[Tensor]:
            logp = _log_softmax(hidden[part], head, temperature)
            columns = [logp.gather(-1, sampled[part].unsqueeze(-1)).squeeze(-1), -logp.exp().mul_(logp).sum(-1)]
            if ids is not None:
                columns += [ids[part], logp.gather(-1, ids[part])]
            elif top_k:
                values, likeliest = logp.topk(top_k, -1)
                columns += [likeliest, values]
            return [*columns, logp] if full else columns

        with torch.autocast(hidden.device.type, enabled=False):
            pieces = [chunk(part) for part in _chunks(hidden, weight)]
        logp, *others = (torch.cat(column) for column in zip(*pieces, strict=True))
        ctx.mark_non_differentiable(*others)
        return logp, *others

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, sampled = ctx.saved_tensors
        head = weight.float()
        to_hidden, to_head = torch.empty_like(hidden), torch.zeros_like(head)

        def chunk(part: slice) -> None:
            logp = _log_softmax(hidden[part], head, ctx.temperature)
            at_sampled = torch.zeros_like(logp).scatter_(-1, sampled[part].unsqueeze(-1), gradient[part].unsqueeze(-1))
            # The operation behind autograd's derivative of log_softmax, so that a single chunk has its very bits.
            to_logits = torch.ops.aten._log_softmax_backward_data(at_sampled, logp, -1, torch.float32)
            to_logits.div_(ctx.temperature)
            to_hidden[part] = to_logits @ head
            to_head.addmm_(to_logits.T, hidden[part].float())

        with torch.autocast(hidden.device.type, enabled=False):
            for part in _chunks(hidden, weight):
                chunk(part)
        return to_hidden, to_head.to(weight.dtype), None, None, None, None, None


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Slices of the N tokens; one empty slice where there are no tokens."""
    rows = max(CHUNK_ELEMENTS // len(weight), 1)
    return [slice(start, start + rows) for start in range(0, max(len(hidden), 1), rows)]


def _log_softmax(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [n, V], float32."""
    return torch.log_softmax(torch.nn.functional.linear(hidden.float(), head).div_(temperature), -1)
