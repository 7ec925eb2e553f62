"""What a suite costs before it is run: jobs, tokens, GPU hours and disk, from its configuration alone.

An estimate with stated assumptions, good for asking a cluster for time, not a measurement. Legend: N parameters, n those that
a token uses, T mean response tokens.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from cppo.suite.config import RunConfig
from cppo.suite.setting import Model, Setting
from cppo.suite.suite import Suite

PEAK_FLOPS = 989e12
"""Floating-point operations a second of one GPU: H100 SXM, dense bfloat16 (data sheet)."""
TRAINING_MFU = 0.35
"""Share of the peak that forward and backward passes reach; 0.3 to 0.4 is usual for dense models of this size."""
SAMPLING_MFU = 0.05
"""Share of the peak that sampling reaches: it waits for memory, about 15 thousand tokens a second at 1.7 billion parameters."""
BYTES_PER_PARAMETER = 4
"""Bytes of a stored weight or moment: all are float32."""


@dataclass(frozen=True)
class Cost:
    """One setting of a suite; amounts are of one run unless said otherwise."""

    parameters: float
    active: float
    response_tokens: int
    bound: bool
    """Whether `response_tokens` is the longest response, for want of an expected length."""
    rollout_tokens: float
    """GradedRollouts, and trained on once."""
    evaluation_tokens: float
    """GradedRollouts for all checkpoints of a run."""
    train_hours: float
    """GPU hours of rollouts and updates."""
    evaluate_hours: float
    """GPU hours of the checkpoints' scores."""
    disk_peak: float
    """Bytes of a run that is trained and not yet scored."""
    disk_kept: float
    """Bytes of a scored run."""


def cost(suite: Suite, name: str) -> Cost | None:
    """The cost of a run in this setting; None when a published model's `resources.parameters` is not given."""
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
    """Operations a parameter and token in an update: 2 forward, 4 backward, and 2 more where activations are recomputed."""
    return 8 if setting.scale is not None and setting.scale.gradient_checkpointing else 6


def report(suite: Suite, name: str, results: Path) -> str:
    """The plan of the suite called `name`, as text; with the measured seconds where `results` holds them."""
    runs, lines = suite.runs(), [f"{name}: {suite.description}", ""]
    settings, total = len(suite.settings), len(runs)
    jobs = 3 * settings + 2 * total + 1
    lines += [
        f"{settings} settings x {len(suite.rules)} rules x {len(suite.seeds)} seeds = {total} runs",
        f"{jobs} jobs: data, base model and its scores a setting, training and scores a run, one for the tables; and figures",
        "",
    ]
    gpu_hours, disk_peak, disk_kept, unknown = 0.0, 0.0, 0.0, []
    for setting in suite.settings:
        count = sum(run.setting_name == setting for run in runs)
        lines += _setting(suite, setting, count)
        found = cost(suite, setting)
        if found is None:
            unknown.append(setting)
            continue
        gpu_hours += count * (found.train_hours + found.evaluate_hours)
        disk_peak, disk_kept = disk_peak + count * found.disk_peak, disk_kept + count * found.disk_kept
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
    "GPU hours = tokens x n x (operations / share) / peak, n parameters that a token uses:",
    f"  update    6 operations (8 with gradient checkpointing) at {TRAINING_MFU:.0%} of the peak",
    f"  sampling  2 operations at {SAMPLING_MFU:.0%} of the peak; of rollouts and of evaluation",
    f"  peak      {PEAK_FLOPS / 1e12:.0f} teraflops a GPU (H100 SXM, dense bfloat16)",
    "Not in it: attention's own operations, prompts, waiting for the slowest response, start-up, transfers of weights.",
)


def _setting(suite: Suite, name: str, count: int) -> list[str]:
    setting, resources = suite.settings[name], suite.resources_of(name)
    found = cost(suite, name)
    lines = [f"{name} ({setting.title}): {count} runs of {setting.iterations} iterations"]
    if found is None:
        return [*lines, "  resources.parameters is not given: no estimate", ""]
    kind = "longest, so an upper bound" if found.bound else "expected mean"
    share = "" if found.active == found.parameters else f", {_count(found.active)} a token"
    lines += [
        f"  model     {_count(found.parameters)} parameters{share}; responses of {found.response_tokens} tokens ({kind})",
        f"  tokens    {_count(found.rollout_tokens)} sampled and trained on a run, "
        f"{_count(found.evaluation_tokens)} sampled for its scores",
    ]
    if resources.gpus:
        gpus = resources.gpus * resources.nodes
        lines += [
            f"  time      {found.train_hours:,.1f} GPU hours of training a run, {found.train_hours / gpus:,.1f} h on "
            f"{resources.nodes} x {resources.gpus} GPUs; {found.evaluate_hours:,.1f} of scores",
            f"  in all    {count * (found.train_hours + found.evaluate_hours):,.0f} GPU hours",
        ]
    lines += [
        f"  disk      {_bytes(found.disk_kept)} kept a run (best and last weights, two training states with AdamW's "
        f"moments), {_bytes(found.disk_peak)} until it is scored",
        "",
    ]
    return lines


def _measured(path: Path, runs: tuple[RunConfig, ...]) -> list[str]:
    """What the published runs of this suite took."""
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
