"""The registry: an objective is one pure function `(cfg, tokens) -> Terms` and one frozen dataclass of settings.

@dataclass(frozen=True)
class Mine:
    '''Settings of `mine`.'''
    limit: float = 0.1
    '''Largest log-ratio that is trained.'''

@register()
def mine(cfg: Mine, tokens: Tokens) -> Terms: ...

objective("mine", limit=0.2)(tokens)                  # by name, once its module is imported
objective("my_module:mine", limit=0.2)(tokens)        # by import path
"""

import dataclasses
import importlib
import inspect
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from cppo.objectives.types import Reason, Terms, Tokens, padded_like

Rule = Callable[[Any, Tokens], Terms]


@dataclass(frozen=True)
class Spec:
    """A registered rule: its function, its settings class, and whether it reads `Tokens.divergence`."""

    name: str
    function: Rule
    settings: type
    divergence: bool


_REGISTRY: dict[str, Spec] = {}


def register(divergence: bool = False) -> Callable[[Rule], Rule]:
    """Register a function under its own name. `divergence`: whether the rule reads `Tokens.divergence`.

    Raises ValueError when the first parameter is not annotated with a frozen dataclass, or another function already
    has the name.
    """

    def decorate(function: Rule) -> Rule:
        name = function.__name__
        hints = typing.get_type_hints(function)
        first = next(iter(inspect.signature(function).parameters), "")
        settings = hints.get(first)
        if not (isinstance(settings, type) and dataclasses.is_dataclass(settings) and _frozen(settings)):
            raise ValueError(f"objective {name}: annotate its first parameter with a frozen dataclass of settings")
        known = _REGISTRY.get(name)
        if known is not None and known.function.__module__ != function.__module__:
            raise ValueError(
                f"objective {name}: already registered by {known.function.__module__}; choose another name"
            )
        _REGISTRY[name] = Spec(name, function, settings, divergence)
        return function

    return decorate


def _frozen(cls: Any) -> bool:
    return bool(cls.__dataclass_params__.frozen)


def names() -> tuple[str, ...]:
    """Names of all registered objectives, sorted."""
    return tuple(sorted(_REGISTRY))


def spec(name: str) -> Spec:
    """The registered rule called `name`, or the one at the import path "module:function".

    Raises ValueError when there is none.
    """
    if ":" in name:
        if not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
            raise ValueError(f"objective {name!r}: an import path reads 'package.module:function'")
        module_name, _, name_there = name.partition(":")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise ValueError(f"objective {name!r}: {error}; is its folder on PYTHONPATH?") from None
        function = getattr(module, name_there, None)
        found = _REGISTRY.get(name_there)
        if found is None or found.function is not function:
            raise ValueError(
                f"objective {name!r}: {module_name} has no function {name_there} decorated with @register()"
            )
        return found
    if name not in _REGISTRY:
        raise ValueError(f"unknown objective {name!r}; known: {', '.join(names())}, or 'module:function' of your own")
    return _REGISTRY[name]


def settings_of(name: str, /, **values: object) -> Any:
    """The settings dataclass of objective `name` with `values` over its defaults.

    Raises ValueError naming the setting that is unknown, of the wrong type or out of range.
    """
    cls = spec(name).settings
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{key}: unknown setting of objective {name}; known: {', '.join(known) or 'none'}")
        try:
            values[key] = TypeAdapter(hints[key]).validate_python(value, strict=True)
        except ValidationError as error:
            raise ValueError(f"{key}: {value!r} of objective {name}: {error.errors()[0]['msg']}") from None
    return cls(**values)


@dataclass(frozen=True)
class Objective:
    """A rule with its settings: call it on `Tokens` to get `Terms`."""

    spec: Spec
    settings: Any

    @property
    def name(self) -> str:
        return self.spec.name

    def __call__(self, tokens: Tokens) -> Terms:
        """Apply the rule. Padding gets surrogate 0, gate 1 and reason KEPT, whatever it held.

        Raises ValueError for shapes that disagree, or a divergence rule without a divergence.
        """
        if self.spec.divergence and tokens.divergence is None:
            raise ValueError(f"objective {self.name} needs tokens.divergence: compute one with cppo.divergences")
        tokens = padded_like(tokens)
        terms = self.spec.function(self.settings, tokens)
        mask = tokens.mask
        return Terms(
            surrogate=torch.where(mask, terms.surrogate, 0),
            gate=torch.where(mask, terms.gate.detach().to(tokens.logp.dtype), 1),
            reason=torch.where(mask, terms.reason, int(Reason.KEPT)),
        )


def objective(name: str, /, **settings: object) -> Objective:
    """The objective `name` (registered, or "module:function") with `settings` over its defaults.

    Raises ValueError for an unknown name or setting.
    """
    return Objective(spec(name), settings_of(name, **settings))
