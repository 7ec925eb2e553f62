"""Drawing shared by several figures: a line over seeds with its band, validation curves, ablation panels, legends.

A line is the mean over all seeds. Where a run has collapsed it ends at its last value with a cross, and the mean of the
runs that go on is drawn dotted: it is a mean over survivors and not comparable.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import catalog
import numpy as np
from common import DataError, Look, Results, canvas, legend_below, save
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from scores import Curve, Floats, curves, runs, stream

from cppo import statistics

CROSS = Line2D([], [], color="white", marker="X", linestyle="", markersize=7, markeredgecolor="black")
CROSS.set_label("run collapsed (dotted: the others)")


def line(
    ax: Axes,
    x: Floats,
    values: Floats,
    look: Look,
    band: tuple[Floats, Floats] | None,
    collapsed: Sequence[bool],
    markers: bool,
) -> None:
    """The mean of `values` [S, N] over seeds against x [N], with `band` (low, high), each [N]."""
    known = np.isfinite(values)
    if not known.any():
        return
    last = [int(np.flatnonzero(row)[-1]) if row.any() else -1 for row in known]
    ends = [n for n, lost in zip(last, collapsed, strict=True) if lost]
    full = min(ends, default=len(x) - 1) + 1  # where all runs are alive
    mean = _mean(values)
    style: dict[str, Any] = {"color": look.color, "zorder": 3 if look.name == "CPPO" else 2}
    solid = np.isfinite(mean[:full])
    ax.plot(x[:full][solid], mean[:full][solid], **style, **(marks(look) if markers else {}))
    if band is not None:
        ax.fill_between(x[:full], band[0][:full], band[1][:full], color=look.color, alpha=0.13, linewidth=0)
    if full < len(x) and np.isfinite(mean[full:]).any():
        ax.plot(x[max(full - 1, 0) :], mean[max(full - 1, 0) :], linestyle=":", **style)
    for row, n, lost in zip(values, last, collapsed, strict=True):
        if lost and n >= 0:
            ax.plot(x[n], row[n], marker="X", markersize=7, markeredgecolor="black", markeredgewidth=0.7, **style)


def validation(
    ax: Axes, results: Results, by_rule: dict[str, Curve], rules: Sequence[str], benchmark: int | None = None
) -> None:
    """Validation curves in percent of the rules, with bands and the base model's level."""
    base = by_rule["base"]
    level = base.score if benchmark is None else base.by_benchmark[:, :, benchmark]
    ax.axhline(100 * float(level[0, 0]), color=results.look("base").color, linewidth=1, linestyle="--")
    for rule in rules:
        curve = by_rule[rule]
        values = curve.score if benchmark is None else curve.by_benchmark[:, :, benchmark]
        low, high = curve.band(benchmark)
        lost = [iteration is not None for iteration in curve.collapsed]
        line(
            ax,
            curve.iterations.astype(float),
            100 * values,
            results.look(rule),
            (100 * low, 100 * high),
            lost,
            markers=True,
        )
    iterations(ax)


def iterations(ax: Axes) -> None:
    """Whole iterations below the panel."""
    ax.set_xlabel("iteration")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def training(results: Results, setting: str, rule: str, column: str) -> tuple[Floats, Floats, list[bool]]:
    """Iterations [N], a column of curves.csv [S, N] (NaN where missing), and which runs collapsed [S].

    Raises DataError for an iteration given twice, or a finished run without its last one.
    """
    where = f"{results.folder}/curves.csv: {rule} in {setting!r}"
    table = results.table("curves", ("rule", "setting", "seed", "iteration", column))
    table = table[(table["setting"] == setting) & (table["rule"] == rule)]
    if table.duplicated(["seed", "iteration"]).any():
        raise DataError(f"{where}: an iteration is given twice")
    stop = results.suite["settings"][setting]["iterations"]
    seeds, collapsed = runs(results, setting, rule)
    ends = table.groupby("seed")["iteration"].max()
    for seed, lost in zip(seeds, collapsed, strict=True):
        if lost is None and ends.get(seed, 0) != stop:
            raise DataError(
                f"{where}: seed {seed} finished, but its last iteration is {ends.get(seed, 0):.0f} of {stop}"
            )
    wide = table.pivot(index="seed", columns="iteration", values=column)
    wide = wide.reindex(index=seeds, columns=range(1, stop + 1))
    return np.arange(1.0, stop + 1), wide.to_numpy(dtype=float), [lost is not None for lost in collapsed]


def spread(results: Results, values: Floats, *axes: object) -> tuple[Floats, Floats]:
    """Band [N] around the mean of `values` [S, N]: min and max, or the bootstrap interval over seeds."""
    some = np.isfinite(values).any(axis=0)
    edges = np.full((2, values.shape[1]), np.nan)
    if results.ranked:
        draws = statistics.seed_bootstrap(values[:, some], stream(*axes), resamples=1000)
        edges[:, some] = np.nanquantile(draws, [0.025, 0.975], axis=0)
    else:
        edges[:, some] = np.nanmin(values[:, some], axis=0), np.nanmax(values[:, some], axis=0)
    return edges[0], edges[1]


def legend(
    figure: Figure, results: Results, rules: Sequence[str], lost: bool = False, base: bool = True, markers: bool = True
) -> None:
    """The legend of all panels: the rules, the base model's level, and the cross when a run was `lost`."""
    handles = [handle(results.look(rule), markers) for rule in rules]
    if base:
        handles.append(Line2D([], [], color=results.look("base").color, linestyle="--", linewidth=1, label="Base"))
    legend_below(figure, [*handles, CROSS] if lost else handles)


def handle(look: Look, markers: bool, name: str | None = None) -> Line2D:
    """A legend entry."""
    return Line2D([], [], color=look.color, label=name or look.name, **(marks(look) if markers else {}))


def marks(look: Look) -> dict[str, Any]:
    """The rule's marker; a star looks smaller than it is."""
    return {"marker": look.marker, "markersize": 6 if look.marker == "*" else 4}


def band_note(results: Results) -> str:
    """What bands show, for an axis label or title."""
    count = len(results.suite["seeds"])
    if count == 1:
        return "one seed"
    return f"mean of {count} seeds, band: " + ("95% bootstrap interval" if results.ranked else "min to max")


def ablation(results: Results, item: str, out: Path) -> None:
    """One row of ablation panels per setting (Figures 5 and 6)."""
    results.require(item)
    rows, settings = catalog.panels(results.suite, item), list(results.suite["settings"])
    figure = canvas(height=0.2 + 2.5 * len(settings))
    grid = figure.subplots(len(settings), len(rows), squeeze=False, sharex="row", sharey="row")
    for setting, axes in zip(settings, grid, strict=True):
        by_rule = curves(results, setting)
        for ax, (title, rules) in zip(axes, rows.items(), strict=True):
            validation(ax, results, by_rule, rules)
            ax.set_title(title if len(settings) == 1 else f"{results.title(setting)}: {title.lower()}")
            names = [_told_apart(results, rule, setting, title == "Budget and weight") for rule in rules]
            handles = [handle(results.look(rule), True, name) for rule, name in zip(rules, names, strict=True)]
            if any(iteration is not None for rule in rules for iteration in by_rule[rule].collapsed):
                handles.append(CROSS)
            ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.27), fontsize=7)
        axes[0].set_ylabel(f"mean Avg@{results.suite['evaluation']['samples']} (%)")
    figure.supxlabel(band_note(results), fontsize=7, color="0.35")
    save(figure, out, item)


def _told_apart(results: Results, rule: str, setting: str, values: bool) -> str:
    """The name, with the settings that the panel varies when `values`."""
    params = results.params_of(rule, setting) if values else {}
    if "w_min" not in params:
        return results.name(rule)
    fixed = "" if params["adaptive"] else ", fixed"
    return f"CPPO $\\delta_b$ = {params['delta_b']:g}{fixed}, $w_{{min}}$ = {params['w_min']:g}"


def _mean(values: Floats) -> Floats:
    """[N] mean over seeds of what is there, NaN where nothing is."""
    known = np.isfinite(values)
    count = known.sum(axis=0)
    total = np.where(known, values, 0).sum(axis=0)
    mean: Floats = np.divide(total, count, out=np.full(values.shape[1], np.nan), where=count > 0)
    return mean
