"""Table 4: each benchmark's Avg@k at the checkpoint with the best mean (the one Table 1 reports), with T_stop.

python paper_figures/table4.py results/mini --out results/mini/figures       # table4.csv, .md, .tex
"""

import sys
from pathlib import Path

from common import Results, script
from scores import Summary, benchmarks, curves
from typeset import Cell, all_benchmarks, collapse_at, collapses, lost, marks, percent, protocol, score_cell, write


def draw(results: Results, out: Path) -> None:
    """Writes the table."""
    names = all_benchmarks(results)
    rows: list[list[Cell | str]] = []
    records, lines = [], []
    for setting, resolved in results.suite["settings"].items():
        lines += [len(rows)] if rows else []
        own, by_rule = benchmarks(results, setting), curves(results, setting)
        parts: dict[str, dict[str, Summary]] = {}
        for rule, curve in by_rule.items():
            parts[rule] = {name: curve.summary(curve.best, own.index(name)) for name in own}
            parts[rule]["avg"] = curve.summary(curve.best)
        rivals = [rule for rule in results.rules if not collapses(by_rule[rule])] if results.ranked else []
        ranks = {name: marks({rule: parts[rule][name].mean for rule in rivals}) for name in [*own, "avg"]}
        for rule, curve in by_rule.items():
            row: list[Cell | str] = [results.title(setting), str(resolved["iterations"]), results.name(rule)]
            for name in [*names, "avg"]:
                part = parts[rule].get(name)
                if part is None or lost(curve):
                    row.append(collapse_at(curve) if part is not None and name == "avg" else "–")
                else:
                    row.append(score_cell(part, curve if name == "avg" else None, ranks[name].get(rule, "")))
            rows.append(row)
            record: dict[str, object] = {"setting": setting, "t_stop": resolved["iterations"], "rule": rule}
            record["best_iterations"] = " ".join(str(iteration) for iteration in curve.iterations[curve.best])
            for name in [*names, "avg"]:
                part = parts[rule].get(name)
                record |= dict.fromkeys((name, f"{name}_low", f"{name}_high")) if part is None else percent(part, name)
            records.append(record)
    header = [("", name) for name in ("Model", "T_stop", "Rule", *names, "Avg")]
    caption = f"Per-benchmark scores at each run's checkpoint with the best mean in [0, T_stop]. {protocol(results)}"
    write(out, "table4", caption, header, rows, records, lines)


main = script(__doc__, draw)

if __name__ == "__main__":
    sys.exit(main(None))
