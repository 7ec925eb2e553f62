"""The frozen base of all configuration: checked scalars, content hashes, and errors of one line."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=60)]
"""Lower-case letters, digits, - and _: names become parts of paths."""
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Betas = tuple[Share, Share]
Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
ImportPath = r"\w+(\.\w+)*:\w+"
"""Pattern of "package.module:function"."""
Parsed = TypeVar("Parsed", bound=BaseModel)


class Config(BaseModel):
    """Frozen; an unknown key or a wrong type is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Mark:
    """What a field's annotation says about the content hash."""


LATER = Mark()
"""Marks a key that was added after runs had been published. It is hashed only when it differs from its default, so that the
ids of older runs stay as they are: `teacher: Annotated[str | None, LATER] = None`."""
NOT_HASHED = Mark()
"""Marks a key that changes no number, such as a title."""


def hashed(value: object) -> object:
    """The plain data that stands for `value` in a content hash: everything but the keys that `LATER` and `NOT_HASHED` leave
    out."""
    if isinstance(value, BaseModel):
        found = {}
        for name, field in type(value).model_fields.items():
            here = getattr(value, name)
            if NOT_HASHED in field.metadata or (
                LATER in field.metadata and here == field.get_default(call_default_factory=True)
            ):
                continue
            found[name] = hashed(here)
        return found
    if isinstance(value, Mapping):
        return {str(key): hashed(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hashed(item) for item in value]
    return value


def content_hash(value: object) -> str:
    """Ten hex digits of the SHA-256 of the canonical JSON of `hashed(value)`."""
    text = json.dumps(hashed(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def one_line(message: str) -> str:
    """The message without line breaks and control characters, which a key in the file may hold."""
    return " ".join("".join(c if c.isprintable() else " " for c in message).split())


def unique(values: Iterable[Any], what: str) -> None:
    """Raises ValueError, beginning with `what`, when a value occurs twice."""
    seen: set[Any] = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{what} {value!r} is given twice")
        seen.add(value)


def parse(kind: type[Parsed], raw: object, where: str) -> Parsed:
    """`raw` (plain data) as a checked `kind`. Raises ValueError, one line that names `where` and the key, otherwise."""
    try:
        text = json.dumps(raw, default=str)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{where}: not plain data: {error}") from None
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        # A misspelt key is also a missing one: name what was written.
        first = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        place = _place(first["loc"], json.loads(text), missing=first["type"] == "missing")
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = RENAMED.get(str(first["loc"][-1]), "unknown key")
        elif first["type"] == "missing":
            message = "missing key"
        elif first["type"] in ("union_tag_not_found", "union_tag_invalid"):
            # The key that says which member of a union is meant; pydantic names the place of the union.
            place.append(first["ctx"]["discriminator"].strip("'"))
            message = "missing key"
            if first["type"] == "union_tag_invalid":
                message = f"{first['ctx']['tag']!r:.60} is not one of {first['ctx']['expected_tags']}"
        raise ValueError(f"{where}: {one_line(': '.join(filter(None, ('.'.join(place), message))))}") from None


OLDER = "older code made this folder: move it away and make it again"
RENAMED = {
    old: f"is now called {new}"
    for old, new in {
        "objectives": "rules",
        "by_setting": "params_by_setting",
        "lam": "gae_lambda",
        "steps": "sizes (of a task) or size (of a benchmark)",
        "plan": f"setting; {OLDER}",
        "label": f"rule.name; {OLDER}",
        "vllm_gpus": "engine_gpus",
        "vllm_memory": "engine_memory",
        "vllm_tolerance": "engine_tolerance",
    }.items()
}
"""Keys of older suites and runs, with what to say of them."""


def _place(loc: tuple[int | str, ...], raw: object, missing: bool) -> list[str]:
    """The keys that lead to an error, without the names that pydantic adds for the members of a union."""
    keys: list[str] = []
    here: Any = raw
    for i, part in enumerate(loc):
        inside = part in here if isinstance(here, dict) else isinstance(here, list) and part in range(len(here))
        if inside:
            here = here[part]
        elif not (missing and i + 1 == len(loc)):
            continue
        keys.append(str(part))
    return keys
