"""Which tables and figures can be drawn from a suite, and the files that each makes.

    available(json.loads(Path("results/mini/suite.json").read_text()))      # ['table1', ..., 'figure8']

Imports neither matplotlib nor pandas: the workflow asks this before any job runs.
"""

from typing import Any

TABLES = ("table1", "table2", "table3", "table4")
FIGURES = (
    "figure1",
    "figure2",
    "figure3",
    "figure4",
    "figure5",
    "figure6",
    "figure7",
    "figure8",
)
"""Each is drawn by the script of its name, whose docstring begins with the caption."""

ABLATIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "figure5": {
        "Components": ("cppo", "cppo_no_weight", "cppo_no_budget", "dppo"),
        "Order of the weights": ("cppo_no_budget", "cppo_shuffled", "dppo"),
        "Hard or soft": ("cppo", "cppo_soft", "dppo"),
    },
    "figure6": {
        "Budget and weight": ("cppo", "cppo_budget_fixed", "cppo_wmin", "dppo"),
        "TV or KL": ("cppo", "cppo_kl", "trm_kl", "dppo"),
        "Estimate of the divergence": ("cppo", "cppo_binary", "dppo"),
    },
}
"""Panels of the ablation figures: title -> names of the suite's rules, in the order of the legend."""

TRACES = {"figure3": ("weighted", "threshold"), "figure7": ("delta_b",)}
"""What a figure draws of the rules that show all of it (`Terms.traces`)."""


def available(suite: dict[str, Any]) -> list[str]:
    """The items that can be drawn from a suite (`Suite.published`, the contents of suite.json), tables first."""
    return [item for item in (*TABLES, *FIGURES) if lacks(suite, item) is None]


def files(suite: dict[str, Any], item: str) -> list[str]:
    """Names of the files that `paper_figures/<item>.py` writes for a suite."""
    if item in TABLES:
        return [f"{item}.{kind}" for kind in ("csv", "md", "tex")]
    names = [f"{item}_{setting}" for setting in suite["settings"]] if item == "figure8" else [item]
    return [f"{name}.{kind}" for name in names for kind in ("pdf", "png")]


def lacks(suite: dict[str, Any], item: str) -> str | None:
    """What the suite lacks for an item, in words; None = nothing. Raises ValueError for an unknown item."""
    if item not in (*TABLES, *FIGURES):
        raise ValueError(f"unknown item {item!r}; known: {', '.join((*TABLES, *FIGURES))}")
    if item in ABLATIONS and not panels(suite, item):
        absent = sorted({rule for row in ABLATIONS[item].values() for rule in row} - set(_rules(suite)))
        return f"no panel has all its rules; the suite has none named {', '.join(absent)}"
    if item in TRACES and not showing(suite, item):
        return f"no rule of the suite shows {', '.join(TRACES[item])} (Terms.traces)"
    return None


def panels(suite: dict[str, Any], item: str) -> dict[str, tuple[str, ...]]:
    """The ablation panels of which the suite has every rule."""
    return {title: row for title, row in ABLATIONS[item].items() if set(row) <= set(_rules(suite))}


def showing(suite: dict[str, Any], item: str) -> dict[str, list[str]]:
    """Objective -> names of its rules that show all that the item draws (`TRACES`), in the order of the suite.

    A trace that has the name of a parameter is not shown while that parameter is null.
    """
    rules: dict[str, list[str]] = {}
    for entry in suite["rules"]:
        shown = {trace for trace in entry["traces"] if entry["params"].get(trace, True) is not None}
        if shown >= set(TRACES[item]):
            rules.setdefault(entry["objective"], []).append(entry["name"])
    return rules


def _rules(suite: dict[str, Any]) -> list[str]:
    return [entry["name"] for entry in suite["rules"]]
