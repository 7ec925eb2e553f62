"""Trainer verl: a run that verl 0.9.1 trains on a Ray cluster, and its results in this repository's schema.

`train` writes the run's prompts as parquet, runs `command` (verl's own entry point with our objective, see `verl.py`) and
collects verl's metrics and weights, so that evaluation, tables and figures read the run like any other.
verl itself is never imported here, because it is installed in another environment ($CPPO_VERL_PYTHON).

`cppo.integrations.verl_checks` refuses what verl cannot do when the suite is loaded. Drift by position and token dumps are left
out, because verl keeps no tokens for us. So is stopping at a collapse, because verl skips a non-finite update and goes on.

Besides the usual files, a run's folder holds verl/ with train.parquet, log-N.jsonl (verl's metrics, one file per attempt,
because verl overwrites its log) and global_step_N/ (the last two states, to resume from).
"""

import json
import math
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from cppo.integrations.verl_command import VERSION, command, on_cluster, verl_python
from cppo.results.provenance import provenance
from cppo.results.run_folder import RunFolder, Status
from cppo.suite.config import RunConfig
from cppo.suite.setting import Resources
from cppo.system.files import write_atomic
from cppo.system.interrupts import Interrupted, Terminated
from cppo.tasks.types import Problem, TextTask
from cppo.training.batches import problem_order

PACKAGES = ("verl", "vllm", "ray", "torch", "transformers", "math-verify")
"""What the environment of `verl_python` must hold, besides this package."""
POLL_SECONDS = 1.0
"""Time between two looks at whether verl has ended."""
METRICS = {
    "reward": "critic/score/mean",
    "response_length": "response_length/mean",
    "loss": "actor/loss",
    "value_loss": "critic/loss",
    "grad_norm": "actor/grad_norm",
}
"""Our metrics -> verl's, where both mean the same: the mean over responses, or over the updates of an iteration."""
RATIOS = (
    "mask_share",
    "mask_share/threshold",
    "mask_share/budget",
    "mask_share/sequence",
    "gate_mean",
    "divergence",
)
"""Metrics of our policy losses in verl: actor/cppo_bench/NAME_sum over NAME_count."""
TIMINGS = {
    "rollout": "timing_s/gen",  # verl judges while it samples
    "values": "timing_s/values",
    "advantage": "timing_s/adv",
    "update": "timing_s/update_actor",
    "update_critic": "timing_s/update_critic",
    "weights": "timing_s/update_weights",
    "checkpoint": "timing_s/save_checkpoint",
    "total": "timing_s/step",
}
"""Our names of times in seconds -> verl's."""


def train(
    run: RunConfig,
    resources: Resources,
    base: Path,
    problems: tuple[Problem, ...],
    folder: Path,
    report_to: Sequence[str] = (),
) -> None:
    """Train `run` with verl, or continue it, until its DONE file is written. verl's output goes where ours does.

    base: the model's checkpoint folder. folder: the run's folder. report_to: further trackers of verl.

    Raises Interrupted after SIGTERM, which ends verl; its last saved state stays. Raises ValueError when verl is not installed,
    when it ends before the last iteration, or when the saved state was made with another version of the code or of a package.
    """
    run_folder, work = RunFolder(folder), folder / "verl"
    if run_folder.done:
        return
    versions = installed(verl_python())
    words = on_cluster(command(run, resources, base, folder, report_to, len(_logs(folder))), resources)
    begun = (work / "latest_checkpointed_iteration.txt").exists()
    run_folder.begin(run, provenance() | versions, begun)
    work.mkdir(exist_ok=True)
    write_prompts(run, problems, work / "train.parquet")
    _watch(words, folder)
    collect(run, run_folder)


def _watch(words: list[str], folder: Path) -> None:
    """Run the command to its end. SIGTERM is passed on to it."""
    # `ray symmetric-run` calls ray by its name, hence PATH. Without a token anyone in the network could run code on its nodes.
    changes = {"PATH": f"{Path(verl_python()).parent}:{os.environ.get('PATH', '')}"}
    if words[0] == "srun":
        changes |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with Terminated() as terminated, subprocess.Popen(words, env={**os.environ, **changes}) as process:
        while process.poll() is None:
            if terminated:
                process.terminate()
            time.sleep(POLL_SECONDS)
    if process.returncode and terminated:
        raise Interrupted(f"{folder}: stopped by SIGTERM; it will continue from the last state that verl saved")
    if process.returncode:
        raise ValueError(
            f"{folder}: verl ended with exit code {process.returncode}, see its output; the same command continues the run"
        )


def installed(python: str) -> dict[str, str]:
    """verl/NAME -> version, for verl and the packages that it needs in the environment of this Python.

    Raises ValueError, one line with the remedy, when something is missing or verl has another version.
    """
    probe = (
        "import importlib.metadata as m, json, sys, cppo; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    )
    remedy = (
        f"trainer verl needs verl {VERSION}, vllm, math-verify and this package in one environment; "
        "name its Python in CPPO_VERL_PYTHON (docs/cluster.md)"
    )
    try:
        done = subprocess.run([python, "-c", probe, *PACKAGES], capture_output=True, text=True)
    except OSError as error:
        raise ValueError(f"{python}: {error.strerror}; {remedy}") from None
    if done.returncode:
        raise ValueError(f"{python}: {done.stderr.strip().splitlines()[-1]}; {remedy}")
    versions: dict[str, str] = json.loads(done.stdout)
    if versions["verl"] != VERSION:
        raise ValueError(f"{python}: has verl {versions['verl']}; {remedy}")
    return {f"verl/{name}": version for name, version in versions.items()}


def write_prompts(run: RunConfig, problems: tuple[Problem, ...], path: Path) -> None:
    """Write every prompt of the run in order, in verl's schema. Problems and order are those of the built-in trainer."""
    task, prompts = run.setting.task, run.setting.rollout.prompts
    assert isinstance(task, TextTask)
    rows: list[dict[str, Any]] = []
    for iteration in range(run.setting.iterations):
        for i in problem_order(len(problems), prompts, iteration, run.setting_name, run.seed):
            problem = problems[i]
            rows.append(
                {
                    "data_source": problem.source,
                    "prompt": [{"role": "user", "content": task.wording(problem.question)}],
                    "reward_model": {"style": "rule", "ground_truth": problem.answer},
                    "extra_info": {"index": len(rows), "id": problem.id},
                }
            )
    pd.DataFrame(rows).to_parquet(path)


def collect(run: RunConfig, folder: RunFolder) -> None:
    """Turn verl's metrics and weights into the streams, checkpoints and DONE of the run's folder.

    Raises ValueError when iterations are missing.
    """
    keep_weights(folder.path)
    logged: dict[int, dict[str, Any]] = {}
    for log in _logs(folder.path):  # a later attempt repeats what was not saved
        whole_lines = log.read_text().rpartition("\n")[0]  # a killed attempt may end in half a line
        logged |= {row["step"]: row["data"] for row in map(json.loads, whole_lines.splitlines())}
    total = run.setting.iterations
    missing = sorted(set(range(1, total + 1)) - set(logged))
    if missing:
        raise ValueError(f"{folder.path}: verl logged no iteration {missing[0]} of {total}; run it again to continue")
    rows = [logged[iteration] for iteration in range(1, total + 1)]
    streams: dict[str, list[dict[str, Any]]] = {
        "metrics": [{"iteration": i, **metrics(run, row)} for i, row in enumerate(rows, 1)],
        "timings": [{"iteration": i, **timings(run, row)} for i, row in enumerate(rows, 1)],
        "positions": [],
        "tokens": [],
    }
    for name, lines in streams.items():
        write_atomic(folder.stream(name), "".join(json.dumps(line) + "\n" for line in lines))
    folder.finish(Status(total, collapse(run, [row["actor/grad_norm"] for row in rows])))


def metrics(run: RunConfig, row: Mapping[str, Any]) -> dict[str, float | None]:
    """One iteration's metrics under our names. Those that verl does not measure in the same way are left out."""
    measured = {name: row[verl_name] for name, verl_name in METRICS.items() if verl_name in row}
    for name in RATIOS:
        key = f"actor/cppo_bench/{name}"
        if f"{key}_count" in row:
            count = row[f"{key}_count"]
            measured[name] = row[f"{key}_sum"] / count if count else None
    rollout = run.setting.rollout
    if not rollout.overlong_buffer:  # verl logs the shaped reward only
        measured["accuracy"] = measured["reward"]
    # verl's clip_ratio is the share of responses that are as long as the batch's longest, whatever its length.
    at_limit = row["response_length/max"] >= rollout.max_response_tokens
    measured["truncated"] = row["response_length/clip_ratio"] if at_limit else 0.0
    return dict(sorted(measured.items()))


def timings(run: RunConfig, row: Mapping[str, Any]) -> dict[str, float]:
    """One iteration's response tokens, seconds by phase, and tokens per second of the two phases that handle every token."""
    rollout = run.setting.rollout
    tokens = round(row["response_length/mean"] * rollout.prompts * rollout.responses)
    seconds = {name: row[verl_name] for name, verl_name in TIMINGS.items() if verl_name in row}
    rates = {f"{phase}_tokens_per_second": tokens / seconds[phase] for phase in ("rollout", "update")}
    return {"tokens": tokens, **seconds, **rates}


def collapse(run: RunConfig, norms: Sequence[float | None]) -> int | None:
    """The iteration at which `collapse_after` updates in a row had no finite gradient; None = never.

    norms: each iteration's mean gradient norm over its updates. None (how verl writes NaN) counts for all of its updates.
    """
    iterations_needed, in_a_row = math.ceil(run.setting.collapse_after / run.setting.rollout.updates), 0
    for iteration, norm in enumerate(norms, 1):
        in_a_row = 0 if norm is not None and math.isfinite(norm) else in_a_row + 1
        if in_a_row == iterations_needed:
            return iteration
    return None


def keep_weights(folder: Path) -> None:
    """Give verl's Hugging Face weights a second name among the run's checkpoints: verl deletes all but its last two states."""
    run_folder = RunFolder(folder)
    for state in (folder / "verl").glob("global_step_*"):
        # verl's layouts for FSDP and for Megatron differ.
        places = [state / "actor" / "huggingface", state / "actor" / "model" / "huggingface"]
        weights = next((place for place in places if any(place.glob("*.safetensors"))), None)
        iteration = int(state.name.removeprefix("global_step_"))
        if weights is not None and not run_folder.checkpoint(iteration).exists():
            with run_folder.new_checkpoint(iteration) as partial:
                shutil.copytree(weights, partial, copy_function=os.link, dirs_exist_ok=True)


def _logs(folder: Path) -> list[Path]:
    return sorted((folder / "verl").glob("log-*.jsonl"), key=lambda path: int(path.stem.removeprefix("log-")))
