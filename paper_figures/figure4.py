"""Figure 4: validation curves (mean of the benchmarks' Avg@k) of all rules, one panel per setting.

    python paper_figures/figure4.py results/mini --out results/mini/figures

All curves start at the shared base model. Band: min to max over seeds, from 5 seeds on the 95% bootstrap interval.
"""

import sys
from pathlib import Path

from common import Results, canvas, save, script
from panels import band_note, legend, validation
from scores import curves


def draw(results: Results, out: Path) -> None:
    """One panel per setting, at most three side by side."""
    settings = list(results.suite["settings"])
    across = 2 if len(settings) == 4 else min(3, len(settings))
    down = -(-len(settings) // across)
    figure = canvas(width=7.0 if across > 1 else 4.6, height=0.7 + 2.2 * down if across > 1 else 3.4)
    grid = figure.subplots(down, across, squeeze=False).ravel()
    lost = False
    for ax, setting in zip(grid, settings, strict=False):
        by_rule = curves(results, setting)
        validation(ax, results, by_rule, results.rules)
        ax.set_title(results.title(setting))
        lost = lost or any(iteration is not None for curve in by_rule.values() for iteration in curve.collapsed)
    for ax in grid[len(settings) :]:
        ax.set_axis_off()
    for ax in grid[::across]:
        ax.set_ylabel(f"mean Avg@{results.suite['evaluation']['samples']} (%)")
    figure.suptitle(band_note(results), fontsize=7, color="0.35")
    legend(figure, results, results.rules, lost)
    save(figure, out, "figure4")


main = script(__doc__, draw)

if __name__ == "__main__":
    sys.exit(main(None))
