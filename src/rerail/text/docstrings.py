"""Technical prose that every installation has: the docstrings of its own dependencies."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rerail.errors import InputError
from rerail.text import docstring_reader
from rerail.text.documents import Document

PACKAGES = ("torch", "transformers", "numpy", "scipy", "sklearn", "sympy", "pandas", "networkx")
_DISTRIBUTION = {"sklearn": "scikit-learn"}


def package_versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the installed version of each package; they belong to a corpus' fingerprint.

    Raises:
        InputError: a package is not installed.
    """
    try:
        return {p: importlib.metadata.version(_DISTRIBUTION.get(p, p)) for p in packages}
    except (importlib.metadata.PackageNotFoundError, ValueError) as error:
        raise InputError(
            f"packages={', '.join(packages)}: not all are installed ({error}); "
            f"name installed packages, for instance {', '.join(PACKAGES)}"
        ) from error


def extract(packages: Sequence[str] = PACKAGES) -> list[Document]:
    """Return the docstrings of at least 200 characters, named by their qualified names.

    Files are parsed by one process a core and never imported; test folders are left out.

    Raises:
        InputError: a package is not installed.
    """
    files = [item for package in packages for item in _sources(package)]
    allowed = getattr(os, "sched_getaffinity", None)  # not on every system
    workers = min(len(allowed(0)) if allowed else os.cpu_count() or 1, 8)
    with ThreadPoolExecutor(workers) as pool:
        parts = pool.map(_read, [files[i::workers] for i in range(workers)])
        by_path = {path: pairs for part in parts for path, pairs in part.items()}
    # in the order of the files, because a name that comes twice keeps its last text
    found = {name: text for path, _ in files for name, text in by_path[path]}
    return [Document(name, text) for name, text in sorted(found.items())]


def _sources(package: str) -> list[tuple[str, str]]:
    """Return (path, qualified name) of each module of a package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None or Path(spec.origin).name != "__init__.py":
        raise InputError(
            f"packages: {package} is not an installed package of Python sources; "
            f"name such packages, for instance {', '.join(PACKAGES)}"
        )
    root = Path(spec.origin).parent
    found = []
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root.parent).with_suffix("").parts
        if not {"tests", "test"} & set(path.relative_to(root).parts):
            found.append((str(path), ".".join(inside).removesuffix(".__init__")))
    return found


def _read(files: list[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    # multiprocessing would run the user's script a second time unless it is guarded by __main__
    command = [sys.executable, "-I", docstring_reader.__file__]
    given = json.dumps(files)
    done = subprocess.run(command, input=given, capture_output=True, check=True, encoding="ascii")
    return {
        path: [(name, text) for name, text in pairs]
        for path, pairs in json.loads(done.stdout).items()
    }
