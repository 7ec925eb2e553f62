"""The registry: an objective is one pure function `(cfg, tokens) -> Terms` and one frozen dataclass of parameters.

@dataclass(frozen=True)
class Mine:
    '''Parameters of `mine`.'''
    limit: float = 0.1
    '''Largest log-ratio that is trained.'''

@register()
def mine(cfg: Mine, tokens: Tokens) -> Terms: ...

objective("mine", limit=0.2)(tokens)                  # by name, once its module is imported
objective("my_module:mine", limit=0.2)(tokens)        # by import path
"""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from cppo.objectives.types import Reason, Terms, Tokens, padded_like
from cppo.system.plugins import Registry

Rule = Callable[[Any, Tokens], Terms]
NEEDS = {
    "divergence": "tokens.divergence: compute one with cppo.divergences",
    "position": "tokens.position: a permutation of 1..T_i for each response",
}
"""What an objective may declare that it needs besides log-probabilities and advantages -> what to give it."""
Needs = Iterable[str] | Callable[[Any], Iterable[str]]


@dataclass(frozen=True)
class Spec:
    """A registered objective."""

    name: str
    function: Rule
    params: type
    """The class of its parameters."""
    needs: Needs
    """Names in `NEEDS`, or a function of the parameters that gives them."""
    traces: tuple[str, ...]
    """Names that `Terms.traces` may have."""

    def needs_of(self, params: Any) -> frozenset[str]:
        """What it needs with these parameters."""
        needs = frozenset(self.needs(params) if callable(self.needs) else self.needs)
        assert needs <= NEEDS.keys(), f"objective {self.name}: unknown needs {sorted(needs - NEEDS.keys())}"
        return needs


_REGISTRY: Registry[Spec] = Registry("objective", "@register()")


def register(needs: Needs = (), traces: Iterable[str] = ()) -> Callable[[Rule], Rule]:
    """Register a function under its own name.

    needs: what the rule reads besides log-probabilities and advantages, names in `NEEDS`, or a function of its parameters
        that gives them. A trainer that cannot give it refuses the rule by name of what is missing.
    traces: names of the quantities that the rule may show in `Terms.traces`.

    Raises ValueError when the first parameter is not annotated with a frozen dataclass, a need is unknown, or another
    function already has the name.
    """

    def decorate(function: Rule) -> Rule:
        name = function.__name__
        hints = typing.get_type_hints(function)
        first = next(iter(inspect.signature(function).parameters), "")
        params = hints.get(first)
        if not (isinstance(params, type) and dataclasses.is_dataclass(params) and _frozen(params)):
            raise ValueError(f"objective {name}: annotate its first parameter with a frozen dataclass of parameters")
        fixed = needs if callable(needs) else tuple(needs)
        if not callable(fixed) and not set(fixed) <= NEEDS.keys():
            raise ValueError(
                f"objective {name}: needs {sorted(set(fixed) - NEEDS.keys())} is not among {', '.join(NEEDS)}"
            )
        _REGISTRY.add(function, Spec(name, function, params, fixed, tuple(traces)))
        return function

    return decorate


def _frozen(cls: Any) -> bool:
    return bool(cls.__dataclass_params__.frozen)


def names() -> tuple[str, ...]:
    """Names of all registered objectives, sorted."""
    return _REGISTRY.names()


def spec(name: str) -> Spec:
    """The registered objective called `name`, or the one at the import path "module:function".

    Raises ValueError when there is none.
    """
    return _REGISTRY.find(name)


def params_of(name: str, /, **values: object) -> Any:
    """The parameters of objective `name`: `values` over the defaults of its dataclass, of exactly the annotated types.

    Raises ValueError, beginning with the parameter's name, for one that is unknown, missing, of the wrong type or out of
    range.
    """
    cls = spec(name).params
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{key}: unknown parameter of objective {name}; known: {', '.join(known) or 'none'}")
        try:
            values[key] = TypeAdapter(hints[key], config={"allow_inf_nan": False}).validate_python(value, strict=True)
        except ValidationError as error:
            raise ValueError(f"{key}: {value!r:.60} of objective {name}: {error.errors()[0]['msg']}") from None
    for key, field in known.items():
        if key not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{key}: objective {name} has no default for it")
    return cls(**values)


@dataclass(frozen=True)
class Objective:
    """An objective with its parameters: call it on `Tokens` to get `Terms`."""

    spec: Spec
    params: Any

    @property
    def name(self) -> str:
        """The function's name."""
        return self.spec.name

    @property
    def needs(self) -> frozenset[str]:
        """What it reads besides log-probabilities and advantages: names in `NEEDS`."""
        return self.spec.needs_of(self.params)

    def __call__(self, tokens: Tokens) -> Terms:
        """Apply the rule. Padding gets surrogate 0, gate 1 and reason KEPT, whatever it held; traces are 0 there.

        Raises ValueError for shapes that disagree, when something that the rule needs is not given, and for a trace that
        the rule did not declare.
        """
        for need in sorted(self.needs):
            if getattr(tokens, need) is None:
                raise ValueError(f"objective {self.name} needs {NEEDS[need]}")
        tokens = padded_like(tokens)
        terms = self.spec.function(self.params, tokens)
        mask = tokens.mask
        self._check(terms, mask)
        rows = mask.any(-1)
        return Terms(
            surrogate=torch.where(mask, terms.surrogate, 0),
            gate=torch.where(mask, terms.gate.detach().to(tokens.logp.dtype), 1),
            reason=torch.where(mask, terms.reason, int(Reason.KEPT)),
            traces={
                name: torch.where(mask if trace.dim() == 2 else rows, trace.detach(), 0)
                for name, trace in terms.traces.items()
            },
        )

    def _check(self, terms: Terms, mask: torch.Tensor) -> None:
        """ValueError unless every part of `terms` has the shape that it should have, and every trace was declared."""
        for part in ("surrogate", "gate", "reason"):
            shape = getattr(terms, part).shape
            if shape != mask.shape:
                raise ValueError(
                    f"objective {self.name}: {part}: expected shape {tuple(mask.shape)}, got {tuple(shape)}"
                )
        for name, trace in terms.traces.items():
            if name not in self.spec.traces:
                raise ValueError(f"objective {self.name}: trace {name} is not among @register's traces")
            if trace.shape not in (mask.shape, mask.shape[:1]):
                raise ValueError(
                    f"objective {self.name}: trace {name}: expected shape {tuple(mask.shape)} or {tuple(mask.shape[:1])}, "
                    f"got {tuple(trace.shape)}"
                )


def objective(name: str, /, **params: object) -> Objective:
    """The objective `name` (registered, or "module:function") with `params` over its defaults.

    Raises ValueError for an unknown name or parameter.
    """
    return Objective(spec(name), params_of(name, **params))
