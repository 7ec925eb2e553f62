# What all rules share: the suite, where things are, and how a baseline file adds its objective.

import json
import shlex
import sys
from functools import cache
from math import ceil
from pathlib import Path

from cppo.numerics import NUMERICS_VERSION
from cppo.results.run_folder import DONE, SCORES
from cppo.results.tables import TABLES
from cppo.suite.suite import load_suite
from paper_figures.catalog import available, files

SUITE = config.get("suite", "mini")
SUITE_FILE = f"config/{SUITE}.yaml"
BASELINE_FILES = sorted(
    str(path.resolve()) for path in Path("workflow/rules/baselines").glob("*.smk")
)
ADDED_RULES = []
# Absolute, because a baseline file inherits it into another folder.
ENVIRONMENT = str(Path(workflow.basedir) / "environment.yml")


# Jobs use the Python that runs snakemake, and find the suite in $CPPO_SUITE: as a param, its name would make a run that two
# suites share look changed. One thread a job, jobs side by side: small models gain nothing from threads, and
# busy-waiting ones slow each other down.
shell.prefix(
    f"set -euo pipefail; export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH OMP_NUM_THREADS=1"
    f" CPPO_SUITE={SUITE_FILE} TOKENIZERS_PARALLELISM=false; "
)


def add_rule(name, objective, **entry):
    """Add one more rule to the suite; returns the argument that tells the command line about it."""
    ADDED_RULES.append(
        json.dumps({"name": name, "objective": objective, **entry}, sort_keys=True)
    )
    return rule_argument(ADDED_RULES[-1])


def rule_argument(rule):
    """How the command line is told about a rule that is not in the suite's file."""
    return f"--add-rule {shlex.quote(rule)}"


def slug(folder):
    """A folder's name for rules and logs."""
    return "_".join(Path(folder).parts)


def loaded():
    """The suite with all baselines; loaded once, when the first rule asks, after every file of baselines was read."""
    if not hasattr(loaded, "suite"):
        loaded.suite = load_suite(SUITE_FILE, tuple(ADDED_RULES))
    return loaded.suite


@cache
def run_of(run):
    """The suite's run with this id; rules ask for it many times."""
    return loaded().run(run)


def resources_of(w):
    """What the suite asks a cluster for, for the setting of a job."""
    name = w.setting if hasattr(w, "setting") else run_of(w.run).setting_name
    return loaded().resources_of(name)


def share(w):
    """Of that, the share of one GPU."""
    return resources_of(w).share


def launcher(w):
    """What runs the module that trains: one process, or one for each GPU of the node but the engine's own. verl starts its own.

    Not by `accelerate launch`: it reads a user's own settings, and on a CPU starts one process only. SIGTERM waits for
    the iteration in progress, as long as Slurm does.
    """
    setting = run_of(w.run).setting
    own = setting.scale.engine_gpus if setting.scale else 0
    processes = resources_of(w).gpus - own
    if processes < 2 or setting.trainer == "verl":
        return "python -m"
    # After `--`, torch's launcher takes no argument of ours for its own (--run for --run-path).
    return f"python -m torch.distributed.run --standalone --nproc-per-node {processes} --shutdown-timeout 900 -m --"


def table_folders():
    """Folder of tables -> the resolved suite: the running suite's, then every published one's."""
    folders = {f"runs/{SUITE}": loaded().published()}
    for path in sorted(Path("results").glob("*/suite.json")):
        folders[str(path.parent)] = json.loads(path.read_text())
    return folders


def drawn(folder):
    """Every table and figure file that the folder's suite allows."""
    suite = table_folders()[folder]
    return [
        f"{folder}/figures/{file}"
        for item in available(suite)
        for file in files(suite, item)
    ]
