"""Named rules: `preset: cppo_paper` in a suite stands for the keys below. Keys that stand beside it win.

Paper and releases differ in choices that change numbers; a preset names one consistent set of them. Where the paper is
explicit, `cppo_paper` follows it; where it is silent, it follows what both releases agree on. Centred advantages and
seq-mean-token-sum-norm with the run's longest response as horizon are those of all CPPO and DPPO releases.
"""

from typing import Any

_MATCHED = {"advantage": "dr_grpo", "aggregation": "seq-mean-token-sum-norm", "anchor": "rollout"}
_TOP20 = {"estimator": "top_k", "kind": "tv", "k": 20}

PRESETS: dict[str, dict[str, Any]] = {
    # Top-20 TV, weights over the response's own length, budget clamped at twice its floor (Eq. 8-11, 22; Table 3).
    "cppo_paper": {"objective": "cppo", "divergence": _TOP20, **_MATCHED},
    # The release of UniRL: Binary TV, differentiable ratio without a cap, always adaptive.
    "cppo_unirl": {
        "objective": "cppo",
        "params": {"cap": None},
        "divergence": {"estimator": "binary", "kind": "tv"},
        **_MATCHED,
    },
    # The later verl pull request: Binary TV, clamp factor 5, weights over the padded width.
    "cppo_verl": {
        "objective": "cppo",
        "params": {"clamp_factor": 5.0, "span": "max_response_tokens"},
        "divergence": {"estimator": "binary", "kind": "tv"},
        **_MATCHED,
    },
    # The paper's GRPO row: Clip-Higher (0.2, 0.28), no dual clip.
    "grpo_paper": {"objective": "grpo", **_MATCHED},
    # DPPO with the paper's Top-20 TV; give delta by setting (Table 3).
    "dppo_paper": {"objective": "dppo", "divergence": _TOP20, **_MATCHED},
    # TRM-Max at its paper's threshold for a single criterion, on the KL that a rollout can give.
    "trm_max_paper": {"objective": "trm", "divergence": {**_TOP20, "kind": "kl"}, **_MATCHED},
    # TRM-Avg at its paper's threshold for a single criterion, on the KL that a rollout can give.
    "trm_avg_paper": {
        "objective": "trm",
        "params": {"delta_max": None, "delta_mean": 0.001},
        "divergence": {**_TOP20, "kind": "kl"},
        **_MATCHED,
    },
    # CISPO with the absolute cap of 5; CPPO's paper gives no number.
    "cispo_paper": {"objective": "cispo", **_MATCHED},
    # MinPRO without a floor, so that the prefix can suppress; its paper's range could not be verified.
    "minpro_paper": {"objective": "minpro", **_MATCHED},
    # DAPO's loss and advantages; its overlong_buffer and resample are keys of `rollout`.
    "dapo": {"objective": "grpo", "advantage": "grpo", "aggregation": "token-mean", "anchor": "recomputed"},
    # Dr.GRPO: neither the group's deviation nor the response's length divides.
    "dr_grpo": {
        "objective": "ppo",
        "advantage": "dr_grpo",
        "aggregation": "seq-mean-token-sum-norm",
        "anchor": "recomputed",
    },
    # REINFORCE++: PPO's clip on returns whitened over the batch, without its KL penalty.
    "reinforce_pp": {"objective": "ppo", "advantage": "reinforce_pp", "anchor": "recomputed"},
    # RLOO advantages with PPO's clip.
    "rloo": {"objective": "ppo", "advantage": "rloo", "anchor": "recomputed"},
    # GPG: no importance ratio at all.
    "gpg": {"objective": "gpg", "advantage": "gpg"},
    # GSPO as published: advantages over the standard deviation, anchored at the recomputed policy.
    "gspo": {"objective": "gspo", "aggregation": "seq-mean-token-mean", "anchor": "recomputed"},
    # GMPO as published.
    "gmpo": {"objective": "gmpo", "aggregation": "seq-mean-token-mean", "anchor": "recomputed"},
    # SAPO as published.
    "sapo": {"objective": "sapo", "aggregation": "seq-mean-token-mean", "anchor": "recomputed"},
    # DRPO as released, with the nearly inert delta 12.5; set delta 0.15 for DPPO's geometry.
    "drpo": {"objective": "drpo", **_MATCHED},
    # SPO: DRPO without mu in the penalty.
    "spo": {"objective": "drpo", "params": {"weight_by_mu": False}, **_MATCHED},
}


def expand(entry: Any) -> Any:
    """A rule as read from YAML with its preset filled in; anything else comes back unchanged.

    Raises ValueError for an unknown preset.
    """
    if not isinstance(entry, dict) or "preset" not in entry:
        return entry
    given = {key: value for key, value in entry.items() if key != "preset"}
    preset = PRESETS.get(entry["preset"]) if isinstance(entry["preset"], str) else None
    if preset is None:
        raise ValueError(f"preset: unknown {entry['preset']!r}; known: {', '.join(PRESETS)}")
    params = given.get("params", {})
    if isinstance(params, dict):
        given["params"] = {**preset.get("params", {}), **params}
    return {**preset, **given}
