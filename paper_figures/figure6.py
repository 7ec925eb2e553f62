"""Figure 6: CPPO's parameters and its divergence: validation curves in three panels (the rules are in `catalog.ABLATIONS`).

    python paper_figures/figure6.py results/ablations --out results/ablations/figures

Budget and weight (delta_b, w_min), TV against KL, Top-K against Binary estimate.
"""

import sys

from common import script
from panels import ablation

main = script(__doc__, lambda results, out: ablation(results, "figure6", out))

if __name__ == "__main__":
    sys.exit(main(None))
