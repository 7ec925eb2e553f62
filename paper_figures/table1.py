"""Table 1: best score in the window [0, T_stop] of each rule in each setting, and the score at T_stop beside it.

    python paper_figures/table1.py results/mini --out results/mini/figures       # table1.csv, .md, .tex

Best is the paper's number, each run's own best checkpoint; it gains from the number of checkpoints looked at. Final
does not, so rules are compared on it too: from 5 seeds on with the probability of improvement over DPPO. A rule all of
whose runs collapsed shows collapse@iteration instead of a best score, and its last scored checkpoint as final.
"""

import sys
from pathlib import Path

import numpy as np
from common import Results, script
from scores import Curve, Summary, curves, stream
from typeset import Cell, collapse_at, collapses, lost, marks, percent, protocol, score_cell, write

from cppo import statistics

AGAINST = "dppo"


def draw(results: Results, out: Path) -> None:
    """Writes the table."""
    settings, rules = list(results.suite["settings"]), ["base", *results.rules]
    compared = results.ranked and AGAINST in results.rules
    header = [("", "Rule")]
    rows: list[list[Cell | str]] = [[results.name(rule)] for rule in rules]
    records = []
    for setting in settings:
        header += [
            (results.title(setting), name)
            for name in ("best", "final", f"P(> {results.name(AGAINST)})")[: 2 + compared]
        ]
        by_rule = curves(results, setting)
        rivals = [rule for rule in results.rules if not collapses(by_rule[rule])] if results.ranked else []
        best = marks({rule: by_rule[rule].at(by_rule[rule].best).mean() for rule in rivals})
        final = marks({rule: by_rule[rule].at(by_rule[rule].final).mean() for rule in rivals})
        for row, rule in zip(rows, rules, strict=True):
            curve = by_rule[rule]
            top, last = curve.summary(curve.best), curve.summary(curve.final)
            row.append(collapse_at(curve) if lost(curve) else score_cell(top, curve, best.get(rule, "")))
            row.append(score_cell(last, curve, final.get(rule, "")))
            other = by_rule[AGAINST] if compared and rule not in ("base", AGAINST) else None
            if compared:
                row.append(improvement(curve, other, "final")[0])
            records.append(record(curve, top, last, other))
    write(out, "table1", caption(results, compared), header, rows, records, lines=[1])


def improvement(curve: Curve, other: Curve | None, which: str) -> tuple[str, list[float | None]]:
    """P(a run of the rule scores above a run of the other) with its interval, as text and as [mean, low, high]."""
    if other is None:
        return "–", [None, None, None]
    a, b = (c.at(getattr(c, which)) for c in (curve, other))
    if which == "final":  # a collapsed run has no policy at T_stop: it loses to every run that finished
        a, b = (np.where([iteration is None for iteration in c.collapsed], x, -1) for c, x in ((curve, a), (other, b)))
    draws = statistics.improvement_bootstrap(a, b, stream(curve.setting, curve.rule, "improvement", which))
    p, (low, high) = statistics.probability_of_improvement(a, b), statistics.interval(draws)
    return f"{p:.2f} [{low:.2f}, {high:.2f}]", [p, low, high]


def record(curve: Curve, top: Summary, last: Summary, other: Curve | None) -> dict[str, object]:
    """The CSV's row; best and final also for a rule that collapsed."""
    row: dict[str, object] = {
        "setting": curve.setting,
        "rule": curve.rule,
        "seeds": len(curve.seeds),
        "collapsed": len(collapses(curve)),
        "collapse_iterations": " ".join(str(iteration) for iteration in collapses(curve)),
        **percent(top, "best"),
        "best_iterations": " ".join(str(iteration) for iteration in curve.iterations[curve.best]),
        **percent(last, "final"),
        "final_iterations": " ".join(str(iteration) for iteration in curve.iterations[curve.final]),
    }
    for which in ("best", "final"):
        values = improvement(curve, other, which)[1]
        row |= {f"{which}_improvement{end}": v for end, v in zip(("", "_low", "_high"), values, strict=True)}
    return row


def caption(results: Results, compared: bool) -> str:
    """What the numbers are."""
    stops = sorted({setting["iterations"] for setting in results.suite["settings"].values()})
    text = (
        f"Best = each run's highest score up to T_stop ({', '.join(map(str, stops))} iterations); "
        f"final = at T_stop, or the last scored checkpoint of a run that collapsed. {protocol(results)}"
    )
    unjudged = int(np.nansum(results.table("scores", ("unjudged",))["unjudged"]))
    if unjudged:
        text += f" {unjudged} answers could be judged neither right nor wrong and are left out."
    if compared:
        text += (
            f" P(> {results.name(AGAINST)}): probability that a run's final score exceeds that of a run of "
            f"{results.name(AGAINST)} (ties half; a collapsed run loses to one that finished), 95% bootstrap interval."
        )
    return text


main = script(__doc__, draw)

if __name__ == "__main__":
    sys.exit(main(None))
