"""The version of code: a hash of all the definitions that a function or class reaches.

Starting from a definition, every name in it is followed: to another definition of the same module,
and through imports to those of other modules of this package (or of the package of the thing
itself), until nothing new is reached. An edit therefore counts only where it is used: a file may
hold two statistics, and mending one leaves the other's version as it was. Comments, docstrings and
layout count for nothing, and neither does the place of a definition. Of other distributions the
version counts. Statements of a module that define nothing (a registration) count with the module.

What is chosen only at run time (the class of an argument, a registered form) cannot be followed;
name it beside the function that is given it.
"""

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import logging
import sys
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

Target = tuple[str, str]  # (module, name in it); the name "" stands for the whole module

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
_IMPORTS = (ast.Import, ast.ImportFrom)


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
    versions = sorted(f"{name} {_release(name)}" for name in foreign)
    return hashlib.sha256("\n".join([*sorted(code), *versions]).encode()).hexdigest()[:16]


def _root(thing: Any) -> Target:
    """Return where a thing is defined; what is made inside a function counts as that function."""
    while isinstance(thing, functools.partial):
        thing = thing.func
    thing = inspect.unwrap(thing)
    return thing.__module__, thing.__qualname__.partition(".")[0]


def _reached(roots: Iterable[Target], own: set[str]) -> tuple[set[str], set[str]]:
    """Return the hashes of all definitions that are reached, and the foreign packages."""
    code: set[str] = set()
    foreign: set[str] = set()
    todo, done = list(roots), set[Target]()
    while todo:
        target = todo.pop()
        if target in done:
            continue
        done.add(target)
        module, name = target
        package = module.partition(".")[0]
        if package not in own:
            foreign.add(package)
            continue
        source = _source(module)
        for statement in source.statements(name):
            text, names, imported = source.read(statement)
            code.add(text)
            todo += [(module, n) for n in names if n in source]
            todo += imported
        todo += source.imported.get(name, ())
        if name and name not in source:  # a module of its own, or a lazy attribute
            todo.append((source.submodule(name) or module, ""))
    return code, foreign


class _Source:
    """The statements of a module, by the names that they bind."""

    def __init__(self, module: str, file: Path):
        self.module = module
        self.folder = file.parent if file.name == "__init__.py" else None
        self.bound: dict[str, list[ast.stmt]] = defaultdict(list)
        self.imported: dict[str, list[Target]] = defaultdict(list)
        self.loose: list[ast.stmt] = []
        self._known: dict[int, tuple[str, set[str], list[Target]]] = {}
        tree = ast.parse(file.read_text(encoding="utf-8"))
        _drop_docstrings(tree)
        for statement in tree.body:
            self._take(statement)

    def __contains__(self, name: str) -> bool:
        return name in self.bound or name in self.imported

    def _take(self, statement: ast.stmt) -> None:
        if isinstance(statement, _IMPORTS):
            for name, target in self._targets(statement):
                self.imported[name].append(target)
            return
        if isinstance(statement, ast.If) and all(isinstance(s, _IMPORTS) for s in statement.body):
            for inner in (*statement.body, *statement.orelse):
                self._take(inner)
            return
        for name in _names_bound(statement):
            self.bound[name].append(statement)
        if not isinstance(statement, _DEFINITIONS):
            self.loose.append(statement)

    def statements(self, name: str) -> list[ast.stmt]:
        """Return what defines a name (all of the module for ""), and what defines nothing."""
        if name:
            return [*self.bound.get(name, ()), *self.loose]
        return [s for statements in self.bound.values() for s in statements] + self.loose

    def read(self, statement: ast.stmt) -> tuple[str, set[str], list[Target]]:
        """Return the hash of a statement, the names in it, and what it imports itself."""
        if id(statement) not in self._known:
            text = hashlib.sha256(ast.dump(statement).encode()).hexdigest()
            nodes = list(ast.walk(statement))
            names = {n.id for n in nodes if isinstance(n, ast.Name)}
            names |= {n for text in map(_quoted, nodes) for n in text}
            inner = [t for n in nodes if isinstance(n, _IMPORTS) for _, t in self._targets(n)]
            self._known[id(statement)] = text, names, inner
        return self._known[id(statement)]

    def _targets(self, statement: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, Target]]:
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                yield alias.asname or alias.name.partition(".")[0], (alias.name, "")
            return
        package = self.module if self.folder else self.module.rpartition(".")[0]
        where = "." * statement.level + (statement.module or "")
        module = importlib.util.resolve_name(where, package)
        for alias in statement.names:
            name = alias.asname or alias.name
            yield name, (module, alias.name.replace("*", ""))

    def submodule(self, name: str) -> str | None:
        """Return the full name of a module in this folder of modules."""
        if self.folder is None:
            return None
        inner = self.folder / name
        there = inner.with_suffix(".py").exists() or (inner / "__init__.py").exists()
        return f"{self.module}.{name}" if there else None


def _names_bound(statement: ast.stmt) -> set[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    nodes = list(ast.walk(statement))
    names = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return names | {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}


def _quoted(node: ast.AST) -> set[str]:
    """Return the names in an annotation that is written as a string."""
    if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
        return set()
    try:
        tree = ast.parse(node.value, mode="eval")
    except (SyntaxError, ValueError):
        return set()
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}


def _drop_docstrings(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:] or [ast.Pass()]


@functools.cache
def _file(module: str) -> Path | None:
    """Return the source file of a module; None for what has none (built-in, console)."""
    loaded = sys.modules.get(module)
    if loaded is not None:
        name = getattr(loaded, "__file__", None)
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


@functools.cache
def _release(package: str) -> str:
    if package in sys.stdlib_module_names:
        return ""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
