"""Figure 1: the masks of PPO/GRPO, DPPO and CPPO beside the validation curves of the suite's last setting.

    python paper_figures/figure1.py results/mini --out results/mini/figures

The last setting stands for the paper's largest model. The formulas are CPPO (arXiv:2606.10968) Eq. 2, 3, 8 and 10.
"""

import sys
from pathlib import Path

from common import Results, canvas, save, script
from matplotlib.axes import Axes
from panels import band_note, legend, validation
from scores import curves

MASKS = (
    (
        ("ppo", "grpo"),
        r"$|\rho_t-1|\ \leq\ \epsilon$",
        "one clip range for every token, on the sampled ratio",
    ),
    (
        ("dppo",),
        r"$D_t\ \leq\ \delta$",
        "one threshold for every token, on the divergence from the rollout policy",
    ),
    (
        ("cppo",),
        r"$w_t\,D_t\ \leq\ \min\left(\delta,\ \ \delta+\delta_b\,W_{t-1}-S_{t-1}\right)$",
        "a weight by position, and a budget for what the prefix has used,\n"
        r"$S_{t-1}=w_1D_1+\ldots+w_{t-1}D_{t-1}$ and $W_{t-1}=w_1+\ldots+w_{t-1}$",
    ),
)
"""Labels, formula, what is particular about it."""


def formulas(ax: Axes, results: Results) -> None:
    """The left half: text only."""
    ax.set_axis_off()
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.text(0, 1.0, "A token's update is kept if it moves the ratio towards 1,", va="top")
    ax.text(0, 0.94, r"$A_t\,(\rho_t-1)\leq 0$, or else if", va="top")
    for top, (rules, formula, note) in zip((0.82, 0.55, 0.28), MASKS, strict=True):
        color = results.look(rules[-1]).color
        ax.plot(
            [0, 0],
            [top - (0.27 if "\n" in note else 0.21), top],
            color=color,
            linewidth=3,
            solid_capstyle="butt",
            clip_on=False,
        )
        ax.text(0.04, top, " / ".join(results.name(rule) for rule in rules), va="top", color=color, weight="bold")
        ax.text(0.04, top - 0.07, formula, va="top", fontsize=10)
        ax.text(0.04, top - 0.155, note, va="top", fontsize=6.5, color="0.35", linespacing=1.6)


def draw(results: Results, out: Path) -> None:
    """Formulas left, curves right."""
    setting = list(results.suite["settings"])[-1]
    figure = canvas(height=3.6)
    left, right = figure.subplots(1, 2)
    formulas(left, results)
    by_rule = curves(results, setting)
    validation(right, results, by_rule, results.rules)
    right.set_title(f"{results.title(setting)}\n({band_note(results)})")
    right.set_ylabel(f"mean Avg@{results.suite['evaluation']['samples']} (%)")
    lost = any(iteration is not None for curve in by_rule.values() for iteration in curve.collapsed)
    legend(figure, results, results.rules, lost)
    save(figure, out, "figure1")


main = script(__doc__, draw)

if __name__ == "__main__":
    sys.exit(main(None))
