"""Figure 7: the prefix budget during training: effective delta_b (top), its share of all masked tokens (bottom).

    python paper_figures/figure7.py results/mini --out results/mini/figures

There is one column per setting. The rules shown are those that give "delta_b" (`Terms.traces`): of each objective the first one
in the suite. The share is mask_share_budget / mask_share in each iteration of a run; an iteration without masked tokens has
none. Dashed: the floor of an adaptive budget, and its ceiling where it is reached.
"""

import sys
from pathlib import Path

import catalog
import numpy as np
from common import Results, canvas, save, script
from panels import band_note, iterations, legend, line, spread, training
from scores import Floats


def draw(results: Results, out: Path) -> None:
    """One column of two panels per setting."""
    results.require("figure7")
    settings, rules = list(results.suite["settings"]), shown(results)
    figure = canvas(width=7.0 if len(settings) > 1 else 4.2, height=4.0)
    grid = figure.subplots(2, len(settings), squeeze=False, sharex="col", sharey="row")
    lost_any = False
    for setting, (top, bottom) in zip(settings, grid.T, strict=True):
        for rule in rules:
            x, budget, lost = training(results, setting, rule, "delta_b")
            share = budget_share(results, setting, rule)
            lost_any = lost_any or any(lost)
            look = results.look(rule)
            for ax, values in ((top, budget), (bottom, share)):
                line(ax, x, values, look, spread(results, values, setting, rule, "budget"), lost, markers=False)
            params = results.params_of(rule, setting)
            if not params.get("adaptive"):
                continue
            for factor in (1.0, params.get("clamp_factor", np.inf)):
                if factor == 1 or np.nanmax(budget, initial=0) > 0.9 * factor * params["delta_b"]:
                    top.axhline(factor * params["delta_b"], color=look.color, linestyle="--", linewidth=0.8)
        top.set_title(results.title(setting))
        top.margins(y=0.1)
        iterations(bottom)
        bottom.set_ylim(0, max(1, bottom.get_ylim()[1]))
    grid[0, 0].set_ylabel(r"effective $\delta_b$")
    grid[1, 0].set_ylabel("masked by the budget\n(% of masked tokens)")
    figure.suptitle(band_note(results), fontsize=7, color="0.35")
    legend(figure, results, rules, lost_any, base=False, markers=False)
    save(figure, out, "figure7")


def budget_share(results: Results, setting: str, rule: str) -> Floats:
    """Percent of the masked tokens that only the prefix budget rejected, [S, N]; NaN where nothing was masked."""
    masked = training(results, setting, rule, "mask_share")[1]
    rejected = training(results, setting, rule, "mask_share_budget")[1]
    share: Floats = np.divide(100 * rejected, masked, out=np.full(masked.shape, np.nan), where=masked > 0)
    return share


def shown(results: Results) -> list[str]:
    """The first rule of each objective that has a budget."""
    return [rules[0] for rules in catalog.showing(results.suite, "figure7").values()]


main = script(__doc__, draw)

if __name__ == "__main__":
    sys.exit(main(None))
