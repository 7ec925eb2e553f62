"""Figure 5: ablations of CPPO's parts: validation curves in three panels (the rules are in `catalog.ABLATIONS`).

    python paper_figures/figure5.py results/ablations --out results/ablations/figures

Components (position weight, prefix budget), ordered against shuffled weights, hard mask against soft gate.
"""

import sys

from common import script
from panels import ablation

main = script(__doc__, lambda results, out: ablation(results, "figure5", out))

if __name__ == "__main__":
    sys.exit(main(None))
