"""Figure 3: one window of real tokens: the weighted divergence, its thresholds, and masked tokens by cause.

    python paper_figures/figure3.py results/mini --out results/mini/figures

One panel for each objective whose rules show "weighted" and "threshold", and "prefix_threshold" if they have one
(`Terms.traces`). The window is not chosen by eye. The rule is the objective's first one in the suite with recorded responses.
The response is the one with the most tokens rejected by the prefix budget, then with the most rejected tokens, then the first
in the table. The window is the at most 40 tokens with the most budget rejections, then with the most rejections, then the
earliest.
"""

import sys
from pathlib import Path

import catalog
import numpy as np
import pandas as pd
from common import DataError, Results, canvas, legend_below, save, script
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from cppo.objectives.types import Reason

WIDTH = 40
COLUMNS = (
    "run", "rule", "setting", "seed", "iteration", "row", "position", "token", *catalog.TRACES["figure3"], "reason",
)  # fmt: skip
PREFIX = "prefix_threshold"
"""A trace that is drawn for the rules that show it."""
KINDS = {
    "kept": ("0.75", "kept"),
    "toward": ("0.45", "kept: moves ratio towards 1"),
    "threshold": ("#882255", "masked: above the token's own threshold"),
    "budget": ("#E69F00", "masked: prefix budget used up"),
    "sequence": ("#117733", "masked: with the whole response"),
}
"""Kind of token -> colour and legend; a masked token's kind is its `Reason`."""


def draw(results: Results, out: Path) -> None:
    """One panel per objective, below one another."""
    results.require("figure3")
    windows = [window(results, rule) for rule in shown(results)]
    figure = canvas(height=0.7 + 2.5 * len(windows))
    axes = figure.subplots(len(windows), squeeze=False).ravel()
    for ax, tokens in zip(axes, windows, strict=True):
        panel(ax, results, tokens)
    present = {key for tokens in windows for key in kinds(tokens)}
    lines = {line.get_label(): line for ax in axes for line in ax.get_legend_handles_labels()[0]}
    patches = [Patch(facecolor=color, label=text) for key, (color, text) in KINDS.items() if key in present]
    legend_below(figure, [*lines.values(), *patches])
    save(figure, out, "figure3")


def panel(ax: Axes, results: Results, tokens: pd.DataFrame) -> None:
    """One window: a bar per token, and the thresholds as steps."""
    first, x, each = tokens.iloc[0], tokens["position"].to_numpy(), kinds(tokens)
    bars = ax.bar(x, tokens["weighted"], width=0.8, color=[KINDS[key][0] for key in each])
    for bar, key in zip(bars, each, strict=True):
        bar.set(hatch="////" if key == "threshold" else "", edgecolor="white", linewidth=0)
    name = "threshold"
    if PREFIX in tokens:
        look = {"color": "#56B4E9", "linewidth": 4, "alpha": 0.6}
        ax.step(x, tokens[PREFIX], where="mid", label="prefix-adjusted threshold", **look)
        name = "effective: the lower one"
    ax.step(x, tokens["threshold"], where="mid", color="#0072B2", linewidth=2.2, label=name)
    delta = results.params_of(first["rule"], first["setting"]).get("delta")
    if delta is not None:
        ax.step(x, [delta] * len(x), where="mid", color="0.2", linewidth=1, dashes=(3, 3), label=r"$\delta$")
    # A prefix can save or overspend many times the threshold: the axis stops where the comparison does.
    top = 1.12 * max(tokens["weighted"].max(), 1.4 * (delta or tokens["threshold"].max()))
    ax.set_ylim(max(min(0, 1.1 * tokens["threshold"].min()), -top / 2), top)
    ax.axhline(0, color="0.2", linewidth=0.8)
    ax.set_xlim(x[0] - 0.7, x[-1] + 0.7)
    ax.set_xticks(x, [visible(token) for token in tokens["token"]], family="DejaVu Sans Mono")
    for tick, key in zip(ax.get_xticklabels(), each, strict=True):
        tick.set_rotation(90 if len(tick.get_text().replace(r"\$", "$")) > 2 else 0)
        if key not in ("kept", "toward"):  # a short bar hides its colour
            tick.set(color=KINDS[key][0], weight="bold")
    ax.grid(axis="x", visible=False)
    ax.set_xlabel(f"tokens {x[0]:.0f} to {x[-1]:.0f} of the response")
    ax.set_ylabel(r"$w_t\,D_t$")
    place = f"{results.name(first['rule'])}, {results.title(first['setting'])}, seed {first['seed']:.0f}"
    ax.set_title(f"{place}, window before iteration {first['iteration']:.0f}, response {first['row']:.0f}")


def shown(results: Results) -> list[str]:
    """The rules whose tokens are shown: of each objective the first rule with recorded responses."""
    recorded = set(results.table("tokens", COLUMNS)["rule"])
    showing = catalog.showing(results.suite, "figure3").values()
    rules = [next(rule for rule in rules if rule in recorded) for rules in showing if recorded & set(rules)]
    if not rules:
        raise DataError(
            f"{results.folder}/tokens.csv: no row of a rule that shows {', '.join(catalog.TRACES['figure3'])}"
        )
    return rules


def window(results: Results, rule: str) -> pd.DataFrame:
    """The tokens shown of a rule, by position (the module's docstring says which)."""
    columns = (*COLUMNS, PREFIX) if PREFIX in results.entry(rule)["traces"] else COLUMNS
    table = results.table("tokens", columns)
    table = table[table["rule"] == rule]
    table = table.assign(budget=table["reason"] == Reason.BUDGET, masked=table["reason"] > 0)
    keys = ["run", "iteration", "row"]
    counts = table.groupby(keys, sort=False)[["budget", "masked"]].sum()
    chosen = counts.sort_values(["budget", "masked"], ascending=False, kind="stable").index[0]
    response = table[(table[keys] == list(chosen)).all(axis=1)].sort_values("position")
    width = min(WIDTH, len(response))
    inside = [np.convolve(response[column], np.ones(width), "valid") for column in ("budget", "masked")]
    start = int(np.lexsort((-inside[1], -inside[0]))[0])
    return response.iloc[start : start + width]


def kinds(tokens: pd.DataFrame) -> list[str]:
    """Each token's key in `KINDS`."""
    above = tokens["weighted"] > tokens["threshold"]
    return [
        Reason(int(reason)).name.lower() if reason else "toward" if over else "kept"
        for reason, over in zip(tokens["reason"], above, strict=True)
    ]


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
