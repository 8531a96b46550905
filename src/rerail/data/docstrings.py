"""Technical prose that every installation has: the docstrings of its own dependencies."""

import ast
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from rerail.data.documents import Document

PACKAGES = ("torch", "transformers", "numpy", "scipy", "sklearn", "sympy", "pandas", "networkx")
_DISTRIBUTION = {"sklearn": "scikit-learn"}
_MIN_CHARACTERS = 200


def package_versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Return the installed version of each package; they belong to a corpus' fingerprint."""
    return {p: importlib.metadata.version(_DISTRIBUTION.get(p, p)) for p in packages}


def extract(packages: tuple[str, ...] = PACKAGES) -> list[Document]:
    """Return the docstrings of at least 200 characters, named by their qualified names.

    Files are parsed in parallel and never imported; test folders are left out.
    """
    files = [(root, path) for root in map(_root, packages) for path in _sources(root)]
    workers = min(len(os.sched_getaffinity(0)), 8)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        parts = pool.map(_of_file, files, chunksize=64)
        found = {name: text for part in parts for name, text in part}
    return [Document(name, text) for name, text in sorted(found.items())]


def _root(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed, and the docs corpus reads it")
    return Path(spec.origin).parent


def _sources(root: Path) -> list[Path]:
    return [p for p in sorted(root.rglob("*.py")) if not {"tests", "test"} & set(p.parts)]


def _of_file(item: tuple[Path, Path]) -> list[tuple[str, str]]:
    root, path = item
    module = ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    return list(_walk(tree, module))


def _walk(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text and len(text) >= _MIN_CHARACTERS:
            yield name, text
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _walk(child, f"{name}.{child.name}" if named else name)
