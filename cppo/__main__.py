"""The command line: what every workflow rule calls, usable without Snakemake.

    python -m cppo data      --suite config/mini.yaml --setting base     problems and lm-eval tasks
    python -m cppo base      --suite config/mini.yaml --setting base     the warm start, or a published checkpoint
    python -m cppo runs      --suite config/mini.yaml                    run ids
    python -m cppo train     --suite config/mini.yaml --run ID           a run, or the rest of it
    python -m cppo render    --suite config/paper.yaml --run ID          the verl command of a run
    python -m cppo evaluate  runs/train/cppo/ID                          scores of a run's or a base model's checkpoints
    python -m cppo collect   --suite config/mini.yaml                    tables in runs/mini/
    python -m cppo publish   mini                                        check them and copy to results/mini/
    python -m cppo show      ID                                          what a run's numbers come from
    python -m cppo verify    results/mini                                do the tables follow from their rows?
    python -m cppo check-suite config/mini.yaml                          is it valid?
    python -m cppo plan      config/paper.yaml                           what does it cost?
    python -m cppo objectives                                            every objective with its settings
    python -m cppo check     my_module:my_objective                      does it keep the laws of every objective?
    python -m cppo settings                                              every key of a suite

A user's mistake is one line on standard error and exit code 2.
"""

import argparse
import json
import os
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from cppo.suite.config import MathTask, RunConfig, read_config
from cppo.suite.suite import Suite, find_base, find_run, load_suite
from cppo.system.files import write_whole
from cppo.system.interrupts import TRY_AGAIN, Interrupted
from cppo.system.lock import locked

# Modules that need torch or lm-eval are imported in the command that uses them: most commands then start in a moment.


def data(args: argparse.Namespace) -> None:
    """Write the problems and lm-eval tasks of a setting."""
    from cppo.evaluation.lm_eval_task import write_task
    from cppo.tasks.chain import make_problems
    from cppo.tasks.prompts import wording
    from cppo.tasks.published import load_problems
    from cppo.tasks.types import write_problems

    base = find_base(_suite(args), args.setting)
    folder, task, how = Path(args.root) / base.data, base.plan.task, base.evaluation
    if isinstance(task, MathTask):
        sets, report = load_problems(task)
        write_whole(folder / "report.json", json.dumps(report, indent=1) + "\n")
        print(json.dumps(report, indent=1))
    else:
        sets = make_problems(task, base.setting)
    for name, problems in sets.items():
        write_problems(problems, folder / f"{name}.jsonl")
    for benchmark in task.benchmarks:
        write_task(
            folder / "lm_eval",
            benchmark.name,
            folder / f"{benchmark.name}.jsonl",
            wording(task, "{{question}}"),
            how.samples,
            how.temperature,
            how.top_p,
            base.plan.rollout.max_response_tokens,
        )


def base(args: argparse.Namespace) -> None:
    """Make the base model of a setting."""
    from cppo.tasks.types import read_problems
    from cppo.training.base_model import published, warm_start

    config = find_base(_suite(args), args.setting)
    problems = read_problems(Path(args.root) / config.data / "train.jsonl")
    folder = Path(args.root) / config.folder
    make = warm_start if config.plan.warm_start else published
    with locked(folder):
        make(config, problems, folder)


def train(args: argparse.Namespace) -> None:
    """Train a run, or continue it."""
    from cppo.models.load import load_tokenizer
    from cppo.tasks.prompts import short_enough
    from cppo.tasks.types import read_problems
    from cppo.training.distributed import check_trackers, main_process

    suite, root = _suite(args), Path(args.root)
    run = find_run(suite, args.run)
    start = root / run.base.folder / "checkpoints" / "step-0"
    if not start.is_dir():
        raise ValueError(f"{start}: the base model is missing; `python -m cppo base --setting {run.setting}` makes it")
    problems, folder = read_problems(root / run.base.data / "train.jsonl"), root / run.folder
    problems = short_enough(run.plan.task, load_tokenizer(start), problems)
    with locked(folder) if main_process() else nullcontext():
        if run.plan.engine == "verl":
            from cppo.integrations.verl_launch import train as train_with_verl

            resources = suite.asked(run.setting)
            train_with_verl(run, resources, start, problems, folder, suite.report_to)
        else:
            from cppo.training.train import train as train_run

            check_trackers(suite.report_to)
            train_run(run, start, problems, folder, suite.report_to)


def render(args: argparse.Namespace) -> None:
    """Print the command with which verl trains a run, and start nothing."""
    from cppo.integrations.verl_command import command

    suite, root = _suite(args), Path(args.root)
    run = find_run(suite, args.run)
    if run.plan.engine != "verl":
        raise ValueError(
            f"--run {args.run}: setting {run.setting} has not engine verl; `python -m cppo train` trains it"
        )
    start = root / run.base.folder / "checkpoints" / "step-0"
    resources = suite.asked(run.setting)
    print(shlex.join(command(run, resources, start, root / run.folder, suite.report_to)))


def evaluate(args: argparse.Namespace) -> None:
    """Score all checkpoints in a run's or a base model's directory."""
    from cppo.evaluation.evaluate import evaluate as score

    folder = Path(args.folder)
    config = read_config(folder)
    data = config.base.data if isinstance(config, RunConfig) else config.data
    with locked(folder):
        score(config, folder, folder.resolve().parents[2] / data)


def runs(args: argparse.Namespace) -> None:
    """List the suite's runs."""
    for run in _suite(args).runs():
        print(f"{run.id}  {run.setting}  {run.label}  seed {run.seed}")


def collect(args: argparse.Namespace) -> None:
    """Write the suite's tables to runs/<suite>/."""
    from cppo.results.tables import collect as write

    write(_suite(args), Path(args.root), Path(args.root) / Path(args.suite).stem)


def publish(args: argparse.Namespace) -> None:
    """Check a suite's tables and copy them to results/<suite>/."""
    from cppo.results.tables import publish as copy

    copy(Path(args.root) / args.name, Path(args.results) / args.name)


def show(args: argparse.Namespace) -> None:
    """Print what a run's numbers come from: configuration, code, packages, seeds."""
    from cppo.results.audit import show as describe

    print(describe(args.run, Path(args.root), Path(args.results)), end="")


def verify(args: argparse.Namespace) -> None:
    """Recompute the hashes of published tables, and make the printed ones again from their rows."""
    from cppo.results.audit import verify as derive

    for line in derive(Path(args.folder)):
        print(f"holds  {line}")
    print(f"{args.folder}: verified")


def check_suite(args: argparse.Namespace) -> None:
    """Check a suite's file."""
    suite = _suite(args)
    print(f"{args.suite}: {len(suite.runs())} runs, {len(suite.bases())} base models")


def plan(args: argparse.Namespace) -> None:
    """Estimate what a suite costs: jobs, tokens, GPU hours, disk."""
    from cppo.suite.cost import report

    print(report(_suite(args), Path(args.suite).stem, Path(args.results)), end="")


def objectives(args: argparse.Namespace) -> None:
    """Print every registered objective: what it is, its settings with defaults and meaning."""
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


def settings(args: argparse.Namespace) -> None:
    """Print the JSON schema of a suite: every key with its type, default and meaning."""
    print(json.dumps(Suite.model_json_schema(), indent=1))


def _suite(args: argparse.Namespace) -> Suite:
    return load_suite(args.suite, tuple(getattr(args, "baseline", None) or ()))


def parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    top = argparse.ArgumentParser("python -m cppo", description="Trust-region rules in LLM reinforcement learning.")
    commands = top.add_subparsers(required=True, metavar="command")

    def add(function: Any, *arguments: str) -> argparse.ArgumentParser:
        name = function.__name__.replace("_", "-")
        command = commands.add_parser(name, help=function.__doc__.splitlines()[0], description=function.__doc__)
        command.set_defaults(function=function)
        if "suite" in arguments:
            command.add_argument("--suite", default="config/mini.yaml", help="the suite's YAML file")
            command.add_argument("--baseline", action="append", help="one more objective entry, as JSON")
            command.add_argument("--root", default="runs", help="where runs are kept")
        return command

    for function in (data, base):
        add(function, "suite").add_argument("--setting", required=True, help="name of a setting of the suite")
    for function in (train, render):
        add(function, "suite").add_argument("--run", required=True, help="a run's id (see: runs)")
    add(evaluate).add_argument("folder", help="the directory, such as runs/train/cppo/ID")
    for function in (runs, collect):
        add(function, "suite")
    command = add(publish)
    command.add_argument("name", help="name of the suite")
    command.add_argument("--root", default="runs", help="where runs are kept")
    command.add_argument("--results", default="results", help="where published tables are kept")
    command = add(show)
    command.add_argument("run", help="a run's id, such as those in results/mini/runs.csv")
    command.add_argument("--root", default="runs", help="where runs are kept")
    command.add_argument("--results", default="results", help="where published tables are kept")
    add(verify).add_argument("folder", help="the published tables, such as results/mini")
    add(check_suite).add_argument("suite", help="the suite's YAML file")
    command = add(plan)
    command.add_argument("suite", help="the suite's YAML file")
    command.add_argument("--results", default="results", help="where published tables are kept")
    command = add(objectives)
    command.add_argument("--markdown", action="store_true", help="as docs/objectives.md, with divergences and laws")
    command = add(check)
    command.add_argument("objective", help="a registered name, or my_module:my_objective")
    command.add_argument("--set", action="append", metavar="KEY=VALUE", help="a setting of the objective")
    add(settings)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 = done, 1 = a check failed, 2 = a user's mistake, 75 = stopped by SIGTERM with its state saved."""
    args = parser().parse_args(argv)
    if args.function not in (data, base):  # only these two may fetch anything from the hub
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    try:
        code: int | None = args.function(args)
    except ValueError as error:
        print(f"cppo: error: {error}", file=sys.stderr)
        return 2
    except Interrupted as interrupted:
        print(f"cppo: {interrupted}; the same command continues it", file=sys.stderr)
        return TRY_AGAIN
    except KeyboardInterrupt:
        print("cppo: interrupted; the same command continues from what is saved", file=sys.stderr)
        return 130
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
