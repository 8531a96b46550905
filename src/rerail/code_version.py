"""The version of code: a hash of all the definitions that a function or class reaches.

Starting from a definition, every name in it is followed: to another definition of the same module,
and through imports to those of other modules of this package (or of the package of the thing
itself), until nothing new is reached. An edit therefore counts only where it is used: a file may
hold a costly statistic and a score, and mending the score leaves the statistic's version as it was.
Comments, docstrings and layout count for nothing, and neither does the place of a definition. Of
other distributions the version counts. Statements that define nothing (a registration) count
with their module.

What is chosen only at run time (the class of an argument, a registered form) cannot be followed;
name it beside the function that is given it.
"""

import ast
import functools
import hashlib
import importlib.util
import inspect
import sys
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rerail.versions import package_version

Target = tuple[str, str]  # (module, name in it)

_ALL = "*"  # the name that stands for a whole module
_LOOSE = ""  # the name of the statements that define nothing

_IMPORTS = (ast.Import, ast.ImportFrom)
_NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def code_version(*things: type | Callable[..., Any]) -> str:
    """Return 16 hex digits that stand for all the code that functions and classes reach.

    Sources are read once a process. A thing without a source file (typed into a console) has
    another version each time, so that nothing old is ever taken for its work.
    """
    roots = [_root(thing) for thing in things]
    if any(_file(module) is None for module, _ in roots):
        return uuid.uuid4().hex[:16]
    own = {"rerail", *(module.partition(".")[0] for module, _ in roots)}
    code, foreign = _reached(roots, own)
    versions = sorted(f"{name} {package_version(name)}" for name in foreign)
    return hashlib.sha256("\n".join([*sorted(code), *versions]).encode()).hexdigest()[:16]


def _root(thing: Any) -> Target:
    """Return where a thing is defined; what is made inside a function counts as that function."""
    while isinstance(thing, functools.partial):
        thing = thing.func
    thing = inspect.unwrap(thing)
    return thing.__module__, thing.__qualname__.partition(".")[0]


def _reached(roots: Iterable[Target], own: set[str]) -> tuple[set[str], set[str]]:
    """Return the text of all definitions that are reached, and the foreign packages."""
    code: set[str] = set()
    foreign: set[str] = set()
    todo, done = list(roots), set[Target]()
    while todo:
        target = module, name = todo.pop()
        if target in done:
            continue
        done.add(target)
        package = module.partition(".")[0]
        if package not in own:
            foreign.add(package)
            continue
        source = _source(module)
        todo.append((module, _LOOSE))
        if name in source.targets:
            code |= source.code[name]
            todo += [t for t in source.targets[name] if t[0] != module or t[1] in source.targets]
        elif source.package == module and _file(f"{module}.{name}"):
            todo.append((f"{module}.{name}", _ALL))
        else:  # all of it, or an attribute that is made on demand
            todo += [(module, n) for n in source.targets]
    return code, foreign


class _Source:
    """A module by the names that it binds: the text of their statements, and what that names."""

    def __init__(self, module: str, file: Path):
        self.module = module
        self.package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        self.code: dict[str, set[str]] = defaultdict(set)
        self.targets: dict[str, set[Target]] = defaultdict(set, {_LOOSE: set()})
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, *_NAMED)) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        for statement in tree.body:
            self._take(statement)

    def _take(self, statement: ast.stmt) -> None:
        imports = list(self._imports(statement))
        body = statement.body if isinstance(statement, ast.If) else [statement]
        if all(isinstance(s, _IMPORTS) for s in body):  # from where a name comes is no matter
            for name, target in imports:
                self.targets[name].add(target)
            return
        nodes = list(ast.walk(statement))
        # an annotation may have its name in quotes
        words = {getattr(n, "id", None) or getattr(n, "value", None) for n in nodes}
        reached = {(self.module, w) for w in words if isinstance(w, str)} | {t for _, t in imports}
        if isinstance(statement, _NAMED):
            names = {statement.name}
        else:
            names = {
                n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            }
            names |= {n.name for n in nodes if isinstance(n, _NAMED)} | {
                name for name, _ in imports
            }
        if not names or not isinstance(statement, (*_NAMED, ast.Assign, ast.AnnAssign)):
            names.add(_LOOSE)
        for name in names:
            self.code[name].add(ast.dump(statement))
            self.targets[name] |= reached

    def _imports(self, statement: ast.stmt) -> Iterator[tuple[str, Target]]:
        """Yield the names that imports in a statement bind, and what they stand for."""
        for node in ast.walk(statement):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield alias.asname or alias.name.partition(".")[0], (alias.name, _ALL)
            elif isinstance(node, ast.ImportFrom):
                where = "." * node.level + (node.module or "")
                module = importlib.util.resolve_name(where, self.package)
                for alias in node.names:
                    yield alias.asname or alias.name, (module, alias.name)


def _file(module: str) -> Path | None:
    """Return the source file of a module; None for what has none (built-in, console)."""
    if module in sys.modules:
        name = getattr(sys.modules[module], "__file__", None)
    else:
        spec = importlib.util.find_spec(module)
        name = spec.origin if spec else None
    return Path(name) if name and name.endswith(".py") else None


@functools.cache
def _source(module: str) -> _Source:
    file = _file(module)
    if file is None:
        raise ModuleNotFoundError(f"module {module} has no source file")
    return _Source(module, file)
