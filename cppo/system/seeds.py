"""Seeds named by the axes they depend on.

`seed("rollout", setting, seed, iteration)` is a fixed number. A rule is never an axis: all rules see the same
problems in the same order, start from the same weights and use the same sampling noise (common random numbers).
"""

import hashlib
import json

import numpy as np
import torch
from torch import Tensor


def seed(*axes: str | int) -> int:
    """A 63-bit seed for this tuple of axes.

    >>> seed("rollout", "base", 0, 1) == seed("rollout", "base", 0, 1) != seed("rollout", "base", 0, 2)
    True
    """
    digest = hashlib.sha256(json.dumps(axes).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def numpy_generator(*axes: str | int) -> np.random.Generator:
    """NumPy's generator at `seed(*axes)`."""
    return np.random.Generator(np.random.PCG64(seed(*axes)))


def torch_generator(*axes: str | int) -> torch.Generator:
    """A CPU torch generator at `seed(*axes)`."""
    return torch.Generator().manual_seed(seed(*axes))


def uniforms(rows: int, columns: int, *axes: str | int) -> Tensor:
    """Sampling noise U [rows, columns] in [0, 1), float32. It is drawn up front, so that it depends on nothing sampled."""
    return torch.rand(rows, columns, generator=torch_generator(*axes))
