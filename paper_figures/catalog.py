"""Which tables and figures can be drawn from a suite, and the files that each makes.

    available(json.loads(Path("results/mini/suite.json").read_text()))      # ['table1', ..., 'figure8']

Imports neither matplotlib nor pandas: the workflow asks this before any job runs.
"""

from typing import Any

TABLES = ("table1", "table2", "table3", "table4")
FIGURES = ("figure1", "figure2", "figure3", "figure4", "figure5", "figure6", "figure7", "figure8")

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
"""Panels of the ablation figures: title -> labels of the suite's objectives, in the order of the legend."""


def available(suite: dict[str, Any]) -> list[str]:
    """The items that can be drawn from a suite (the contents of suite.json), tables first."""
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
        absent = sorted({label for row in ABLATIONS[item].values() for label in row} - set(_labels(suite)))
        return f"no panel has all its objectives; the suite has none named {', '.join(absent)}"
    if item == "figure3" and not cppo_labels(suite):
        return "the suite has no run of objective cppo, whose tokens it shows"
    if item == "figure7" and not budget_labels(suite):
        return "the suite has no run of objective cppo with a prefix budget (delta_b)"
    return None


def panels(suite: dict[str, Any], item: str) -> dict[str, tuple[str, ...]]:
    """The ablation panels of which the suite has every objective."""
    return {title: row for title, row in ABLATIONS[item].items() if set(row) <= set(_labels(suite))}


def cppo_labels(suite: dict[str, Any]) -> list[str]:
    """Labels of the suite's runs of objective cppo."""
    return [entry["name"] for entry in suite["objectives"] if entry["objective"] == "cppo"]


def budget_labels(suite: dict[str, Any]) -> list[str]:
    """Those of them with a prefix budget (which is the objective's default)."""
    off = {entry["name"] for entry in suite["objectives"] if entry.get("settings", {}).get("delta_b", 1) is None}
    return [label for label in cppo_labels(suite) if label not in off]


def _labels(suite: dict[str, Any]) -> list[str]:
    return [entry["name"] for entry in suite["objectives"]]
