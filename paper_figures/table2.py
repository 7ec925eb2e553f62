"""Table 2: what each rule of the suite measures, and to what its constraint applies.

    python paper_figures/table2.py results/mini --out results/mini/figures       # table2.csv, .md, .tex

Facts about the rules are below; estimators and numbers come from the suite.
"""

import sys
from pathlib import Path
from typing import Any

from common import Results, script
from typeset import write

FACTS = {
    "pg": ("ratio ρₜ, capped", "nothing", "every token kept"),
    "ppo": ("ratio ρₜ", "each token, one range", "outside the range: dropped"),
    "grpo": ("ratio ρₜ", "each token, one range", "outside the range: dropped"),
    "cispo": ("ratio ρₜ", "each token's weight", "weight clipped, every token kept"),
    "minpro": ("lowest earlier ratio × ρₜ", "each token's weight, by its prefix", "weight clipped, every token kept"),
    "gspo": ("mean log-ratio of the response", "whole response", "outside the range: dropped"),
    "gmpo": ("log-ratios of the response", "each token's log-ratio", "clipped inside a geometric mean"),
    "sapo": ("ratio ρₜ", "each token, one soft range", "faded out smoothly"),
    "drpo": ("|π − μ|", "each token, one scale", "pulled back by a quadratic penalty"),
    "dppo": ("{divergence}", "each token, one threshold", "above it: dropped"),
    "trm": ("{divergence}", "whole response ({criteria})", "response dropped"),
    "cppo": ("{weight}{divergence}{prefix}", "each token, {where}", "above it: {action}"),
}
"""Objective -> statistic, where the constraint applies, what happens beyond it."""
SHOWN = (
    *(
        "clip_low",
        "clip_high",
        "dual_clip",
        "cap_prefix_at_1",
        "tau_pos",
        "tau_neg",
        "delta",
        "delta_max",
        "delta_mean",
    ),
    *("w_min", "delta_b", "adaptive", "shuffle", "span"),
)
"""Parameters of the rules above that are listed where they are on; of any other rule all are."""


def draw(results: Results, out: Path) -> None:
    """Writes the table."""
    records = [{"rule": rule, **facts(results, rule)} for rule in results.rules]
    header = [("", name) for name in ("Rule", "Statistic", "Constraint applies to", "Beyond it", "Parameters")]
    rows = [[results.name(record["rule"]), *list(record.values())[2:]] for record in records]
    caption = (
        "What each rule measures and where its constraint applies. Divergence rules always keep an update that moves "
        "the ratio towards 1. Values that differ between settings are joined by a slash, in Table 3's order."
    )
    write(out, "table2", caption, header, rows, records)


def facts(results: Results, rule: str) -> dict[str, str]:
    """The row of one rule."""
    entry = results.entry(rule)
    each = [results.params_of(rule, setting) for setting in results.suite["settings"]]
    words = {"divergence": divergence(entry.get("divergence"))}
    if entry["objective"] == "cppo":
        words |= cppo_words(each[0])
    limits = {"delta_max": "its largest token", "delta_mean": "its mean"}
    words["criteria"] = " and ".join(text for key, text in limits.items() if each[0].get(key) is not None)
    known = FACTS.get(entry["objective"], ("its own", "its own", "its own"))
    keys = ("statistic", "applies_to", "beyond")
    texts = {key: text.format_map(words) for key, text in zip(keys, known, strict=True)}
    listed = SHOWN if entry["objective"] in FACTS else dict.fromkeys(name for params in each for name in params)
    names = [name for name in listed if any(params.get(name) not in (None, False) for params in each)]
    if "delta_b" not in names:
        names = [name for name in names if name != "adaptive"]
    values = (f"{name} {'/'.join(dict.fromkeys(_number(s.get(name)) for s in each))}" for name in names)
    shown = ", ".join(value.removesuffix(" yes") for value in values)
    return {"objective": entry["objective"], **texts, "params": shown}


def divergence(given: dict[str, Any] | None) -> str:
    """The estimator in words."""
    if given is None:
        return "a divergence"
    known = {"binary": "Binary", "exact": "exact", "top_k": f"Top-{given.get('k')}"}
    estimator = known.get(given["estimator"], given["estimator"].split(":")[-1])
    return f"{estimator} {given['kind'].upper()} from μ"


def cppo_words(params: dict[str, Any]) -> dict[str, str]:
    """CPPO's parts that are on."""
    weighted, budget = params.get("w_min", 1) < 1, params.get("delta_b") is not None
    by = [text for text, on in (("position", weighted), ("prefix", budget)) if on]
    return {
        "weight": "weighted " if weighted else "",
        "prefix": " and its sum over the prefix" if budget else "",
        "where": f"threshold by {' and '.join(by)}" if by else "one threshold",
        "action": "scaled down" if params.get("soft") else "dropped",
    }


def _number(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, int | float) else "none" if value is None else str(value)


main = script(__doc__, draw)

if __name__ == "__main__":
    sys.exit(main(None))
