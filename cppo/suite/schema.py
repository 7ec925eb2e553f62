"""The frozen base of all configuration: checked scalars, content hashes, errors of one line."""

import hashlib
import json
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cppo.suite.config import _TAGS

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=60)]
"""Lower-case letters, digits, - and _: names become parts of paths."""
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Betas = tuple[Share, Share]
Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
Parsed = TypeVar("Parsed", bound=BaseModel)


class Config(BaseModel):
    """Frozen; an unknown key or a wrong type is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def content_hash(value: object) -> str:
    """Ten hex digits of the SHA-256 of the value's canonical JSON."""

    def plain(x: object) -> object:
        return x.model_dump(mode="json") if isinstance(x, BaseModel) else str(x)

    text = json.dumps(value, sort_keys=True, default=plain, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def one_line(message: str) -> str:
    """The message without line breaks and control characters, which a key in the file may hold."""
    return " ".join("".join(c if c.isprintable() else " " for c in message).split())


def parse(kind: type[Parsed], raw: object, where: str) -> Parsed:
    """`raw` (plain data) as a checked `kind`; ValueError of one line naming `where` and the key otherwise."""
    try:
        text = json.dumps(raw, default=str)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{where}: not plain data: {error}") from None
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        # A misspelt key is also a missing one: name what was written.
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        place = first["loc"]
        key = ".".join(str(part) for i, part in enumerate(place) if (place[i - 1], part) not in _TAGS)
        message = {"extra_forbidden": "unknown key", "missing": "missing key"}.get(first["type"], first["msg"])
        message = message.removeprefix("Value error, ")
        raise ValueError(f"{where}: {one_line((key + ': ' if key else '') + message)}") from None


def unique(values: Any, what: str) -> None:
    seen: set[Any] = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{what} {value!r} is given twice")
        seen.add(value)
