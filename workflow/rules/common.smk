# What all rules of the workflow share: the suite, where things are, and how a file of baselines adds a rule to the suite.

import json
import shlex
import sys
from functools import cache
from math import ceil
from pathlib import Path

from snakemake.exceptions import WorkflowError

from cppo.numerics import NUMERICS_VERSION
from cppo.results.run_folder import DONE, SCORES
from cppo.results.tables import TABLES
from cppo.suite.suite import load_suite, suite_name, suite_path
from paper_figures.catalog import available, files

# `--config suite=` takes what the command line takes: a name in config/, or a file.
SUITE_FILE = suite_path(config.get("suite", "mini"))
SUITE = suite_name(SUITE_FILE)
BASELINE_FILES = sorted(
    str(path.resolve()) for path in Path("workflow/rules/baselines").glob("*.smk")
)
# The rules that these files add, as JSON.
ADDED_RULES = []
# The path is absolute, because a file of baselines inherits it into another folder.
ENVIRONMENT = str(Path(workflow.basedir) / "environment.yml")


# Jobs use the Python that runs snakemake. They find the suite in $CPPO_SUITE: as a param, its name would make a run that two
# suites share look changed. Each job has one thread, and jobs run side by side: small models gain nothing from threads, and
# threads that wait busily slow each other down.
shell.prefix(
    f"set -euo pipefail; export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH OMP_NUM_THREADS=1"
    f" CPPO_SUITE={shlex.quote(str(SUITE_FILE))} TOKENIZERS_PARALLELISM=false; "
)


def add_rule(name, objective, **entry):
    """Add a rule to the suite. Returns the argument that tells the command line about it."""
    added = json.dumps({"name": name, "objective": objective, **entry}, sort_keys=True)
    ADDED_RULES.append(added)
    return rule_argument(added)


def rule_argument(added):
    """The argument that tells the command line about a rule that is not in the suite's file."""
    return f"--add-rule {shlex.quote(added)}"


def baseline(*_, **__):
    """The former name of `add_rule`."""
    raise WorkflowError(
        "baseline(...) is now add_rule(...), in `params: added=add_rule(...)`; its wildcard `label` is now `rule`, its"
        " argument `settings` is now `params`: see workflow/rules/baselines/README.md"
    )


def slug(folder):
    """A folder's name for rules and logs."""
    return "_".join(Path(folder).parts)


@cache
def suite():
    """The suite with all added rules. It must not be asked for before every file of baselines was read."""
    return load_suite(SUITE_FILE, tuple(ADDED_RULES))


def resources_of(w):
    """What the suite asks a cluster for, for the setting of a job."""
    if hasattr(w, "setting"):
        return suite().resources_of(w.setting)
    return suite().resources_of(suite().run(w.run).setting_name)


def share(w):
    """The share of these resources that goes with one GPU."""
    return resources_of(w).share


def launcher(w):
    """What runs the module that trains: one process, or one for each GPU of the node but the engine's own. verl starts its own.

    `accelerate launch` will not do: it reads a user's own settings, and on a CPU it starts one process only. SIGTERM waits
    for the iteration in progress, as long as Slurm does.
    """
    setting = suite().run(w.run).setting
    engine_gpus = setting.scale.engine_gpus if setting.scale else 0
    processes = resources_of(w).gpus - engine_gpus
    if processes < 2 or setting.trainer == "verl":
        return "python -m"
    # After `--`, torch's launcher takes no argument of ours for its own (--run for --run-path).
    return f"python -m torch.distributed.run --standalone --nproc-per-node {processes} --shutdown-timeout 900 -m --"


@cache
def table_folders():
    """Folder of tables -> its suite as plain data: the running suite's folder, then every published one."""
    folders = {f"runs/{SUITE}": suite().published()}
    for path in sorted(Path("results").glob("*/suite.json")):
        folders[str(path.parent)] = json.loads(path.read_text())
    return folders


def drawn(folder):
    """Every table and figure file that the folder's suite allows."""
    plain = table_folders()[folder]
    return [
        f"{folder}/figures/{file}"
        for item in available(plain)
        for file in files(plain, item)
    ]
