"""Figure 2: drift by token position at the end of training: mean of |pi - mu|, its top-10% tail, thresholds.

    python paper_figures/figure2.py results/mini --out results/mini/figures

There is one row per setting. Left and middle: the last window of each run, bins averaged over seeds by their number of tokens.
Right: the largest D_t that a rule on total variation (TV) allows by position before any prefix budget, delta / w_t, with
w_t = 1 for a rule without position weights such as DPPO. The response is as long as the longest observed.
"""

import sys
from pathlib import Path

import pandas as pd
import torch
from common import DataError, Results, canvas, save, script
from matplotlib.axes import Axes
from panels import band_note, legend, marks

from cppo.objectives.divergence import position_weight

COLUMNS = ("run", "rule", "setting", "iteration", "first", "last", "count", "drift", "tail")


def draw(results: Results, out: Path) -> None:
    """One row of panels per setting."""
    settings = list(results.suite["settings"])
    figure = canvas(height=0.8 + 2.1 * len(settings))
    grid = figure.subplots(len(settings), 3, squeeze=False)
    for setting, (mean, tail, threshold) in zip(settings, grid, strict=True):
        longest = 0
        for rule in results.rules:
            bins, look = last_window(results, setting, rule), results.look(rule)
            middle = (bins["first"] + bins["last"]) / 2
            for ax, column in ((mean, "drift"), (tail, "tail")):
                ax.plot(middle, bins[column], color=look.color, zorder=3 if rule == "cppo" else 2, **marks(look))
            longest = max(longest, int(bins["last"].max() if len(bins) else 0))
        if longest == 0:
            raise DataError(f"{results.folder}/positions.csv: no rows in setting {setting!r}")
        thresholds(threshold, results, setting, longest)
        mean.set_ylabel(results.title(setting), fontsize=9)
        for ax in (mean, tail):
            ax.set_ylim(bottom=0)
        for ax in (mean, tail, threshold):
            ax.set_xlabel("token position")
    for ax, title in zip(
        grid[0], (r"mean of $|\pi-\mu|$", "mean of its largest 10%", "largest $D_t$ allowed"), strict=True
    ):
        ax.set_title(title)
    figure.suptitle(f"last window of training, {band_note(results).split(',')[0]}", fontsize=7, color="0.35")
    legend(figure, results, results.rules, base=False)
    save(figure, out, "figure2")


def last_window(results: Results, setting: str, rule: str) -> pd.DataFrame:
    """first, last, drift and tail of each position bin at each run's last iteration, averaged over runs by count.

    No rows when every run collapsed before its first window.
    """
    table = results.table("positions", COLUMNS)
    table = table[(table["setting"] == setting) & (table["rule"] == rule)]
    table = table[table["iteration"] == table.groupby("run")["iteration"].transform("max")]
    table = table[table["count"] > 0].dropna(subset=["drift", "tail"])
    weighted = table.assign(drift=table["drift"] * table["count"], tail=table["tail"] * table["count"])
    sums = weighted.groupby(["first", "last"])[["count", "drift", "tail"]].sum()
    return sums[["drift", "tail"]].div(sums["count"], axis=0).reset_index()


def thresholds(ax: Axes, results: Results, setting: str, length: int) -> None:
    """delta / w_t by position of every rule with a parameter delta on a divergence of kind tv."""
    position = torch.arange(1, length + 1, dtype=torch.float64)
    drawn = False
    for rule in results.rules:
        entry = results.entry(rule)
        params = results.params_of(rule, setting)
        weighted = "weighted" in entry.get("traces", ())  # by weights that fall to w_min, if it has that parameter
        if (entry.get("divergence") or {}).get("kind") != "tv" or "delta" not in params:
            continue
        if params.get("shuffle") or (weighted and "w_min" not in params):
            continue
        weight = position_weight(position, params.get("span") or length, params.get("w_min", 1)).numpy()
        look = results.look(rule)
        ax.plot(position, params["delta"] / weight, color=look.color, markevery=max(1, length // 8), **marks(look))
        drawn = True
    if drawn:
        ax.set_ylim(bottom=0)
        ax.margins(y=0.15)
    else:
        ax.set_axis_off()
        ax.text(0.5, 0.5, "no rule with a TV threshold", ha="center", transform=ax.transAxes, color="0.35")


main = script(__doc__, draw)

if __name__ == "__main__":
    sys.exit(main(None))
