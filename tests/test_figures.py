"""Tables and figures from synthetic results folders: numbers against slow loops, same bytes again, one-line errors."""

import csv
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[1] / "paper_figures"
sys.path.insert(0, str(SCRIPTS))
import catalog  # noqa: E402 (needs the path)

TV = {"estimator": "top_k", "kind": "tv", "k": 4, "support": None}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "pg": {},
    "ppo": {"advantage": "gae"},
    "grpo": {},
    "cispo": {},
    "dppo": {"settings": {"delta": 0.15}, "divergence": TV},
    "cppo": {"settings": {"delta": 0.15, "delta_b": 0.02}, "divergence": TV, "by_setting": {"moe": {"delta": 0.2}}},
    "mine": {"objective": "my_module:mine", "settings": {"limit": 0.1}},
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "cppo_no_weight": {"w_min": 1.0},
    "cppo_no_budget": {"delta_b": None},
    "cppo_shuffled": {"delta_b": None, "shuffle": True},
    "cppo_soft": {"soft": True},
    "cppo_budget_fixed": {"delta_b": 0.03, "adaptive": False},
    "cppo_wmin": {"w_min": 0.6},
    "cppo_kl": {"delta": 0.1, "delta_b": 0.002},
    "cppo_binary": {},
}
TITLES = {"base": "Qwen3-100k-Base", "moe": "Qwen3-MoE-225k-Base", "larger": "Qwen3-300k-Base"}
COLLAPSED = {("cispo", "moe", 0): 17, ("cispo", "moe", 1): 31, ("pg", "base", 1): 23}
"""(label, setting, seed) -> step of collapse. Seeds from 2 on finish, except cispo's on moe."""
ITERATIONS, EVERY, SAMPLES, PROBLEMS = 50, 10, 16, (20, 20, 20)


def entries(ablations: bool = False) -> list[dict[str, Any]]:
    """Objective entries as in suite.json."""
    kl = {"objective": "trm", "settings": {"delta_max": 0.1, "delta_mean": 0.002}}
    chosen = {**OBJECTIVES}
    if ablations:
        chosen = {key: OBJECTIVES[key] for key in ("dppo", "cppo")} | {
            name: {"objective": "cppo", "settings": settings} for name, settings in ABLATIONS.items()
        }
        chosen["trm_kl"] = kl
        for name, entry in chosen.items():
            kind = "kl" if name.endswith("kl") else "tv"
            entry["divergence"] = {"estimator": "binary", "kind": kind, "k": None} if "binary" in name else {**TV, "kind": kind}
    blank = {"settings": {}, "by_setting": {}, "divergence": None, "advantage": "grpo", "aggregation": "token-mean"}
    return [{"name": name, "objective": name, **blank, **entry} for name, entry in chosen.items()]


def make(folder: Path, seeds: int = 2, settings: Sequence[str] = ("base", "moe"), ablations: bool = False) -> Path:
    """Writes the tables of a suite that learned, with two kinds of failure: a fall of the score, and a collapse."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    benchmarks = [{"name": f"chain_{6 + 4 * n}", "steps": 6 + 4 * n, "problems": p} for n, p in enumerate(PROBLEMS)]
    plans = {
        name: {
            "title": TITLES[name],
            "task": {"benchmarks": benchmarks},
            "rollout": {"prompts": 32, "responses": 8, "minibatch": 4, "max_response_tokens": 128},
            "iterations": ITERATIONS,
            "checkpoint_every": EVERY,
        }
        for name in settings
    }
    suite = {"seeds": list(range(seeds)), "settings": plans, "evaluation": {"samples": SAMPLES}, "objectives": entries(ablations)}
    (folder / "suite.json").write_text(json.dumps(suite))
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in ("runs", "scores", "curves", "positions", "tokens")}
    for setting in settings:
        ease = {b["name"]: rng.normal(0.4 - n, 0.8, b["problems"]) for n, b in enumerate(benchmarks)}
        base = {"run": f"base-{setting}", "label": "base", "setting": setting, "seed": 0}
        tables["scores"] += scored(base, 0, -1.0, ease, rng)
        for number, entry in enumerate(suite["objectives"]):
            label = entry["name"]
            for seed in range(seeds):
                lost = COLLAPSED.get((label, setting, min(seed, 1) if label == "cispo" else seed))
                key = {"run": f"{setting[0]}{number:02d}{seed}", "label": label, "setting": setting, "seed": seed}
                status = "finished" if lost is None else f"collapsed at step {lost}"
                tables["runs"].append({**key, "status": status, "iterations": lost or ITERATIONS, "code_version": "1e5"})
                one_run(tables, key, lost, ease, number, rng)
    for name, rows in tables.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else ["run", "label"])
            writer.writeheader()
            writer.writerows(rows)
    return folder


def scored(key: dict[str, Any], step: int, skill: float, ease: dict[str, np.ndarray], rng: np.random.Generator) -> list[Any]:
    """One checkpoint's rows of scores.csv."""
    rows = []
    for name, level in ease.items():
        for problem, rate in enumerate(1 / (1 + np.exp(-level - skill))):
            unjudged = int(rng.random() < 0.02)
            correct = int(rng.binomial(SAMPLES - unjudged, rate))
            row = {"step": step, "benchmark": name, "problem": f"p{problem:03d}", "correct": correct, "samples": SAMPLES}
            rows.append({**key, **row, "unjudged": unjudged, "mean_length": 60.5, "truncated": 0})
    return rows


def one_run(tables: dict[str, list[Any]], key: dict[str, Any], lost: int | None, ease: Any, number: int, rng: Any) -> None:
    """Rows of one run in all tables."""
    unmasked = key["label"] in ("pg", "cispo")
    speed, peak = 12 + 2 * (number % 4) + rng.normal(0, 1), 5.5 - 0.3 * (number % 3)
    cppo = key["label"].startswith("cppo")
    for i in range(1, (lost or ITERATIONS) + 1):
        skill = -1 + peak / (1 + np.exp(-(i - speed) / 5))
        skill -= max(0, i - 25) * 0.2 if unmasked else 0
        reward = 1 / (1 + np.exp(-skill + 0.6)) + rng.normal(0, 0.02)
        share = 0.002 + 0.01 * rng.random()
        row = {
            "reward": reward, "accuracy": reward, "response_length": 62 + 4 * rng.normal() + (i if unmasked else 0),
            "entropy": 0.3, "divergence": "" if unmasked else 0.01, "mask_share": share, "mask_share_threshold": 0.8 * share,
            "mask_share_budget": 0.2 * share * rng.random() if cppo else 0, "mask_share_sequence": 0, "gate_mean": 1,
            "delta_b": 0.02 + 0.015 * rng.random() * (1 - i / 70) if cppo else "", "grad_norm": 1,
            "relative_logprob_error": float(np.exp(rng.normal(-12 + number / 4, 0.2))), "drift": 0.02,
            "zero_variance": 3, "skipped_updates": 0,
        }  # fmt: skip
        tables["curves"].append({**key, "iteration": i, **row})
        if i % EVERY == 0:
            tables["scores"] += scored(key, i, skill, ease, rng)
            for first in range(1, 100, 8):
                drift = (0.004 + 0.0004 * first) * (3 if unmasked else 1) * (1 + 0.1 * number) * rng.uniform(0.9, 1.1)
                bin_row = {"step": i, "first": first, "last": first + 7, "count": 2000 - 15 * first, "drift": drift}
                tables["positions"].append({**key, **bin_row, "tail": 6 * drift})
            if cppo:
                for response in range(3):
                    tables["tokens"] += tokens(key, i, response, rng)


def tokens(key: dict[str, Any], step: int, response: int, rng: np.random.Generator) -> list[Any]:
    """One response's rows of tokens.csv under CPPO's rule, in plain loops."""
    text, delta, delta_b = "a3-8=5b5*9=5c5+5=0d0-7=3e3*3=9f9+9=8g8-2=6h6*7=2", 0.15, 0.02
    words = [*text, "\\boxed{", "2", "}", "NA", " $", "\n"]
    rows, used, allowed = [], 0.0, 0.0
    for t, word in enumerate(words, start=1):
        weight = 1 - 0.2 * (t - 1) / (len(words) - 1)
        weighted = weight * float(rng.exponential(0.07 if words[max(t - 2, 0)] == "=" else 0.008))
        adjusted = delta + delta_b * allowed - used
        toward = rng.random() < 0.4
        cause = 0 if toward or weighted <= min(delta, adjusted) else 2 if weighted <= delta else 1
        row = {"position": t, "token": word, "advantage": 1.0, "ratio": 1.1, "weighted": weighted, "delta": delta}
        rows.append({**key, "step": step, "row": response, **row, "prefix_threshold": adjusted})
        rows[-1] |= {"threshold": min(delta, adjusted), "reason": cause}
        used, allowed = used + weighted, allowed + weight
    return rows
