"""Figure 3: one window of real tokens under CPPO: bars w_t D_t, the three thresholds, masked tokens by cause.

    python paper_figures/figure3.py results/mini --out results/mini/figures

Which window, by rule and not by eye: among the recorded responses of label "cppo" (of all cppo runs, if none has that
name) the one with the most tokens rejected by the prefix budget, then with the most rejected tokens, then the first in
the table; of it the at most 40 tokens with the most budget rejections, then the most rejections, then the earliest.
"""

import sys
from pathlib import Path

import catalog
import numpy as np
import pandas as pd
from common import Results, canvas, legend_below, save, script
from matplotlib.patches import Patch

WIDTH = 40
COLUMNS = (
    "run", "label", "setting", "seed", "step", "row", "position", "token", "weighted", "delta", "prefix_threshold",
    "threshold", "reason",
)  # fmt: skip
THRESHOLD, BUDGET = 1, 2
KINDS = {
    "kept": ("0.75", "kept"),
    "toward": ("0.45", "kept: moves ratio towards 1"),
    "threshold": ("#882255", r"masked: $w_tD_t$ above $\delta$"),
    "budget": ("#E69F00", "masked: prefix budget used up"),
}
"""Kind of token -> colour and legend."""


def draw(results: Results, out: Path) -> None:
    """The chosen window."""
    results.require("figure3")
    shown = window(results)
    first = shown.iloc[0]
    figure = canvas(height=3.2)
    ax = figure.subplots()
    x = shown["position"].to_numpy()
    kinds = kind(shown)
    bars = ax.bar(x, shown["weighted"], width=0.8, color=[KINDS[k][0] for k in kinds])
    for bar, k in zip(bars, kinds, strict=True):
        bar.set(hatch="////" if k == "threshold" else "", edgecolor="white", linewidth=0)
    label = r"prefix-adjusted $\delta+\delta_bW_{t-1}-S_{t-1}$"
    ax.step(x, shown["prefix_threshold"], where="mid", color="#56B4E9", linewidth=4, alpha=0.6, label=label)
    ax.step(x, shown["threshold"], where="mid", color="#0072B2", linewidth=2.2, label="effective: the lower one")
    ax.step(x, shown["delta"], where="mid", color="0.2", linewidth=1, dashes=(3, 3), label=r"$\delta$")
    # A prefix can save or overspend many times delta: the axis stops where the comparison does.
    top = 1.12 * max(shown["weighted"].max(), 1.4 * shown["delta"].max())
    ax.set_ylim(max(min(0, 1.1 * shown["threshold"].min()), -top / 2), top)
    ax.axhline(0, color="0.2", linewidth=0.8)
    ax.set_xlim(x[0] - 0.7, x[-1] + 0.7)
    ax.set_xticks(x, [visible(token) for token in shown["token"]], family="DejaVu Sans Mono")
    for tick, k in zip(ax.get_xticklabels(), kinds, strict=True):
        tick.set_rotation(90 if len(tick.get_text().replace(r"\$", "$")) > 2 else 0)
        if k in ("threshold", "budget"):  # a short bar hides its colour
            tick.set(color=KINDS[k][0], weight="bold")
    ax.grid(axis="x", visible=False)
    ax.set_xlabel(f"tokens {x[0]:.0f} to {x[-1]:.0f} of the response")
    ax.set_ylabel(r"$w_t\,D_t$")
    place = f"{results.name(first['label'])}, {results.title(first['setting'])}, seed {first['seed']:.0f}"
    ax.set_title(f"{place}, window before step {first['step']:.0f}, response {first['row']:.0f}")
    patches = [Patch(facecolor=color, label=text) for key, (color, text) in KINDS.items() if key in kinds]
    lines = ax.get_legend_handles_labels()[0]
    legend_below(figure, [*lines, *patches])
    save(figure, out, "figure3")


def window(results: Results) -> pd.DataFrame:
    """The tokens shown, by position (the rule is in the module's docstring)."""
    table = results.table("tokens", COLUMNS)
    labels = catalog.cppo_labels(results.suite)
    preferred = "cppo" if "cppo" in labels and (table["label"] == "cppo").any() else None
    table = table[table["label"] == preferred] if preferred else table[table["label"].isin(labels)]
    table = table.assign(budget=table["reason"] == BUDGET, masked=table["reason"] > 0)
    keys = ["run", "step", "row"]
    counts = table.groupby(keys, sort=False)[["budget", "masked"]].sum()
    chosen = counts.sort_values(["budget", "masked"], ascending=False, kind="stable").index[0]
    response = table[(table[keys] == list(chosen)).all(axis=1)].sort_values("position")
    width = min(WIDTH, len(response))
    inside = [np.convolve(response[column], np.ones(width), "valid") for column in ("budget", "masked")]
    start = int(np.lexsort((-inside[1], -inside[0]))[0])
    return response.iloc[start : start + width]


def kind(shown: pd.DataFrame) -> list[str]:
    """Each token's key in KINDS."""
    above = shown["weighted"] > shown["threshold"]
    names = {THRESHOLD: "threshold", BUDGET: "budget"}
    return [names.get(r, "toward" if over else "kept") for r, over in zip(shown["reason"], above, strict=True)]


def visible(token: str) -> str:
    """A token's text as a tick label: blanks made visible, no mathematics, at most 10 characters.

    >>> visible(" a"), visible("$x")
    ('␣a', '\\\\$x')
    """
    text = token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    text = text if len(text) <= 10 else text[:9] + "…"
    return text.replace("$", r"\$")


main = script(__doc__, draw)

if __name__ == "__main__":
    sys.exit(main(None))
