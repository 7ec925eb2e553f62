"""Table 3: the settings: rollouts and updates, and CPPO's thresholds in each.

    python paper_figures/table3.py results/mini --out results/mini/figures       # table3.csv, .md, .tex

The thresholds are those of the suite's entry "cppo" (its first entry of that objective, if none has that name; of DPPO,
which shares delta, if there is no CPPO).
"""

import sys
from pathlib import Path
from typing import Any

from common import Results, script
from typeset import write

HEADS = {
    "model": "Model",
    "prompts_per_rollout": "prompts",
    "responses_per_prompt": "responses",
    "minibatch": "minibatch",
    "updates_per_rollout": "updates",
    "max_response_tokens": "max tokens",
    "delta": "δ",
    "delta_b_min": "δ_b (min)",
    "w_min": "w_min",
    "adaptive_budget": "adaptive",
    "t_stop": "T_stop",
}
"""Columns of the paper's Table 3 and their headings."""


def draw(results: Results, out: Path) -> None:
    """Writes the table."""
    records = [{"setting": setting, **row(results, setting)} for setting in results.suite["settings"]]
    cells = [[_text(record[key]) for key in HEADS] for record in records]
    caption = (
        "Settings: prompts per rollout, responses per prompt, prompts per minibatch, optimiser steps per rollout, longest "
        "response; CPPO's threshold, prefix budget per token (adaptive: its floor) and last weight; iterations."
    )
    write(out, "table3", caption, [("", head) for head in HEADS.values()], cells, records)


def row(results: Results, setting: str) -> dict[str, Any]:
    """One setting's values by column."""
    resolved = results.suite["settings"][setting]
    rollout = resolved["rollout"]
    params = thresholds(results, setting)
    return {
        "model": resolved["title"],
        "prompts_per_rollout": rollout["prompts"],
        "responses_per_prompt": rollout["responses"],
        "minibatch": rollout["minibatch"],
        "updates_per_rollout": rollout["prompts"] // rollout["minibatch"],
        "max_response_tokens": rollout["max_response_tokens"],
        "delta": params.get("delta"),
        "delta_b_min": params.get("delta_b"),
        "w_min": params.get("w_min"),
        "adaptive_budget": params.get("adaptive"),
        "t_stop": resolved["iterations"],
    }


def thresholds(results: Results, setting: str) -> dict[str, Any]:
    """The settings of the suite's main CPPO entry, else of its DPPO entry, else nothing."""
    entries = results.suite["rules"]
    for objective in ("cppo", "dppo"):
        rules = [entry["name"] for entry in entries if entry["objective"] == objective]
        if rules:
            return results.params_of(objective if objective in rules else rules[0], setting)
    return {}


def _text(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


main = script(__doc__, draw)

if __name__ == "__main__":
    sys.exit(main(None))
