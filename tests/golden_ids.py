"""Today's ids of the committed suites, stored in golden_ids.json.

    python tests/golden_ids.py        stores them anew

Published tables name runs by these ids. An id changes with a suite, with a default of an objective and with a key of the
configuration (unless the key is marked `LATER`): when that is meant, store them anew in the same commit.
"""

import hashlib
import json
from pathlib import Path

from cppo.suite.suite import Suite, load_suite

ROOT = Path(__file__).resolve().parent.parent
FILE = Path(__file__).with_suffix(".json")
COMMAND = "python tests/golden_ids.py"


def fingerprint(suite: Suite) -> dict[str, str]:
    """One hash over the ids of all runs, of all base models, and of all their data."""
    kinds = {
        "runs": [run.id for run in suite.runs()],
        "base models": [base.id for base in suite.bases()],
        "data": [base.data for base in suite.bases()],
    }
    return {kind: hashlib.sha256(" ".join(ids).encode()).hexdigest()[:10] for kind, ids in kinds.items()}


if __name__ == "__main__":
    prints = {path.stem: fingerprint(load_suite(path)) for path in sorted((ROOT / "config").glob("*.yaml"))}
    FILE.write_text(json.dumps(prints, indent=1) + "\n")
