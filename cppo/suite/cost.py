"""What a suite costs: jobs, tokens, GPU hours and disk space, estimated from its configuration before it is run.

The estimate states its assumptions. It is good for asking a cluster for time; it is not a measurement.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from cppo.suite.config import Model, RunConfig, Setting
from cppo.suite.suite import Suite

PEAK_FLOPS = 989e12
"""Floating-point operations per second of one GPU: H100 SXM with dense bfloat16, from its data sheet."""
TRAINING_MFU = 0.35
"""Share of the peak that forward and backward passes reach (model FLOPs utilisation); 0.3 to 0.4 is usual for dense models
of these sizes."""
SAMPLING_MFU = 0.05
"""Share of the peak that sampling reaches, because it waits for memory: about 15 thousand tokens per second with 1.7 billion
parameters."""
BYTES_PER_PARAMETER = 4
"""Bytes per stored weight or moment; all are float32."""


@dataclass(frozen=True)
class Cost:
    """What one run in a setting costs."""

    parameters: float
    """Parameters of the model."""
    active: float
    """Parameters that each token uses."""
    response_tokens: int
    """Length of a response that is counted with."""
    bound: bool
    """Whether `response_tokens` is the longest response, because no expected length is given."""
    rollout_tokens: float
    """Tokens that are sampled in rollouts, and trained on once."""
    evaluation_tokens: float
    """Tokens that are sampled to score all checkpoints."""
    train_hours: float
    """GPU hours of rollouts and updates."""
    evaluate_hours: float
    """GPU hours of scoring the checkpoints."""
    disk_peak: float
    """Bytes on disk of a run that is trained and not yet scored."""
    disk_kept: float
    """Bytes on disk of a scored run."""


def cost(suite: Suite, name: str) -> Cost | None:
    """The cost of a run in the setting called `name`; None when `resources.parameters` of a published model is not given."""
    setting, resources = suite.settings[name], suite.resources_of(name)
    total: float
    active: float
    if isinstance(setting.model, Model):
        assert setting.vocabulary is not None
        total, active = setting.model.parameters(len(setting.vocabulary))
    elif resources.parameters is None:
        return None
    else:
        total = 1e9 * resources.parameters
        active = 1e9 * (resources.active_parameters or resources.parameters)
    rollout, checkpoints = setting.rollout, setting.iterations // setting.checkpoint_every
    length = resources.response_tokens or rollout.max_response_tokens
    tokens = float(setting.iterations * rollout.prompts * rollout.responses * length)
    scored = float(checkpoints * sum(b.problems for b in setting.task.benchmarks) * suite.evaluation.samples * length)
    return Cost(
        parameters=total,
        active=active,
        response_tokens=length,
        bound=resources.response_tokens is None,
        rollout_tokens=tokens,
        evaluation_tokens=scored,
        train_hours=(_passes(setting) * active * tokens / TRAINING_MFU + 2 * active * tokens / SAMPLING_MFU)
        / PEAK_FLOPS
        / 3600,
        evaluate_hours=2 * active * scored / SAMPLING_MFU / PEAK_FLOPS / 3600,
        disk_peak=BYTES_PER_PARAMETER * total * (checkpoints + 6),
        disk_kept=BYTES_PER_PARAMETER * total * (2 + 6),
    )


def _passes(setting: Setting) -> int:
    """Operations per parameter and token of an update: 2 forward, 4 backward, 2 more where activations are recomputed."""
    return 8 if setting.scale is not None and setting.scale.gradient_checkpointing else 6


def report(suite: Suite, name: str, results: Path) -> str:
    """The estimate for the suite called `name`, as text, with measured times where the folder `results` holds them."""
    runs, lines = suite.runs(), [f"{name}: {suite.description}", ""]
    settings, total = len(suite.settings), len(runs)
    jobs = 3 * settings + 2 * total + 1
    lines += [
        f"{settings} settings x {len(suite.rules)} rules x {len(suite.seeds)} seeds = {total} runs",
        f"{jobs} jobs: per setting data, base model and scores; per run training and scores; one for tables; and figures",
        "",
    ]
    gpu_hours, disk_peak, disk_kept, unknown = 0.0, 0.0, 0.0, []
    for setting in suite.settings:
        count = sum(run.setting_name == setting for run in runs)
        lines += _setting(suite, setting, count)
        estimate = cost(suite, setting)
        if estimate is None:
            unknown.append(setting)
            continue
        gpu_hours += count * (estimate.train_hours + estimate.evaluate_hours)
        disk_peak, disk_kept = disk_peak + count * estimate.disk_peak, disk_kept + count * estimate.disk_kept
    on_gpus = any(suite.resources_of(setting).gpus for setting in suite.settings)
    lines.append(f"disk: {_bytes(disk_kept)} kept, {_bytes(disk_peak)} if every run is trained before any is scored")
    if on_gpus:
        lines += [f"GPU hours in all: {gpu_hours:,.0f}", "", *ASSUMPTIONS]
    else:
        lines.append("GPU hours: none, its jobs ask for no GPU")
    if unknown:
        lines.append(f"not counted, for want of resources.<setting>.parameters: {', '.join(unknown)}")
    lines += _measured(results / name / "runs.csv", runs)
    return "\n".join(lines) + "\n"


ASSUMPTIONS = (
    "GPU hours = tokens x n x (operations / share) / peak, where n is the number of parameters that a token uses:",
    f"  update    6 operations (8 with gradient checkpointing) at {TRAINING_MFU:.0%} of the peak",
    f"  sampling  2 operations at {SAMPLING_MFU:.0%} of the peak; of rollouts and of evaluation",
    f"  peak      {PEAK_FLOPS / 1e12:.0f} teraflops per GPU (H100 SXM, dense bfloat16)",
    "Not in it: attention's own operations, prompts, waiting for the slowest response, start-up, transfers of weights.",
)


def _setting(suite: Suite, name: str, count: int) -> list[str]:
    setting, resources = suite.settings[name], suite.resources_of(name)
    estimate = cost(suite, name)
    lines = [f"{name} ({setting.title}): {count} runs of {setting.iterations} iterations"]
    if estimate is None:
        return [*lines, "  resources.parameters is not given: no estimate", ""]
    kind = "longest, so an upper bound" if estimate.bound else "expected mean"
    share = "" if estimate.active == estimate.parameters else f", {_count(estimate.active)} per token"
    lines += [
        f"  model     {_count(estimate.parameters)} parameters{share}; responses of {estimate.response_tokens} tokens ({kind})",
        f"  tokens    {_count(estimate.rollout_tokens)} sampled and trained on per run, "
        f"{_count(estimate.evaluation_tokens)} sampled for its scores",
    ]
    if resources.gpus:
        gpus = resources.gpus * resources.nodes
        lines += [
            f"  time      {estimate.train_hours:,.1f} GPU hours of training per run, {estimate.train_hours / gpus:,.1f} h on "
            f"{resources.nodes} x {resources.gpus} GPUs; {estimate.evaluate_hours:,.1f} of scores",
            f"  in all    {count * (estimate.train_hours + estimate.evaluate_hours):,.0f} GPU hours",
        ]
    lines += [
        f"  disk      {_bytes(estimate.disk_kept)} kept per run (best and last weights, two training states with AdamW's "
        f"moments), {_bytes(estimate.disk_peak)} until it is scored",
        "",
    ]
    return lines


def _measured(path: Path, runs: tuple[RunConfig, ...]) -> list[str]:
    """How long the published runs of this suite took."""
    if not path.is_file():
        return []
    table = pd.read_csv(path, dtype={"run": str})
    seconds = table[table["run"].isin([run.id for run in runs])]["seconds"]
    return [
        f"measured: {len(seconds)} published runs trained {seconds.min():.0f} to {seconds.max():.0f} s each, "
        f"{seconds.sum() / 3600:.1f} h in all ({path})"
    ]


def _count(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.0f}"


def _bytes(value: float) -> str:
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value / 1e3:.3g} kB"
