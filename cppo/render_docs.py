"""The page docs/objectives.md, written from docstrings: objectives, divergences, advantages, presets and laws.

`cppo objectives --markdown > docs/objectives.md` renews it; a test fails while it is stale.
"""

import ast
import dataclasses
import inspect
import itertools
import json
import re
import textwrap
import typing
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from cppo import advantages, divergences
from cppo.objectives import laws, names, spec
from cppo.objectives.registry import Spec
from cppo.suite import presets

HEADER = """# Objectives

Generated from the docstrings by `cppo objectives --markdown > docs/objectives.md`; do not edit.
Notation as in CONTRIBUTING.md. Every objective maximises the sum of gate x surrogate, divided as the aggregation says.
"""


def field_docs(cls: type) -> dict[str, str]:
    """Field name -> the sentence below it in the source, those of parent classes too; "" where there is none."""
    sentences = {field.name: "" for field in dataclasses.fields(cls)}
    for kind in reversed([k for k in cls.__mro__ if dataclasses.is_dataclass(k)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
        for item, below in itertools.pairwise(body):
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and isinstance(below, ast.Expr):
                sentences[item.target.id] = " ".join(ast.literal_eval(below.value).split())
    return sentences


def listing() -> str:
    """Every registered objective for the terminal: what it is, its parameters with defaults and meaning."""
    lines = []
    for entry in map(spec, names()):
        lines.append(f"{entry.name}{_needs(entry, '  (needs {})')}")
        lines.append(textwrap.indent(inspect.getdoc(entry.function) or "", "    "))
        described = field_docs(entry.params)
        for field in dataclasses.fields(entry.params):
            lines.append(f"      {field.name} = {json.dumps(field.default)}  {described[field.name]}")
        lines.append("")
    return "\n".join(lines)


def markdown() -> str:
    """The page."""
    parts = [HEADER, *map(_objective, map(spec, names()))]
    for title, module in (("Divergences", divergences), ("Advantages", advantages)):
        parts += [f"# {title}\n", _paragraphs(inspect.getdoc(module)), _functions(module)]
    parts += ["# Presets\n", _paragraphs(inspect.getdoc(presets)), _presets()]
    parts += [
        "# Laws\n",
        "`cppo check my_module:my_objective` tries these laws; every objective above keeps them.\n",
    ]
    parts.append("".join(f"- **{name}**: {_first_paragraph(law)}\n" for name, law in laws.LAWS.items()))
    return "\n".join(parts)


def _objective(entry: Spec) -> str:
    """An objective's section: what it is, what it needs and shows, and its parameters."""
    text = [f"## {entry.name}\n", _paragraphs(inspect.getdoc(entry.function))]
    text += [line for line in [_needs(entry, "Needs {}.\n")] if line]
    if entry.traces:
        text.append(f"Shows {', '.join(f'`{trace}`' for trace in entry.traces)}.\n")
    fields, hints, described = dataclasses.fields(entry.params), _hints(entry.params), field_docs(entry.params)
    if not fields:
        return "\n".join([*text, "No parameters.\n"])
    table = [(f"`{f.name}`", hints[f.name], f"`{json.dumps(f.default)}`", described[f.name]) for f in fields]
    return "\n".join([*text, _table(("parameter", "type", "default", "meaning"), table)])


def _needs(entry: Spec, text: str) -> str:
    """What the objective needs with its default parameters, put into `text`; nothing when it needs nothing."""
    needs = sorted(entry.needs_of(entry.params()))
    return text.format("a " + " and a ".join(needs)) if needs else ""


def _hints(cls: type) -> dict[str, str]:
    """Field name -> its type as YAML has it: `float`, or `float or null`."""

    def name(part: Any) -> str:
        return "null" if part is type(None) else getattr(part, "__name__", str(part))

    return {
        field: " or ".join(name(part) for part in typing.get_args(hint) or (hint,))
        for field, hint in typing.get_type_hints(cls).items()
    }


def _functions(module: ModuleType) -> str:
    """The module's own public functions with the first paragraph of each."""
    own = [f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ == module.__name__]
    public = [f for f in own if not f.__name__.startswith("_")]
    return "".join(f"- `{f.__name__}`: {_first_paragraph(f)}\n" for f in public)


def _presets() -> str:
    """One row per preset: its keys, and the comment above it in the source."""
    notes = dict(re.findall(r'^    # (.+)\n    "(\w+)": ', inspect.getsource(presets), re.MULTILINE))
    notes = {name: sentence for sentence, name in notes.items()}
    table = []
    for name, entry in presets.PRESETS.items():
        rest = ", ".join(f"{key}: {_flow(value)}" for key, value in entry.items() if key != "objective")
        table.append((f"`{name}`", entry["objective"], rest, notes.get(name, "")))
    return _table(("preset", "objective", "keys", "meaning"), table)


def _flow(value: Any) -> str:
    """A value as YAML writes it on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value)


def _table(head: tuple[str, ...], table: Sequence[tuple[str, ...]]) -> str:
    rows = [head, ("---",) * len(head), *(tuple(cell.replace("|", "\\|") for cell in row) for row in table)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _first_paragraph(documented: Any) -> str:
    return " ".join((inspect.getdoc(documented) or "").split("\n\n")[0].split())


def _paragraphs(text: str | None) -> str:
    """A docstring in markdown: blank lines are kept, an indented block is code, and what begins with "Source", "Difference"
    or "Legend" is a paragraph of its own."""
    text = re.sub(r"\n(?=Sources?:|Differences? from|Legend:)", "\n\n", text or "")
    return "\n\n".join(_paragraph(part) for part in text.split("\n\n") if part.strip()) + "\n"


def _paragraph(part: str) -> str:
    if all(line.startswith("    ") for line in part.splitlines()):
        return f"```python\n{textwrap.dedent(part)}\n```"
    return " ".join(part.split())
