"""Advantage estimators: rewards to A_t.

Legend: P prompts, G responses a prompt (row p * G + g), B = P G rows, T tokens. Source: `docs` of each function.
A reward that could not be judged is NaN here: it counts in no mean, and its row gets advantage 0.
"""

import torch
from torch import Tensor

EPSILON = 1e-6
"""Added to the group's standard deviation (verl's value)."""


def group_relative(rewards: Tensor, group: int, std: bool) -> Tensor:
    """(R - mean) / (std + 1e-6) in each group of G rows, or R - mean; [B] -> [B].

    `grpo` divides by the unbiased standard deviation (DeepSeekMath, arXiv:2402.03300), `dr_grpo` does not
    (arXiv:2503.20783). A group whose rewards are all equal gets 0.
    """
    grouped = rewards.view(-1, group)
    judged = ~grouped.isnan()
    count = judged.sum(-1, keepdim=True)
    values = grouped.nan_to_num(nan=0.0)
    mean = values.sum(-1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(judged, values - mean, 0)
    if std:
        variance = centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + EPSILON)
    return torch.where(zero_variance(rewards, group).view(-1, group), 0, centred).view(-1)


def rloo(rewards: Tensor, group: int) -> Tensor:
    """G / (G - 1) (R - mean): R minus the mean of the others; [B] -> [B]. Source: RLOO (arXiv:2402.14740).

    With unjudged rewards, G is the number of judged ones.
    """
    count = (~rewards.view(-1, group).isnan()).sum(-1, keepdim=True)
    factor = count.to(rewards.dtype) / (count - 1).clamp(min=1)
    return (factor * group_relative(rewards, group, std=False).view(-1, group)).view(-1)


def gpg(rewards: Tensor, group: int) -> Tensor:
    """f (R - mean) with f = B / max(1, rows with a non-zero reward); [B] -> [B].

    Source: GPG (arXiv:2504.02546) as in verl, which assumes rewards of 1 and 0 and counts over the whole batch.
    """
    judged = ~rewards.isnan()
    factor = judged.sum().to(rewards.dtype) / ((rewards != 0) & judged).sum().clamp(min=1)
    return factor * group_relative(rewards, group, std=False)


def reinforce_pp(rewards: Tensor, mask: Tensor) -> Tensor:
    """Returns-to-go of the outcome (gamma 1), whitened over all trained tokens; [B], [B, T] -> [B, T].

    Source: REINFORCE++ (arXiv:2501.03262), without its KL penalty in the reward. Unjudged rows are left out and get 0.
    """
    judged = mask & ~rewards.isnan().unsqueeze(-1)
    returns = torch.where(judged, rewards.nan_to_num(nan=0.0).unsqueeze(-1), 0)
    return whiten(returns, judged)


def reinforce_pp_baseline(rewards: Tensor, group: int, mask: Tensor) -> Tensor:
    """R - group mean, whitened over all trained tokens; [B], [B, T] -> [B, T]. Source: REINFORCE++ (arXiv:2501.03262)."""
    judged = mask & ~rewards.isnan().unsqueeze(-1)
    return whiten(torch.where(judged, group_relative(rewards, group, std=False).unsqueeze(-1), 0), judged)


def zero_variance(rewards: Tensor, group: int) -> Tensor:
    """bool [B]: the row's group has one reward only, so the group carries no signal."""
    grouped = rewards.view(-1, group)
    highest = grouped.nan_to_num(nan=-torch.inf).amax(-1)
    lowest = grouped.nan_to_num(nan=torch.inf).amin(-1)
    return (highest <= lowest).repeat_interleave(group)


def from_outcomes(name: str, rewards: Tensor, group: int, mask: Tensor) -> Tensor:
    """The advantages [B, T] of a critic-free estimator, 0 outside the mask.

    name: grpo, dr_grpo, rloo, gpg, reinforce_pp or reinforce_pp_baseline; ValueError for another.
    """
    if name == "reinforce_pp":
        return reinforce_pp(rewards, mask)
    if name == "reinforce_pp_baseline":
        return reinforce_pp_baseline(rewards, group, mask)
    if name in ("grpo", "dr_grpo"):
        per_row = group_relative(rewards, group, std=name == "grpo")
    elif name == "rloo":
        per_row = rloo(rewards, group)
    elif name == "gpg":
        per_row = gpg(rewards, group)
    else:
        raise ValueError(f"advantage: unknown estimator {name!r}")
    return torch.where(mask, per_row.unsqueeze(-1), 0)


def gae(token_rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation; all [B, T] -> (advantages, returns), both 0 outside the mask.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, returns = A + V. Masked positions are skipped:
    V and A are carried over them. After the last token V = 0: no bootstrap, also for truncated responses.
    Source: Schulman et al. (arXiv:1506.02438), with verl's treatment of masked positions.
    """
    advantages = torch.zeros_like(values)
    next_value = next_advantage = values.new_zeros(values.shape[0])
    for t in reversed(range(values.shape[1])):  # over time, for all rows at once
        delta = token_rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        valid = mask[:, t]
        advantages[:, t] = torch.where(valid, advantage, 0)
        next_value = torch.where(valid, values[:, t], next_value)
        next_advantage = torch.where(valid, advantage, next_advantage)
    return advantages, torch.where(mask, advantages + values, 0)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the masked-in entries (unbiased variance); 0 elsewhere."""
    count = mask.sum()
    mean = torch.where(mask, x, 0).sum() / count.clamp(min=1)
    centred = torch.where(mask, x - mean, 0)
    variance = centred.square().sum() / (count - 1).clamp(min=1)
    return centred * (variance + 1e-8).rsqrt()


def at_last_token(rewards: Tensor, mask: Tensor) -> Tensor:
    """[B] outcome rewards as token rewards [B, T]: at each row's last trained token, NaN (not judged) as 0."""
    order = mask.cumsum(-1)
    last = mask & (order == order[:, -1:])
    return torch.where(last, rewards.nan_to_num(nan=0.0).unsqueeze(-1), 0)
