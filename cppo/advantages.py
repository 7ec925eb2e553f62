"""Advantage estimators: rewards to A_t.

An estimator is a function of `Outcomes`, registered by `register()` under its own name:

    @register()
    def centred(outcomes: Outcomes) -> Tensor:
        return outcomes.on_tokens(group_relative(outcomes.rewards, outcomes.group, std=False))

A suite names it as `advantage: centred`, or one of your own as `advantage: my_module:centred`.

Legend: P prompts, G responses per prompt (row p * G + g), B = P G rows, T tokens. Sources are cited in each function's
docstring. A reward that could not be judged is NaN here: it counts in no mean, and its row gets advantage 0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cppo.system.plugins import Registry

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


def zero_variance(rewards: Tensor, group: int) -> Tensor:
    """bool [B]: the row's group has one reward only, so the group carries no signal."""
    grouped = rewards.view(-1, group)
    highest = grouped.nan_to_num(nan=-torch.inf).amax(-1)
    lowest = grouped.nan_to_num(nan=torch.inf).amin(-1)
    return (highest <= lowest).repeat_interleave(group)


def generalised_advantages(
    token_rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation; all [B, T] -> (advantages, returns), both 0 outside the mask.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma gae_lambda A_{t+1}, returns = A + V. Positions outside the mask
    are skipped: V and A are carried over them. After the last token V = 0: nothing is bootstrapped, not even for truncated
    responses.
    Source: Schulman et al. (arXiv:1506.02438), with verl's treatment of masked positions.
    """
    advantages = torch.zeros_like(values)
    next_value = next_advantage = values.new_zeros(values.shape[0])
    for t in reversed(range(values.shape[1])):  # over time, for all rows at once
        delta = token_rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * gae_lambda * next_advantage
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


# The registry ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcomes:
    """What an estimator sees of a rollout."""

    rewards: Tensor
    """[B], NaN where a response could not be judged."""
    mask: Tensor
    """bool [B, T]: trained tokens."""
    group: int
    """G, the responses per prompt; a prompt's rows are neighbours."""
    values: Tensor | None = None
    """[B, T] the critic's values, for estimators that are registered with `critic=True`."""
    gamma: float = 1.0
    """The critic's discount."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""

    @property
    def judged(self) -> Tensor:
        """bool [B, T]: trained tokens of rows with a reward."""
        return self.mask & ~self.rewards.isnan().unsqueeze(-1)

    def on_tokens(self, per_row: Tensor) -> Tensor:
        """[B] -> [B, T]: each row's advantage on all of its trained tokens, 0 elsewhere."""
        return torch.where(self.mask, per_row.unsqueeze(-1), 0)


Function = Callable[[Outcomes], Tensor | tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Estimator:
    """A registered estimator."""

    name: str
    function: Function
    critic: bool
    """Whether it needs values, and also gives the returns that the critic is fitted to."""

    def __call__(self, outcomes: Outcomes) -> tuple[Tensor, Tensor | None]:
        """The function's (advantages, returns), each [B, T] and 0 outside the mask; without a critic, returns is None.

        Raises ValueError for a result of another kind or shape, and for one that is not finite on a trained token.
        """
        estimate = self.function(outcomes)
        parts = estimate if isinstance(estimate, tuple) else (estimate,)
        shapes = [tuple(part.shape) for part in parts]
        if shapes != [tuple(outcomes.mask.shape)] * (2 if self.critic else 1):
            expected = "(advantages, returns), each" if self.critic else "advantages"
            raise ValueError(
                f"advantage {self.name}: expected {expected} of shape {tuple(outcomes.mask.shape)}, got "
                f"{' and '.join(map(str, shapes))}"
            )
        advantages, *returns = (torch.where(outcomes.mask, part, 0) for part in parts)
        if not bool(advantages.isfinite().all()):
            raise ValueError(
                f"advantage {self.name}: an advantage is not finite; unjudged rewards are NaN and must get 0"
            )
        return advantages, returns[0] if returns else None


_REGISTRY: Registry[Estimator] = Registry("advantage", "@advantages.register()")


def register(critic: bool = False) -> Callable[[Function], Function]:
    """Register an estimator under its function's name.

    critic: it needs `Outcomes.values`, and gives (advantages, returns) instead of advantages.
    """

    def decorate(function: Function) -> Function:
        _REGISTRY.add(function, Estimator(function.__name__, function, critic))
        return function

    return decorate


def names() -> tuple[str, ...]:
    """Names of all registered estimators, sorted."""
    return _REGISTRY.names()


def estimator(name: str) -> Estimator:
    """The estimator called `name`, or the one at "module:function". Raises ValueError when there is none."""
    return _REGISTRY.find(name)


@register()
def grpo(outcomes: Outcomes) -> Tensor:
    """(R - mean) / (std + 1e-6) in the group. Source: DeepSeekMath (arXiv:2402.03300)."""
    return outcomes.on_tokens(group_relative(outcomes.rewards, outcomes.group, std=True))


@register()
def dr_grpo(outcomes: Outcomes) -> Tensor:
    """R - mean in the group. Source: Dr.GRPO (arXiv:2503.20783)."""
    return outcomes.on_tokens(group_relative(outcomes.rewards, outcomes.group, std=False))


@register()
def rloo(outcomes: Outcomes) -> Tensor:
    """G / (G - 1) (R - mean): R minus the mean of the group's others. Source: RLOO (arXiv:2402.14740).

    With unjudged rewards, G is the number of judged ones.
    """
    count = (~outcomes.rewards.view(-1, outcomes.group).isnan()).sum(-1, keepdim=True)
    factor = count.to(outcomes.rewards.dtype) / (count - 1).clamp(min=1)
    centred = group_relative(outcomes.rewards, outcomes.group, std=False).view(-1, outcomes.group)
    return outcomes.on_tokens((factor * centred).view(-1))


@register()
def gpg(outcomes: Outcomes) -> Tensor:
    """f (R - mean) with f = B / max(1, rows with a non-zero reward).

    Source: GPG (arXiv:2504.02546) as in verl, which assumes rewards of 1 and 0 and counts over the whole batch.
    """
    rewards = outcomes.rewards
    judged = ~rewards.isnan()
    factor = judged.sum().to(rewards.dtype) / ((rewards != 0) & judged).sum().clamp(min=1)
    return outcomes.on_tokens(factor * group_relative(rewards, outcomes.group, std=False))


@register()
def reinforce_pp(outcomes: Outcomes) -> Tensor:
    """Returns-to-go of the outcome (gamma 1), whitened over all trained tokens of judged rows.

    Source: REINFORCE++ (arXiv:2501.03262), without its KL penalty in the reward.
    """
    judged = outcomes.judged
    return whiten(torch.where(judged, outcomes.rewards.nan_to_num(nan=0.0).unsqueeze(-1), 0), judged)


@register()
def reinforce_pp_baseline(outcomes: Outcomes) -> Tensor:
    """R - group mean, whitened over all trained tokens of judged rows. Source: REINFORCE++ (arXiv:2501.03262)."""
    judged, centred = outcomes.judged, group_relative(outcomes.rewards, outcomes.group, std=False)
    return whiten(torch.where(judged, centred.unsqueeze(-1), 0), judged)


@register(critic=True)
def gae(outcomes: Outcomes) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation on the outcome at the last token, whitened over the tokens of judged rows.

    Source: Schulman et al. (arXiv:1506.02438).
    """
    assert outcomes.values is not None
    token_rewards = at_last_token(outcomes.rewards, outcomes.mask)
    raw, returns = generalised_advantages(
        token_rewards, outcomes.values, outcomes.mask, outcomes.gamma, outcomes.gae_lambda
    )
    return whiten(raw, outcomes.judged), returns
