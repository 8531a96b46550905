import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import networkx
import pytest

from rerail.errors import InputError
from rerail.text import docstring_reader
from rerail.text.docstrings import extract, package_versions

PROSE = "This sentence is repeated until the text is long enough to be kept. " * 4
SOURCE = f'''"""Module. {PROSE}"""
if True:
    def plain():
        """Plain. {PROSE}"""
        def inner():
            """Inner. {PROSE}"""
else:
    async def waiting():
        """Waiting. {PROSE}"""
try:
    class Outer:
        """Outer. {PROSE}"""
        class Inner:
            def method(self):
                """Method. {PROSE}"""
        def short(self):
            """Too short."""
except ValueError:
    def handled():
        """Handled. {PROSE}"""
finally:
    for _ in ():
        with open("x"):
            match 1:
                case 1:
                    def deep():
                        """Deep. {PROSE}"""
x = [lambda: """Not a docstring. {PROSE}"""]
def twice():
    """First. {PROSE}"""
def twice():
    """Second. {PROSE}"""
'''
NAMES = {
    "plain": "Plain",
    "plain.inner": "Inner",
    "waiting": "Waiting",
    "Outer": "Outer",
    "Outer.Inner.method": "Method",
    "handled": "Handled",
    "deep": "Deep",
    "twice": "Second",
}


def write_package(root: Path) -> None:
    for folder in ("", "sub", "tests", "sub/test"):
        (root / "odd" / folder).mkdir(parents=True, exist_ok=True)
        (root / "odd" / folder / "__init__.py").write_text(SOURCE)
    (root / "odd" / "broken.py").write_text(f'"""{PROSE}"""\ndef (')
    (root / "odd" / "latin.py").write_bytes(f'"""caf\xe9 {PROSE}"""'.encode("latin-1"))
    (root / "odd" / "raises.py").write_text(f'"""Raises. {PROSE}"""\nraise SystemExit(1)')


@pytest.mark.parametrize("above", ["plain", "tests"])
def test_docstrings_bear_qualified_names_wherever_the_package_lies(tmp_path, monkeypatch, above):
    root = tmp_path / above
    write_package(root)
    monkeypatch.syspath_prepend(root)
    found = {d.name: d.text for d in extract(("odd",))}
    starts = {"": "Module", **NAMES}
    expected = {"odd.raises": "Raises"}
    for module in ("odd", "odd.sub"):
        expected |= {f"{module}.{name}".strip("."): start for name, start in starts.items()}
    assert {name: text.split(".")[0] for name, text in found.items()} == expected
    assert found["odd.plain"] == f"Plain. {PROSE}"
    assert "odd" not in sys.modules


def test_an_unguarded_script_may_extract(tmp_path):
    write_package(tmp_path)
    script = tmp_path / "script.py"
    script.write_text("from rerail.text.docstrings import extract\nprint(len(extract(('odd',))))")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "19"), done.stderr


def test_a_real_package_gives_what_its_objects_say_about_themselves():
    found = {d.name: d.text for d in extract(("networkx",))}
    assert list(found) == sorted(found)
    assert len(found) > 500
    name = "networkx.algorithms.clique.find_cliques"
    assert found[name] == inspect.cleandoc(networkx.find_cliques.__doc__)
    assert not any(".tests." in name for name in found)
    root = Path(networkx.__file__).parent
    path = root / "classes" / "graph.py"
    read = docstring_reader.docstrings_of(path, "networkx.classes.graph")
    every = [ast.get_docstring(n) for n in ast.walk(ast.parse(path.read_text())) if _may_have(n)]
    assert sorted(text for _, text in read) == sorted(t for t in every if t and len(t) >= 200)


def _may_have(node: ast.AST) -> bool:
    return isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)


def test_versions_are_those_of_the_distributions():
    versions = package_versions(("sklearn", "networkx"))
    assert versions["networkx"] == networkx.__version__
    assert set(versions) == {"sklearn", "networkx"}


@pytest.mark.parametrize("package", ["no_such_package", ""])
def test_a_package_that_is_not_installed_is_named(package):
    with pytest.raises(InputError, match=f"packages=numpy, {package}: .*networkx"):
        package_versions(("numpy", package))


def test_a_single_module_is_refused_rather_than_read_with_all_its_neighbours(tmp_path, monkeypatch):
    (tmp_path / "single.py").write_text(f'"""{PROSE}"""')
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("single", "no_such_package"):
        with pytest.raises(InputError, match=f"{name} is not an installed package"):
            extract((name,))
