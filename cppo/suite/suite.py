"""Suites and runs: frozen, fully checked configuration.

A suite (`config/<name>.yaml`) names settings (model, task, rollout plan, optimiser), objectives, seeds and the
evaluation. `load_suite` checks all of it before anything is computed and turns it into runs, one for each
setting x objective x seed. A run's id is the hash of its fully resolved configuration without the suite's name, so equal
runs of two suites are one run.

Every error is a ValueError of one line: file, key, what is wrong.
"""

import json
import math
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field, TypeAdapter, model_validator

from cppo.suite.config import (
    BaseConfig,
    Divergence,
    Evaluation,
    ObjectiveEntry,
    Pretrained,
    Resources,
    RunConfig,
    Setting,
)
from cppo.suite.presets import expand
from cppo.suite.schema import Config, Name, Seed, one_line, parse, unique
from cppo.suite.yaml_file import read_yaml


class Suite(Config):
    """A whole comparison: settings x objectives x seeds."""

    description: str
    """What the suite is for."""
    seeds: tuple[Seed, ...] = Field(min_length=1)
    """Each objective runs once with each."""
    settings: dict[Name, Setting] = Field(min_length=1)
    """The tables' columns."""
    evaluation: Evaluation
    """The same for all."""
    objectives: tuple[ObjectiveEntry, ...] = Field(min_length=1)
    """The tables' rows."""
    resources: dict[Name, Resources] = {}
    """What the jobs of a setting ask a cluster for, by the setting's name; for others one core."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers that get every iteration's metrics too."""

    @model_validator(mode="after")
    def _distinct(self) -> "Suite":
        unique([o.name for o in self.objectives], "objectives: name")
        unique(self.seeds, "seeds")
        for name in self.resources:
            if name not in self.settings:
                raise ValueError(f"resources.{name}: no such setting in this suite")
        for entry in self.objectives:
            if entry.name == "base":
                raise ValueError("objectives: the name 'base' is taken by the tables' base row")
            for name in entry.by_setting:
                if name not in self.settings:
                    raise ValueError(f"objectives.{entry.name}.by_setting.{name}: no such setting in this suite")
        return self

    def runs(self) -> tuple[RunConfig, ...]:
        """All runs, settings first, then objectives, then seeds."""
        return tuple(self.by_id.values())

    @cached_property
    def by_id(self) -> dict[str, RunConfig]:
        """All runs by id; made once, since the workflow asks for every run several times."""
        runs = (
            RunConfig(
                label=entry.name,
                setting=name,
                seed=seed,
                plan=plan,
                objective=_spelled_out(entry, name, plan),
                evaluation=self.evaluation,
            )
            for name, plan in self.settings.items()
            for entry in self.objectives
            for seed in self.seeds
        )
        return {run.id: run for run in runs}

    def asked(self, setting: str) -> Resources:
        """What the jobs of a setting ask a cluster for."""
        return self.resources.get(setting, Resources())

    def bases(self) -> tuple[BaseConfig, ...]:
        """The base models, one a setting."""
        return tuple(
            BaseConfig(setting=name, plan=plan, evaluation=self.evaluation) for name, plan in self.settings.items()
        )


def load_suite(path: str | Path, baselines: tuple[str, ...] = ()) -> Suite:
    """The checked suite in the YAML file at `path`, with `baselines` (JSON objective entries) appended to its objectives.

    Raises ValueError, one line with file and key, for anything that could not run.
    """
    path = Path(path)
    raw = read_yaml(path)
    if baselines and isinstance(raw, dict) and isinstance(raw.get("objectives"), list):
        raw = {**raw, "objectives": [*raw["objectives"], *(_baseline(b) for b in baselines)]}
    if isinstance(raw, dict) and isinstance(raw.get("objectives"), list):
        try:
            raw = {**raw, "objectives": [expand(entry) for entry in raw["objectives"]]}
        except ValueError as error:
            raise ValueError(f"{path}: objectives.{error}") from None
    suite: Suite = parse(Suite, raw, str(path))
    _check_engines(suite, path)
    for entry in suite.objectives:
        for name, plan in suite.settings.items():
            try:
                _check_objective(_spelled_out(entry, name, plan), plan)
            except ValueError as error:
                raise ValueError(f"{path}: objectives.{entry.name}.{error}") from None
    return suite


def find_run(suite: Suite, run_id: str) -> RunConfig:
    """The suite's run with this id. Raises ValueError when there is none."""
    if run_id in suite.by_id:
        return suite.by_id[run_id]
    raise ValueError(f"--run {run_id}: no such run in the suite; `python -m cppo runs` lists them")


def find_base(suite: Suite, setting: str) -> BaseConfig:
    """The base model of this setting. Raises ValueError when there is none."""
    for base in suite.bases():
        if base.setting == setting:
            return base
    raise ValueError(f"--setting {setting}: not in the suite; it has {', '.join(suite.settings)}")


def _baseline(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"--baseline {text!r:.80}: not JSON") from None


def _spelled_out(entry: ObjectiveEntry, setting: str, plan: Setting) -> ObjectiveEntry:
    """The entry for one setting, every objective setting explicit, so that a changed default changes the run's id."""
    # Imported late: this module must load without torch, which the objectives need.
    import dataclasses
    import typing

    from cppo.objectives import settings_of, spec

    try:
        kind = spec(entry.objective).settings
    except ValueError as error:
        raise ValueError(f"objective: {error}") from None
    here, divergence = dict(entry.by_setting.get(setting, {})), entry.divergence
    if "divergence" in here:
        divergence = parse(Divergence, here.pop("divergence"), f"by_setting.{setting}.divergence")
    values = {**entry.settings, **here}
    if values.get("span") == "max_response_tokens":
        values["span"] = plan.rollout.max_response_tokens
    known = {field.name: field for field in dataclasses.fields(kind)}
    try:
        for key, value in values.items():
            if key not in known:
                owner = f"objective {entry.objective}"
                raise ValueError(f"{key}: unknown setting of {owner}; known: {', '.join(known) or 'none'}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{key}: {value} is not a finite number")
            if key == "span" and isinstance(value, int) and value < plan.rollout.max_response_tokens:
                raise ValueError(f"span: {value} is shorter than rollout.max_response_tokens of setting {setting}")
        for key, field in known.items():
            if key not in values and field.default is field.default_factory is dataclasses.MISSING:
                raise ValueError(f"{key}: objective {entry.objective} has no default for it")
        checked = settings_of(entry.objective, **values)
    except ValueError as error:
        key = str(error).split(":")[0]
        where = f"by_setting.{setting}" if key in here else "settings"
        raise ValueError(f"{where}{'.' if key in {**values, **known} else ': '}{one_line(str(error))}") from None
    # 20 where a float is meant becomes 20.0: equal settings have one id.
    hints = typing.get_type_hints(kind)
    exact = {key: TypeAdapter(hints[key]).validate_python(value, strict=True) for key, value in values.items()}
    resolved = dataclasses.asdict(dataclasses.replace(checked, **exact))
    return entry.model_copy(update={"settings": resolved, "divergence": divergence, "by_setting": {}})


def _check_engines(suite: Suite, path: Path) -> None:
    """ValueError for a setting that its engine cannot train."""
    for name, plan in suite.settings.items():
        if plan.engine == "verl":
            from cppo.integrations.verl_checks import check_plan

            try:
                check_plan(name, plan, suite.asked(name))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        elif plan.scale is not None and plan.scale.sharding == "megatron":
            raise ValueError(f"{path}: settings.{name}.scale.sharding: megatron is only for engine verl")


def _check_objective(entry: ObjectiveEntry, plan: Setting) -> None:
    """ValueError for a combination that cannot run."""
    from cppo.objectives import spec
    from cppo.tasks.chain import VOCABULARY

    if spec(entry.objective).divergence != (entry.divergence is not None):
        need = "needs one" if entry.divergence is None else "uses none"
        raise ValueError(f"divergence: objective {entry.objective} {need}")
    if plan.engine == "verl":
        from cppo.integrations.verl_checks import check_objective

        check_objective(entry)
    if entry.divergence is None:
        return
    if plan.engine == "vllm" and entry.divergence.estimator == "exact":
        raise ValueError("divergence.estimator: exact needs whole distributions, which vLLM does not give; take top_k")
    if isinstance(plan.model, Pretrained):
        if entry.divergence.estimator == "exact":
            raise ValueError("divergence.estimator: exact is for the embedded vocabulary; take top_k")
    elif entry.divergence.k is not None and entry.divergence.k >= len(VOCABULARY):
        raise ValueError(f"divergence.k: {entry.divergence.k} must be below the vocabulary's size {len(VOCABULARY)}")
