"""Figures 8 to 11: one file per setting. Top: each benchmark; bottom: training reward, response length, engine mismatch.

    python paper_figures/figure8.py results/mini --out results/mini/figures      # figure8_<setting>.pdf

The mismatch is the relative error between the rollout engine's and the trainer's log-probabilities (log scale).
"""

import math
import sys
from pathlib import Path

import numpy as np
from common import Results, canvas, save, script
from panels import band_note, iterations, legend, line, spread, training, validation
from scores import benchmarks, curves

BOTTOM = {
    "reward": "training reward",
    "response_length": "response length (tokens)",
    "relative_logprob_error": "relative log-prob error",
}
"""Columns of curves.csv and their titles."""


def draw(results: Results, out: Path) -> None:
    """Draws every setting."""
    for setting in results.suite["settings"]:
        one(results, setting, out)


def one(results: Results, setting: str, out: Path) -> None:
    """Draws one setting."""
    names = benchmarks(results, setting)
    figure = canvas(height=5.0)
    cells = math.lcm(len(names), len(BOTTOM))
    grid = figure.add_gridspec(2, cells)
    by_rule = curves(results, setting)
    k = results.suite["evaluation"]["samples"]
    for n, name in enumerate(names):
        width = cells // len(names)
        ax = figure.add_subplot(grid[0, n * width : (n + 1) * width])
        validation(ax, results, by_rule, results.rules, n)
        ax.set_title(name)
        ax.set_ylabel(f"Avg@{k} (%)" if n == 0 else "")
    for n, (column, title) in enumerate(BOTTOM.items()):
        width = cells // len(BOTTOM)
        ax = figure.add_subplot(grid[1, n * width : (n + 1) * width])
        for rule in results.rules:
            x, values, lost = training(results, setting, rule, column)
            if column == "relative_logprob_error":
                values = np.where(values > 0, values, np.nan)
            band = spread(results, values, setting, rule, column)
            line(ax, x, values, results.look(rule), band, lost, markers=False)
        if column == "relative_logprob_error":
            ax.set_yscale("log")
        ax.set_title(title)
        iterations(ax)
    any_lost = any(iteration is not None for curve in by_rule.values() for iteration in curve.collapsed)
    figure.suptitle(f"{results.title(setting)} ({band_note(results)})")
    legend(figure, results, results.rules, any_lost)
    save(figure, out, f"figure8_{setting}")


main = script(__doc__, draw)

if __name__ == "__main__":
    sys.exit(main(None))
