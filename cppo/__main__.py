"""The command line: what every workflow rule calls, usable without Snakemake.

    cppo data      --suite mini --setting base     problems and lm-eval tasks
    cppo base      --suite mini --setting base     the warm start, or a published checkpoint
    cppo runs      --suite mini                    run ids
    cppo train     --suite mini --run ID           a run, or the rest of it
    cppo render    --suite paper --run ID          the verl command of a run
    cppo evaluate  runs/train/cppo/ID              scores of a run's or a base model's checkpoints
    cppo collect   --suite mini                    tables in runs/mini/
    cppo publish   mini                            check them and copy them to results/mini/
    cppo show      ID                              what a run's numbers come from
    cppo verify    mini                            do the tables in results/mini/ follow from their rows?
    cppo check-suite mini                          is it valid?
    cppo plan      paper                           what does it cost?
    cppo objectives                                every objective with its parameters
    cppo check     my_module:my_objective          does it keep the laws of every objective?
    cppo schema                                    every key of a suite

A suite is given by its name (config/NAME.yaml) or by its file. `python -m cppo` is the same as `cppo`.
A user's mistake is one line on standard error and exit code 2.
"""

import argparse
import json
import os
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cppo.system.files import write_atomic
from cppo.system.interrupts import TRY_AGAIN, Interrupted
from cppo.system.lock import locked

if TYPE_CHECKING:
    from cppo.suite.config import BaseConfig
    from cppo.suite.suite import Suite
    from cppo.tasks.types import Problem

# Everything else is imported in the command that uses it: commands then start sooner, and `main` has told the hub's client to
# stay offline before that is imported.


def data(args: argparse.Namespace) -> None:
    """Write the problems and lm-eval tasks of a setting."""
    from cppo.evaluation.lm_eval_task import write_tasks
    from cppo.results.run_folder import RunFolder
    from cppo.system.files import read_json
    from cppo.tasks.types import write_problems

    base = _suite(args).base(args.setting)
    folder = Path(args.root) / base.data
    sets, report = base.setting.task.load(base.setting_name)
    if RunFolder(Path(args.root) / base.folder).done and (folder / "report.json").is_file():
        before = read_json(folder / "report.json")
        for name, found in report.items():
            if found.get("sha256") != before.get(name, {}).get("sha256"):
                raise ValueError(
                    f"{folder}: the file of {name} has changed since the base model was made; give the new one another name, "
                    "or delete this folder and what was trained on it"
                )
    write_atomic(folder / "report.json", json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    for name, problems in sets.items():
        write_problems(problems, folder / f"{name}.jsonl")
    write_tasks(folder / "lm_eval", base, lambda name: folder / f"{name}.jsonl")


def base(args: argparse.Namespace) -> None:
    """Make the base model of a setting."""
    from cppo.results.run_folder import RunFolder
    from cppo.training.base_model import make_base

    config = _suite(args).base(args.setting)
    problems = _training_problems(args, config)
    folder = RunFolder(Path(args.root) / config.folder)
    with locked(folder.path):
        folder.check_numerics(restart=args.restart_outdated)
        make_base(config, problems, folder.path)


def train(args: argparse.Namespace) -> None:
    """Train a run, or continue it."""
    from cppo.models.load import load_tokenizer
    from cppo.results.run_folder import RunFolder
    from cppo.training.distributed import check_trackers, main_process

    suite, root = _suite(args), Path(args.root)
    run = suite.run(args.run)
    base_folder, folder = RunFolder(root / run.base.folder), RunFolder(root / run.folder)
    start = base_folder.checkpoint(0)
    if not start.is_dir():
        raise ValueError(f"{start}: the base model is missing; `{_command('base', args, run.setting_name)}` makes it")
    base_folder.check_numerics()
    problems = run.setting.task.short_enough(load_tokenizer(start), _training_problems(args, run.base))
    with locked(folder.path) if main_process() else nullcontext():
        if main_process():
            folder.check_numerics(restart=args.restart_outdated)
        if run.setting.trainer == "verl":
            from cppo.integrations.verl_launch import train as train_with_verl

            resources = suite.resources_of(run.setting_name)
            train_with_verl(run, resources, start, problems, folder.path, suite.report_to)
        else:
            from cppo.training.run import train as train_run

            check_trackers(suite.report_to)
            train_run(run, start, problems, folder.path, suite.report_to)


def render(args: argparse.Namespace) -> None:
    """Print the command with which verl trains a run, and start nothing."""
    from cppo.integrations.verl_command import command
    from cppo.results.run_folder import RunFolder

    suite, root = _suite(args), Path(args.root)
    run = suite.run(args.run)
    if run.setting.trainer != "verl":
        raise ValueError(
            f"--run {args.run}: setting {run.setting_name} does not have trainer verl, which alone is started by a command; "
            "`cppo train` trains the run"
        )
    start = RunFolder(root / run.base.folder).checkpoint(0)
    resources = suite.resources_of(run.setting_name)
    print(shlex.join(command(run, resources, start, root / run.folder, suite.report_to)))


def evaluate(args: argparse.Namespace) -> None:
    """Score all checkpoints in a run's or a base model's directory."""
    from cppo.evaluation.evaluate import evaluate as score
    from cppo.results.run_folder import RunFolder

    folder = Path(args.folder)
    RunFolder(folder).config()  # before the lock, which makes the directory
    with locked(folder):
        score(folder)


def runs(args: argparse.Namespace) -> None:
    """List the suite's runs."""
    for run in _suite(args).runs():
        print(f"{run.id}  {run.setting_name}  {run.rule_name}  seed {run.seed}")


def collect(args: argparse.Namespace) -> None:
    """Write the suite's tables to runs/<suite>/."""
    from cppo.results.tables import collect as write
    from cppo.suite.suite import suite_name

    write(_suite(args), Path(args.root), Path(args.root) / suite_name(args.suite))


def publish(args: argparse.Namespace) -> None:
    """Check a suite's tables and copy them, with the figures drawn from them, to results/<suite>/."""
    from cppo.results.tables import publish as copy
    from cppo.suite.suite import suite_name

    name = suite_name(args.suite)
    target = Path(args.results) / name
    names = copy(Path(args.root) / name, target)
    print(f"{target}: {len(names)} files: {', '.join(names)}")
    if any(file.startswith("figures/") for file in names):
        print(f"next: `cppo verify {target}`, then commit the folder")
    else:
        print("there are no figures yet; next: `snakemake --cores all -F paper_figures` draws them")


def show(args: argparse.Namespace) -> None:
    """Print what a run's numbers come from: configuration, code, packages, seeds."""
    from cppo.results.audit import show as describe

    print(describe(args.run, Path(args.root), Path(args.results)), end="")


def verify(args: argparse.Namespace) -> None:
    """Recompute the hashes of published tables, and make the printed ones again from their rows."""
    from cppo.numerics import NUMERICS_VERSION
    from cppo.results.audit import published_numerics
    from cppo.results.audit import verify as derive
    from cppo.suite.suite import suite_name

    given = Path(args.suite)
    folder = given if given.is_dir() else Path(args.results) / suite_name(args.suite)
    for line in derive(folder):
        print(f"holds  {line}")
    version = published_numerics(folder)
    if version == str(NUMERICS_VERSION):
        print(f"{folder}: verified")
    else:
        print(
            f"{folder}: the tables follow from their rows, but WARNING: the rows are of numerics version {version}, this code "
            f"has version {NUMERICS_VERSION}: running the suite again gives other numbers"
        )


def check_suite(args: argparse.Namespace) -> None:
    """Check a suite's file."""
    from cppo.suite.suite import load_suite

    suite = load_suite(args.suite)
    print(f"{args.suite}: {len(suite.runs())} runs, {len(suite.bases())} base models")


def plan(args: argparse.Namespace) -> None:
    """Estimate what a suite costs: jobs, tokens, GPU hours, disk."""
    from cppo.suite.cost import report
    from cppo.suite.suite import load_suite, suite_name

    print(report(load_suite(args.suite), suite_name(args.suite), Path(args.results)), end="")


def objectives(args: argparse.Namespace) -> None:
    """Print every registered objective: what it is, its parameters with defaults and meaning."""
    from cppo.render_docs import listing, markdown

    print(markdown() if args.markdown else listing(), end="")


def check(args: argparse.Namespace) -> int:
    """Try an objective on the laws that all must keep; exit code 1 if it breaks one."""
    from cppo.objectives import objective
    from cppo.objectives.laws import check as try_laws

    found = try_laws(objective(args.objective, **dict(map(_key_value, args.set or ()))))
    for law, broken in found.items():
        print(f"kept    {law}" if broken is None else f"BROKEN  {law}: {broken}")
    count = sum(broken is not None for broken in found.values())
    print(f"{args.objective}: {count} of {len(found)} laws broken" if count else f"{args.objective} keeps every law")
    return int(count > 0)


def _key_value(text: str) -> tuple[str, Any]:
    """`delta=0.1` -> ("delta", 0.1): the value is JSON, or else a string."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ValueError(f"--set {text}: expected key=value, such as delta=0.1 or cap=null")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def schema(args: argparse.Namespace) -> None:
    """Print the JSON schema of a suite: every key with its type, default and meaning."""
    from cppo.suite.suite import Suite

    print(json.dumps(Suite.model_json_schema(), indent=1))


def _suite(args: argparse.Namespace) -> "Suite":
    from cppo.suite.suite import load_suite

    return load_suite(args.suite, tuple(args.add_rule or ()))


def _training_problems(args: argparse.Namespace, base: "BaseConfig") -> "tuple[Problem, ...]":
    from cppo.tasks.types import TRAIN, read_problems

    path = Path(args.root) / base.data / f"{TRAIN}.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: missing; `{_command('data', args, base.setting_name)}` makes it")
    return read_problems(path)


def _command(name: str, args: argparse.Namespace, setting_name: str) -> str:
    """The command that makes what another one misses, with that one's suite and root."""
    words = ["cppo", name, "--suite", args.suite, "--setting", setting_name]
    return shlex.join(words if args.root == ROOT else [*words, "--root", args.root])


ROOT, RESULTS = "runs", "results"
SUITE = "the suite: its name in config/, or its YAML file"


def parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    top = argparse.ArgumentParser("cppo", description="Trust-region rules in LLM reinforcement learning.")
    commands = top.add_subparsers(required=True, metavar="command")

    def add(function: Any, *arguments: str) -> argparse.ArgumentParser:
        name = function.__name__.replace("_", "-")
        command = commands.add_parser(name, help=function.__doc__.splitlines()[0], description=function.__doc__)
        command.set_defaults(function=function)
        if "--suite" in arguments:
            command.add_argument("--suite", default="mini", help=SUITE)
            command.add_argument("--add-rule", action="append", metavar="JSON", help="one more rule, as in the suite")
        if "suite" in arguments:
            command.add_argument("suite", help=SUITE)
        if "--root" in arguments:
            command.add_argument("--root", default=ROOT, help="where runs are kept")
        if "--results" in arguments:
            command.add_argument("--results", default=RESULTS, help="where published tables are kept")
        if "--restart-outdated" in arguments:
            command.add_argument(
                "--restart-outdated",
                action="store_true",
                help="move what another numerics version made aside and start anew, instead of refusing it",
            )
        return command

    add(data, "--suite", "--root").add_argument("--setting", required=True, help="name of a setting of the suite")
    command = add(base, "--suite", "--root", "--restart-outdated")
    command.add_argument("--setting", required=True, help="name of a setting of the suite")
    command = add(train, "--suite", "--root", "--restart-outdated")
    command.add_argument("--run", required=True, help="a run's id (see: runs)")
    add(render, "--suite", "--root").add_argument("--run", required=True, help="a run's id (see: runs)")
    add(evaluate).add_argument("folder", help="the directory, such as runs/train/cppo/ID")
    add(runs, "--suite")
    add(collect, "--suite", "--root")
    add(publish, "suite", "--root", "--results")
    add(show, "--root", "--results").add_argument("run", help="a run's id, such as those in results/mini/runs.csv")
    add(verify, "--results").add_argument("suite", help="the suite's name, or the folder of its published tables")
    add(check_suite, "suite")
    add(plan, "suite", "--results")
    command = add(objectives)
    command.add_argument("--markdown", action="store_true", help="as docs/objectives.md, with divergences and laws")
    command = add(check)
    command.add_argument("objective", help="a registered name, or my_module:my_objective")
    command.add_argument("--set", action="append", metavar="KEY=VALUE", help="a parameter of the objective")
    add(schema)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 = done, 1 = a check failed, 2 = a user's mistake, 75 = stopped by SIGTERM with its state saved."""
    args = parser().parse_args(argv)
    if args.function not in (data, base):  # only these two may fetch anything from the hub
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    try:
        code: int | None = args.function(args)
        sys.stdout.flush()  # here, where a closed pipe can still be told
    except ValueError as error:
        print(f"cppo: error: {error}", file=sys.stderr)
        return 2
    except Interrupted as interrupted:
        print(f"cppo: {interrupted}; the same command continues it", file=sys.stderr)
        return TRY_AGAIN
    except KeyboardInterrupt:
        print("cppo: interrupted; the same command continues from what is saved", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Who read the output (`cppo runs | head`) has seen enough. Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
