"""Registries of functions by name or by import path, and the hashes of the user's own modules."""

import ast
import hashlib
import importlib
import importlib.util
import re
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """Entries by the name of the function that each stands for; an entry of a user's own is found at "module:function"."""

    def __init__(self, kind: str, decorator: str) -> None:
        """kind: what an entry is called in errors. decorator: how a user's own function gets in, as text for errors."""
        self.kind, self.decorator = kind, decorator
        self._entries: dict[str, tuple[Callable[..., object], Entry]] = {}

    def add(self, function: Callable[..., object], entry: Entry) -> None:
        """Register an entry under its function's name, without a leading underscore.

        Raises ValueError when a function of another module already has the name.
        """
        name = function.__name__.lstrip("_")
        known = self._entries.get(name)
        if known is not None and known[0].__module__ != function.__module__:
            raise ValueError(f"{self.kind} {name}: already registered by {known[0].__module__}; choose another name")
        self._entries[name] = (function, entry)

    def names(self) -> tuple[str, ...]:
        """Names of all registered entries, sorted."""
        return tuple(sorted(self._entries))

    def find(self, name: str) -> Entry:
        """The entry called `name`, or the one at the import path "module:function". Raises ValueError when there is none."""
        if ":" not in name:
            if name not in self._entries:
                raise ValueError(
                    f"unknown {self.kind} {name!r}; known: {', '.join(self.names())}, or 'module:function' of your own"
                )
            return self._entries[name][1]
        if not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
            raise ValueError(f"{self.kind} {name!r}: an import path reads 'package.module:function'")
        module_name, _, function_name = name.partition(":")
        function = getattr(_imported(module_name, f"{self.kind} {name!r}"), function_name, None)
        known = self._entries.get(function_name)
        if known is None or known[0] is not function:
            raise ValueError(
                f"{self.kind} {name!r}: {module_name} has no function {function_name} decorated with {self.decorator}"
            )
        return known[1]


def _imported(module_name: str, what: str) -> object:
    """The module, looked for in the folder where the command runs too. Raises ValueError, one line, when it does not import."""
    here = str(Path.cwd())
    if here not in sys.path:  # `python -m` puts it there, an installed command does not
        sys.path.append(here)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{what}: {error}; is its folder on PYTHONPATH?") from None
    except Exception as error:  # whatever the user's own module raises while it is imported
        reason = " ".join(str(error).split())
        raise ValueError(f"{what}: {module_name} cannot be imported: {type(error).__name__}: {reason}") from None


def code_of(name: str) -> dict[str, str]:
    """module -> hash of its code, for the module of an import path and those of the user's own that it imports; nothing for a
    name of the package's own.

    The hash is that of the syntax without comments and docstrings, so that editing those changes no run's id.
    """
    if ":" not in name:
        return {}
    hashes: dict[str, str] = {}
    waiting = [name.partition(":")[0]]
    while waiting:
        module_name = waiting.pop()
        file = getattr(sys.modules.get(module_name), "__file__", None)
        if module_name in hashes or file is None or (hashes and not _is_own(module_name, Path(file))):
            continue
        source = Path(file).read_text(encoding="utf-8")
        hashes[module_name] = syntax_hash(source)
        waiting += _imports(source, sys.modules[module_name].__package__ or "")
    return hashes


def _is_own(module_name: str, file: Path) -> bool:
    """Whether a module is the user's: neither this package's, nor Python's, nor an installed one."""
    installed = {"site-packages", "dist-packages"} & set(file.parts) or file.is_relative_to(
        sysconfig.get_path("stdlib")
    )
    return file.suffix == ".py" and not installed and module_name.partition(".")[0] != __name__.partition(".")[0]


def _imports(source: str, package: str) -> list[str]:
    """Names of the modules that Python source may import; some of them are names inside a module instead."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module_name = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names += [module_name, *(f"{module_name}.{alias.name}" for alias in node.names)]
    return names


def syntax_hash(source: str) -> str:
    """Ten hex digits of the SHA-256 of Python source without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            # A bare string is a docstring, or the sentence under a field.
            statements = [x for x in body if not (isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant))]
            node.body = statements or [ast.Pass()]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:10]
