"""Problems with machine-checkable answers, in one schema for every source."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from cppo.system.files import write_whole


@dataclass(frozen=True)
class Problem:
    """One problem of any source."""

    id: str
    """Twelve hex digits: hash of question and answer."""
    question: str
    """The bare question; `cppo.tasks.prompts` makes the prompt."""
    answer: str
    """The gold answer."""
    source: str
    """Data set or split."""
    difficulty: int
    """Number of steps of a chain, level of MATH-500, 0 elsewhere."""


def problem(question: str, answer: str, source: str, difficulty: int) -> Problem:
    """A problem with its content id; the source is no part of it, so a duplicate across splits has the same id."""
    digest = hashlib.sha256(json.dumps([question, answer]).encode()).hexdigest()
    return Problem(digest[:12], question, answer, source, difficulty)


def write_problems(problems: Sequence[Problem], path: Path) -> None:
    """One JSON object a line, whole or not at all."""
    write_whole(path, "".join(json.dumps(asdict(p)) + "\n" for p in problems))


def read_problems(path: str | Path) -> tuple[Problem, ...]:
    """The problems in a file of `write_problems`. Raises ValueError naming file, line and field for anything else."""
    path, found = Path(path), []
    types = {f.name: f.type for f in fields(Problem)}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"{path}: cannot be read as UTF-8 text; `python -m cppo data` makes it") from None
    # Not splitlines(): JSON may hold other line separators inside a string.
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"{where}: not a JSON object; make the file again with `python -m cppo data`") from None
        if not isinstance(row, dict) or set(row) != set(types):
            raise ValueError(f"{where}: a problem has exactly the fields {', '.join(types)}")
        for name, kind in types.items():
            if type(row[name]) is not kind:
                raise ValueError(f"{where}: {name}: expected {getattr(kind, '__name__', kind)}, got {row[name]!r:.60}")
        made = Problem(**row)
        if made != problem(made.question, made.answer, made.source, made.difficulty):
            raise ValueError(f"{where}: id {made.id!r:.60} is not the hash of question and answer: the row was edited")
        found.append(made)
    if not found:
        raise ValueError(f"{path}: holds no problem; make it again with `python -m cppo data`")
    return tuple(found)
