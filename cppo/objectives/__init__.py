"""Objectives: which token updates are kept, as pure functions from `Tokens` to `Terms`.

An objective never reduces, logs or reads a global; the one reduction is `cppo.loss.policy_loss`. Neither transformers
nor lm-eval is imported here, so that other trainers can use the objectives alone.

>>> import torch
>>> tokens = Tokens(logp=torch.tensor([[-0.1]]), rollout_logp=torch.tensor([[-1.0]]),
...                 advantages=torch.tensor([[1.0]]), mask=torch.tensor([[True]]))
>>> objective("ppo", clip_high=0.2)(tokens).gate.item()   # the ratio left the clip range: no gradient
0.0
"""

from cppo.objectives import divergence as divergence
from cppo.objectives import prefix as prefix
from cppo.objectives import ratio as ratio
from cppo.objectives import sequence as sequence
from cppo.objectives import smooth as smooth
from cppo.objectives.registry import Objective, names, objective, params_of, register, spec
from cppo.objectives.types import Reason, Terms, Tokens

__all__ = ["Objective", "Reason", "Terms", "Tokens", "names", "objective", "params_of", "register", "spec"]
