"""Suites: loaded from YAML, resolved into runs, and checked before anything is computed.

A suite (`config/<name>.yaml`) names settings (model, task, rollouts, optimiser), rules, seeds and the evaluation.
`load_suite` checks all of it and turns it into runs, one for each setting x rule x seed. A run's id is the hash of its fully
resolved configuration without the suite's name, so equal runs of two suites are one run.

Every error is a ValueError of one line: file, key, what is wrong.
"""

import dataclasses
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from cppo import advantages, divergences
from cppo.integrations import verl_checks
from cppo.objectives import Objective, objective, params_of, spec
from cppo.rollout.engines import ENGINES
from cppo.suite.config import BaseConfig, Divergence, Evaluation, Resources, RuleEntry, RunConfig, Setting
from cppo.suite.presets import expand
from cppo.suite.schema import Config, Name, Seed, one_line, parse, unique
from cppo.suite.yaml_file import read_yaml
from cppo.system.plugins import code_of

FOLDER = Path("config")
"""Where suites are looked for by name."""


class Suite(Config):
    """A whole comparison: settings x rules x seeds."""

    description: str
    """What the suite is for."""
    seeds: tuple[Seed, ...] = Field(min_length=1)
    """Each rule runs once with each seed."""
    settings: dict[Name, Setting] = Field(min_length=1)
    """The tables' columns."""
    evaluation: Evaluation
    """The same for all."""
    rules: tuple[RuleEntry, ...] = Field(min_length=1)
    """The tables' rows."""
    resources: dict[Name, Resources] = Field(default_factory=dict)
    """What the jobs of a setting ask a cluster for, by the setting's name; for others one core."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers that get every iteration's metrics too."""

    @model_validator(mode="after")
    def _distinct(self) -> "Suite":
        unique([rule.name for rule in self.rules], "rules: name")
        unique(self.seeds, "seeds")
        for name in self.resources:
            if name not in self.settings:
                raise ValueError(f"resources.{name}: no such setting in this suite")
        for rule in self.rules:
            if rule.name == BaseConfig.rule_name:
                raise ValueError(f"rules: the name '{BaseConfig.rule_name}' is taken by the tables' base row")
            for name in rule.params_by_setting:
                if name not in self.settings:
                    raise ValueError(f"rules.{rule.name}.params_by_setting.{name}: no such setting in this suite")
        return self

    def runs(self) -> tuple[RunConfig, ...]:
        """All runs, settings first, then rules, then seeds."""
        return tuple(self.by_id.values())

    @cached_property
    def by_id(self) -> dict[str, RunConfig]:
        """All runs by id; made once, since the workflow asks for every run several times."""
        runs = (
            RunConfig(
                rule=resolve(rule, name, setting),
                setting_name=name,
                setting=setting,
                seed=seed,
                evaluation=self.evaluation,
            )
            for name, setting in self.settings.items()
            for rule in self.rules
            for seed in self.seeds
        )
        return {run.id: run for run in runs}

    def run(self, run_id: str) -> RunConfig:
        """The run with this id. Raises ValueError when there is none."""
        if run_id in self.by_id:
            return self.by_id[run_id]
        raise ValueError(f"--run {run_id}: no such run in the suite; `python -m cppo runs` lists them")

    def bases(self) -> tuple[BaseConfig, ...]:
        """The base models, one per setting."""
        return tuple(
            BaseConfig(setting_name=name, setting=setting, evaluation=self.evaluation)
            for name, setting in self.settings.items()
        )

    def base(self, setting_name: str) -> BaseConfig:
        """The base model of this setting. Raises ValueError when there is none."""
        for base in self.bases():
            if base.setting_name == setting_name:
                return base
        raise ValueError(f"--setting {setting_name}: not in the suite; it has {', '.join(self.settings)}")

    def resources_of(self, setting_name: str) -> Resources:
        """What the jobs of a setting ask a cluster for."""
        return self.resources.get(setting_name, Resources())

    def published(self) -> dict[str, Any]:
        """The suite as plain data, each rule with the names of what it shows (`traces`): what tables and figures read."""
        plain = self.model_dump(mode="json")
        for rule, entry in zip(self.rules, plain["rules"], strict=True):
            entry["traces"] = list(objective_of(resolve(rule, *next(iter(self.settings.items())))).spec.traces)
        return plain


def suite_path(name: str) -> Path:
    """The file of a suite that is given by its path, or by its name in config/.

    Raises ValueError when there is neither.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    by_name = FOLDER / f"{name}.yaml"
    if by_name.is_file():
        return by_name
    known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml"))) or "none here"
    raise ValueError(f"{name}: no such suite; give a YAML file, or a name in {FOLDER}/: {known}")


def suite_name(name: str) -> str:
    """The name of a suite that is given by its name, its file or a folder of its tables."""
    return Path(name).name.removesuffix(".yaml").removesuffix(".yml")


def load_suite(name: str | Path, added: tuple[str, ...] = ()) -> Suite:
    """The checked suite of this name or in this YAML file, with `added` (rules as JSON) appended to its rules.

    Raises ValueError, one line with file and key, for anything that could not run.
    """
    path = suite_path(str(name))
    raw = read_yaml(path)
    if isinstance(raw, dict) and isinstance(raw.get("rules"), list):
        try:
            raw = {**raw, "rules": [expand(rule) for rule in [*raw["rules"], *map(_added, added)]]}
        except ValueError as error:
            raise ValueError(f"{path}: rules.{error}") from None
    suite: Suite = parse(Suite, raw, str(path))
    for setting_name, setting in suite.settings.items():
        if setting.trainer == "verl":
            try:
                verl_checks.check_setting(setting_name, setting, suite.resources_of(setting_name))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        for rule in suite.rules:
            try:
                check_rule(resolve(rule, setting_name, setting), setting)
            except ValueError as error:
                message = one_line(str(error))
                if message.startswith("divergence") and "divergence" in rule.params_by_setting.get(setting_name, {}):
                    message = f"params_by_setting.{setting_name}.{message}"
                raise ValueError(f"{path}: rules.{rule.name}.{message}") from None
    return suite


def _added(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"--add-rule {text!r:.80}: not JSON") from None


def resolve(rule: RuleEntry, setting_name: str, setting: Setting) -> RuleEntry:
    """The rule for one setting, with every hyper-parameter written out, so that changing a default in the code changes the
    run's id, and with the hashes of the user's own modules.

    Raises ValueError, one line that begins with the key, for what the objective does not take.
    """
    here, divergence = dict(rule.params_by_setting.get(setting_name, {})), rule.divergence
    if "divergence" in here:
        divergence = parse(Divergence, here.pop("divergence"), f"params_by_setting.{setting_name}.divergence")
    values = {
        key: setting.rollout.max_response_tokens if value == "max_response_tokens" else value
        for key, value in {**rule.params, **here}.items()
    }
    _found("objective", lambda: spec(rule.objective))
    _found("advantage", lambda: advantages.estimator(rule.advantage))
    code = code_of(rule.objective) | code_of(rule.advantage)
    if divergence is not None:
        estimator = divergence.estimator
        _found("divergence.estimator", lambda: divergences.estimator(estimator))
        code |= code_of(estimator)
    try:
        params = dataclasses.asdict(params_of(rule.objective, **values))
    except ValueError as error:
        key = str(error).split(":")[0]
        known = {*values, *(field.name for field in dataclasses.fields(spec(rule.objective).params))}
        where = f"params_by_setting.{setting_name}" if key in here else "params"
        raise ValueError(f"{where}{'.' if key in known else ': '}{error}") from None
    return rule.model_copy(update={"params": params, "divergence": divergence, "params_by_setting": {}, "code": code})


def _found(key: str, find: Callable[[], object]) -> None:
    """Look something up; an error begins with the key that names it."""
    try:
        find()
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def objective_of(rule: RuleEntry) -> Objective:
    """The objective of a resolved rule."""
    return objective(rule.objective, **rule.params)


def check_rule(rule: RuleEntry, setting: Setting) -> None:
    """ValueError, one line that begins with the key, for a resolved rule that cannot be trained in this setting."""
    needs = objective_of(rule).needs
    if ("divergence" in needs) != (rule.divergence is not None):
        need = "needs one" if rule.divergence is None else "uses none"
        raise ValueError(f"divergence: objective {rule.objective} {need}")
    if setting.trainer == "verl":
        verl_checks.check_rule(rule, needs)
    if rule.divergence is not None:
        _check_divergence(rule.divergence, setting)


def _check_divergence(divergence: Divergence, setting: Setting) -> None:
    estimator = divergences.estimator(divergence.estimator)
    if divergence.kind not in estimator.kinds:
        raise ValueError(f"divergence.kind: {divergence.kind!r} is not one of {', '.join(estimator.kinds)}")
    if (estimator.keeps == "top_k") != (divergence.k is not None):
        raise ValueError(f"divergence.k: estimator {estimator.name} {'uses none' if divergence.k else 'needs it'}")
    if divergence.support is not None and "support" not in estimator.options:
        raise ValueError(f"divergence.support: estimator {estimator.name} has no such option")
    vocabulary = setting.vocabulary
    if estimator.keeps == "full":
        if vocabulary is None:
            raise ValueError(
                f"divergence.estimator: {estimator.name} is for the vocabularies of created models; take top_k"
            )
        if not ENGINES[setting.engine].full:
            raise ValueError(
                f"divergence.estimator: {estimator.name} needs whole distributions, which engine {setting.engine} does not "
                "give; take top_k"
            )
    if vocabulary is not None and divergence.k is not None and divergence.k >= len(vocabulary):
        raise ValueError(f"divergence.k: {divergence.k} must be below the vocabulary's size {len(vocabulary)}")
