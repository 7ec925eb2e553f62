"""The theory's figure: the true residual |Delta| of enumerated policies against the bounds, over the horizon T.

    python paper_figures/theory.py --out results/theory

Needs no results folder. For each T, three sets of policy pairs with the paper's settings: DPPO's (D_t <= delta), CPPO's
(Corollary 7) and what CPPO's mask allows (Proposition 8 with slack delta). Line: the bound. Filled marker: the largest
residual found by ascent on policies and rewards, every sequence enumerated. Open marker: the largest of random pairs
under their worst rewards. Dashed: Theorem 1 with free constants, the smallest that an instance meets: near 1, so that
no smaller constant would do. Also written: theory.csv, the numbers of all statements; its rows without delta are those
with free constants, and their bound and residual are of the instance with the largest ratio.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import LOOKS, canvas, save
from matplotlib.lines import Line2D

from cppo import theory, theory_search

DELTA, DELTA_B, W_MIN = 0.15, 0.02, 0.8
"""The paper's Table 3 for a dense Base model; |R| <= 1."""
HORIZONS = range(2, 8)
SEEDS = (0, 1)
LARGEST = 130
"""Vocabularies 2 and 3, as long as there are no more sequences than this."""
DRAWN = {
    "uniform": ("every $D_t \\leq \\delta$ (DPPO)", LOOKS["dppo"].color, "o"),
    "corollary7": ("weighted, prefix budget (CPPO, Cor. 7)", LOOKS["cppo"].color, "*"),
    "mask": ("CPPO's mask (Prop. 8, $\\eta = \\delta$)", LOOKS["cppo_soft"].color, "D"),
}


def measure(horizons: Sequence[int] = HORIZONS, steps: int = 40, samples: int = 200) -> list[dict[str, Any]]:
    """One row a (T, statement): given constants over all `SEEDS` and vocabularies, then free ones over one of each."""
    rows = []
    for horizon in horizons:
        vocabularies = [v for v in (2, 3) if v**horizon <= LARGEST]
        given = theory_search.set_claims(horizon, DELTA, DELTA_B, W_MIN)
        rows += [_row(horizon, name, claim, SEEDS, vocabularies, steps, samples) for name, claim in given.items()]
        free = theory_search.sharp_claims(horizon, W_MIN)
        rows += [_row(horizon, name, claim, SEEDS[:1], [2], steps, samples, True) for name, claim in free.items()]
    return rows


def _row(
    horizon: int,
    name: str,
    claim: theory_search.Claim,
    seeds: Sequence[int],
    vocabularies: Sequence[int],
    steps: int,
    samples: int,
    free: bool = False,
) -> dict[str, Any]:
    """The largest residuals of one statement, at random and found by ascent."""
    drawn, found = [], []
    for vocabulary in vocabularies:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            drawn.append(theory_search.best(claim, theory.random_pair(samples, vocabulary, horizon, generator)))
            found.append(theory_search.search(claim, vocabulary, horizon, generator, restarts=8, steps=steps))
    random, largest = (max(finds, key=lambda f: f.ratio) for finds in (drawn, [*drawn, *found]))
    return {
        "T": horizon,
        "set": f"{name}_free" if free else name,
        "source": claim.source,
        "delta": "" if free else DELTA,
        "delta_b": "" if free else DELTA_B,
        "w_min": W_MIN,
        "xi": 1.0,
        "bound": largest.residual / largest.ratio,
        "random_residual": random.residual,
        "largest_residual": largest.residual,
        "random_ratio": random.ratio,
        "ratio": largest.ratio,
        "random_instances": samples * len(drawn),
        "searches": len(found),
        "seeds": " ".join(map(str, seeds)),
    }


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """theory.pdf, theory.png and theory.csv."""
    figure = canvas(width=7.0, height=2.9)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    for name, (_, color, marker) in DRAWN.items():
        own = [row for row in rows if row["set"] == name]
        horizons = [row["T"] for row in own]
        left.plot(horizons, [row["bound"] for row in own], color=color)
        left.plot(horizons, [row["largest_residual"] for row in own], marker, color=color, markersize=6)
        left.plot(horizons, [row["random_residual"] for row in own], marker, color=color, markerfacecolor="white")
        right.plot(horizons, [row["ratio"] for row in own], color=color, marker=marker, markersize=5)
    own = [row for row in rows if row["set"] == "theorem1_free"]
    right.plot([row["T"] for row in own], [row["ratio"] for row in own], "--", color=LOOKS["cppo"].color)
    left.set_yscale("log")
    left.set_ylabel("$|\\Delta|$, $|R| \\leq 1$")
    left.set_title("Residual and bound")
    right.set_ylim(0, 1.05)
    right.set_ylabel("largest $|\\Delta|$ / bound")
    right.set_title("How much of the bound is reached")
    for ax in (left, right):
        ax.set_xlabel("horizon $T$ (tokens)")
        ax.set_xticks(sorted({row["T"] for row in rows}))
    figure.suptitle(f"$\\delta = {DELTA}$, $\\delta_b = {DELTA_B}$, $w_{{min}} = {W_MIN}$", fontsize=7, color="0.35")
    handles = [Line2D([], [], color=color, marker=marker, label=label) for label, color, marker in DRAWN.values()]
    handles += [
        Line2D([], [], color="0.35", label="bound"),
        Line2D([], [], color=LOOKS["cppo"].color, linestyle="--", label="Theorem 1, free $\\delta$, $\\delta_b$"),
        Line2D([], [], color="0.35", linestyle="none", marker="o", markersize=6, label="largest found"),
        Line2D([], [], color="0.35", linestyle="none", marker="o", markerfacecolor="white", label="largest at random"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    save(figure, out, "theory")
    with (out / "theory.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{x:.6g}" if isinstance(x, float) else x for key, x in row.items()})


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/theory"), help="folder to write to")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    draw(measure(), arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(None))
