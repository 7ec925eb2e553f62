"""The rules and divergences as slow, obvious loops over Python floats: what the batched code is tested against.

A rule's loop takes one response, the list of its trained tokens, and the rule's settings; it gives one `One` a token.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from cppo.objectives import Reason, Tokens


class One(NamedTuple):
    """What a loop says about one token."""

    surrogate: float
    weight: float
    """d surrogate / d logp."""
    gate: float = 1.0
    reason: Reason = Reason.KEPT


class Token(NamedTuple):
    """One trained token."""

    logp: float
    rollout_logp: float
    advantage: float
    divergence: float
    position: int

    @property
    def log_ratio(self) -> float:
        return min(max(self.logp - self.rollout_logp, -20.0), 20.0)

    @property
    def rho(self) -> float:
        return math.exp(self.log_ratio)

    @property
    def toward(self) -> bool:
        return self.advantage * (self.rho - 1) <= 0


Row = list[Token]


def read(tokens: Tokens) -> list[tuple[list[int], Row]]:
    """Per row: the columns of its trained tokens, and these tokens."""
    assert tokens.divergence is not None and tokens.position is not None
    out = []
    for i in range(tokens.mask.shape[0]):
        columns = [t for t in range(tokens.mask.shape[1]) if tokens.mask[i, t]]
        row = [
            Token(
                float(tokens.logp[i, t]),
                float(tokens.rollout_logp[i, t]),
                float(tokens.advantages[i, t]),
                float(tokens.divergence[i, t]),
                int(tokens.position[i, t]),
            )
            for t in columns
        ]
        out.append((columns, row))
    return out


def weighted(token: Token, cap: float | None) -> tuple[float, float]:
    """(surrogate, its derivative) of A sg[min(rho, cap)] logp, or of A rho without a cap."""
    if cap is None:
        return token.advantage * token.rho, token.advantage * token.rho
    weight = token.advantage * min(token.rho, cap)
    return weight * token.logp, weight


def gpg_loop(row: Row) -> list[One]:
    return [One(token.advantage * token.logp, token.advantage) for token in row]


def pg_loop(row: Row, cap: float | None) -> list[One]:
    return [One(*weighted(token, cap)) for token in row]


def clip_loop(row: Row, clip_low: float | None, clip_high: float | None, dual_clip: float | None) -> list[One]:
    """PPO and GRPO: the gradient of the published min of two terms is that of whichever is smaller."""
    out = []
    for token in row:
        a, rho = token.advantage, token.rho
        low = -math.inf if clip_low is None else 1 - clip_low
        high = math.inf if clip_high is None else 1 + clip_high
        free, clipped = a * rho, a * min(max(rho, low), high)
        constant = clipped < free
        if dual_clip is not None and a < 0 and min(free, clipped) < a * dual_clip:
            constant = True
        gate, reason = (0.0, Reason.THRESHOLD) if constant else (1.0, Reason.KEPT)
        out.append(One(free, free, gate, reason))
    return out


def cispo_loop(row: Row, clip_low: float | None, clip_high: float | None) -> list[One]:
    out = []
    for token in row:
        weight = token.rho
        if clip_low is not None:
            weight = max(weight, 1 - clip_low)
        if clip_high is not None:
            weight = min(weight, 1 + clip_high)
        out.append(One(token.advantage * weight * token.logp, token.advantage * weight))
    return out


def minpro_loop(row: Row, clip_low: float | None, clip_high: float | None, cap_prefix_at_1: bool) -> list[One]:
    out = []
    for t, token in enumerate(row):
        prefix = min((earlier.rho for earlier in row[:t]), default=1.0)
        if cap_prefix_at_1:
            prefix = min(prefix, 1.0)
        weight = prefix * token.rho
        if clip_low is not None:
            weight = max(weight, 1 - clip_low)
        if clip_high is not None:
            weight = min(weight, 1 + clip_high)
        out.append(One(token.advantage * weight * token.logp, token.advantage * weight))
    return out


def sapo_loop(row: Row, tau_pos: float, tau_neg: float) -> list[One]:
    """The gradient's weight in the closed form of the paper, rho sech^2(tau (rho - 1) / 2)."""
    out = []
    for token in row:
        tau = tau_pos if token.advantage > 0 else tau_neg
        value = 4 / tau / (1 + math.exp(-tau * (token.rho - 1)))
        weight = token.rho / math.cosh(tau * (token.rho - 1) / 2) ** 2
        out.append(One(token.advantage * value, token.advantage * weight))
    return out


def drpo_loop(row: Row, delta: float, weight_by_mu: bool) -> list[One]:
    """The gradient's weight in closed form: A rho (1 - sign(A) (pi - mu) / delta); SPO has rho - 1 for pi - mu."""
    out = []
    for token in row:
        a, rho, mu = token.advantage, token.rho, math.exp(token.rollout_logp) if weight_by_mu else 1.0
        value = a * rho - abs(a) * mu * (rho - 1) ** 2 / (2 * delta)
        shift = math.copysign(mu * (rho - 1), a * (rho - 1))
        out.append(One(value, a * rho * (1 - shift / delta)))
    return out


def gspo_loop(row: Row, clip_low: float | None, clip_high: float | None) -> list[One]:
    """PPO's clip on one ratio, the geometric mean. A token's derivative is that of n_i times the response's term."""
    out = []
    mean = sum(token.log_ratio for token in row) / max(len(row), 1)
    s = math.exp(min(mean, 10.0))
    for token in row:
        low = -math.inf if clip_low is None else 1 - clip_low
        high = math.inf if clip_high is None else 1 + clip_high
        free, clipped = token.advantage * s, token.advantage * min(max(s, low), high)
        gate, reason = (0.0, Reason.SEQUENCE) if clipped < free else (1.0, Reason.KEPT)
        out.append(One(free, free, gate, reason))
    return out


def gmpo_loop(row: Row, clip_low: float, clip_high: float) -> list[One]:
    def limited(token: Token) -> float:
        x = token.log_ratio
        return min(x, clip_high) if token.advantage > 0 else max(x, -clip_low)

    s = math.exp(sum(limited(token) for token in row) / max(len(row), 1))
    out = []
    for token in row:
        cut = limited(token) != token.log_ratio
        gate, reason = (0.0, Reason.THRESHOLD) if cut else (1.0, Reason.KEPT)
        out.append(One(token.advantage * s, token.advantage * s, gate, reason))
    return out


def trm_loop(row: Row, delta_max: float | None, delta_mean: float | None, cap: float | None) -> list[One]:
    divergences = [token.divergence for token in row]
    keep = True
    if delta_max is not None and row:
        keep = keep and max(divergences) <= delta_max
    if delta_mean is not None and row:
        keep = keep and sum(divergences) / len(row) <= delta_mean
    gate, reason = (1.0, Reason.KEPT) if keep else (0.0, Reason.SEQUENCE)
    return [One(*weighted(token, cap), gate, reason) for token in row]


def dppo_loop(row: Row, delta: float, cap: float | None) -> list[One]:
    out = []
    for token in row:
        away = (token.advantage > 0 and token.rho > 1) or (token.advantage < 0 and token.rho < 1)
        if away and token.divergence > delta:
            out.append(One(*weighted(token, cap), 0.0, Reason.THRESHOLD))
        else:
            out.append(One(*weighted(token, cap)))
    return out


def quantile(values: list[float], q: float) -> float:
    """Linear interpolation between the two nearest order statistics."""
    ordered = sorted(values)
    rank = q * (len(ordered) - 1)
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (rank - below) * (ordered[above] - ordered[below])


def budget(row: Row, delta_b: float, adaptive: bool, q: float, clamp_factor: float) -> float:
    """delta_b of one response (Eq. 22)."""
    if not adaptive:
        return delta_b
    return min(max(quantile([token.divergence for token in row], q), delta_b), clamp_factor * delta_b)


def cppo_loop(
    row: Row,
    delta: float,
    w_min: float,
    delta_b: float | None,
    adaptive: bool,
    quantile: float,
    clamp_factor: float,
    span: int | None,
    shuffle: bool,
    soft: bool,
    cap: float | None,
    enters: Callable[[Token, float], bool] = lambda token, gate: True,
) -> list[One]:
    """Algorithm 1, with the two conditions written apart: w_t D_t <= delta and S_t <= delta + delta_b W_{t-1}."""
    out: list[One] = []
    length = len(row) if span is None else span
    used = allowed = 0.0  # S_{t-1} and W_{t-1}
    effective = None if delta_b is None or not row else budget(row, delta_b, adaptive, quantile, clamp_factor)
    for t, token in enumerate(row, start=1):
        position = token.position if shuffle else t
        weight = 1 - (1 - w_min) * (position - 1) / max(length - 1, 1)
        drift = weight * token.divergence
        excess = drift / delta
        if effective is not None:
            excess = max(excess, (used + drift) / (delta + effective * allowed))
        if token.toward or excess <= 1:
            gate, reason = 1.0, Reason.KEPT
        else:
            gate = 1 / excess if soft else 0.0
            reason = Reason.THRESHOLD if drift > delta else Reason.BUDGET
        out.append(One(*weighted(token, cap), gate, reason))
        if enters(token, gate):  # by the paper every token does, also a masked one and one that moves toward mu
            used += drift
            allowed += weight
    return out


LOOPS: dict[str, Any] = {
    "gpg": gpg_loop,
    "pg": pg_loop,
    "ppo": clip_loop,
    "grpo": clip_loop,
    "cispo": cispo_loop,
    "minpro": minpro_loop,
    "sapo": sapo_loop,
    "drpo": drpo_loop,
    "gspo": gspo_loop,
    "gmpo": gmpo_loop,
    "trm": trm_loop,
    "dppo": dppo_loop,
    "cppo": cppo_loop,
}


def divergence_loop(p: list[float], q: list[float], kind: str) -> float:
    """TV, or KL in the direction q to p, of two distributions."""
    if kind == "tv":
        return 0.5 * sum(abs(a - b) for a, b in zip(p, q, strict=True))
    return max(0.0, sum(b * math.log(b / a) for a, b in zip(p, q, strict=True) if b > 0))


def restrict(p: list[float], support: list[int]) -> list[float]:
    """The probabilities of `support`, then the rest in one category."""
    kept = [p[v] for v in support]
    return [*kept, max(1 - sum(kept), 1e-12)]


def reduced_loop(p: list[float], q: list[float], y: int, estimator: str, kind: str, k: int) -> float:
    order = sorted(range(len(q)), key=lambda v: -q[v])[:k]
    if estimator == "exact":
        return divergence_loop(p, q, kind)
    if estimator == "binary":
        support = [y]
    elif y in order:
        support = order
    else:
        support = [*order, y] if estimator == "union" else [*order[:-1], y]
    return divergence_loop(restrict(p, support), restrict(q, support), kind)
