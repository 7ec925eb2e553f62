"""Reads a YAML file from a stranger. Duplicate keys, aliases of aliases and odd tags are errors of one line."""

import re
from pathlib import Path
from typing import Any

import yaml

from cppo.suite.schema import one_line

MAX_BYTES = 2**18
"""Largest file of a suite that is read."""
MAX_NODES = 100_000
"""Most values of a suite, its aliases written out."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads 1e-4 as a number (YAML 1.1 wants 1.0e-4)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, "expected a mapping", node.start_mark)
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> object:
    """The plain data in a YAML file. Raises ValueError, one line naming file and line, when it cannot be read."""
    try:
        with path.open("rb") as source:
            content = source.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"{path}: longer than {MAX_BYTES} bytes, which no suite is; see config/mini.yaml")
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(f"{path}: cannot be read ({reason}); suites are YAML files such as config/mini.yaml") from None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_aliases(node, {})
        return loader.construct_document(node)  # type: ignore[no-untyped-call]
    except (yaml.YAMLError, RecursionError, ValueError, AttributeError, KeyError) as error:
        # PyYAML raises the last two for !!timestamp and !!bool before text that is neither.
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ValueError(f"{path}:{line} not valid YAML: {one_line(problem)}") from None


def _check_aliases(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """How many nodes this one is when its aliases are written out. Raises YAMLError for too many, or for one inside itself.

    A few hundred bytes of aliases of aliases may stand for more than any memory holds.
    """
    key = id(node)
    if key not in sizes:
        sizes[key] = None  # being counted
        below = node.value if isinstance(node, yaml.CollectionNode) else []
        children = [child for entry in below for child in (entry if isinstance(entry, tuple) else (entry,))]
        sizes[key] = 1 + sum(_check_aliases(child, sizes) for child in children)
    size = sizes[key]
    if size is None:
        raise yaml.constructor.ConstructorError(None, None, "an alias stands inside what it names", node.start_mark)
    if size > MAX_NODES:
        problem = f"more than {MAX_NODES} values once its aliases are written out"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return size
