"""What changes the version of code, and what does not."""

import functools
import importlib
import sys
import types
from pathlib import Path

import pytest

from rerail import code_version as module
from rerail.code_version import code_version
from rerail.statistics.routed import Count, Moment

PACKAGE = {
    "__init__": "",
    "base": '''
        import math
        from mended.limits import LARGEST

        TWO = 2

        class Base:
            """Words."""

            def twice(self, x):
                return TWO * min(x, LARGEST)

        def never_used():
            return math.pi
        ''',
    "limits": "LARGEST = 100\nSMALLEST = 0\n",
    "first": '''
        from mended.base import Base

        class First(Base):
            """What is measured."""

            def of(self, x):
                # a remark
                from mended import late

                return late.add(x, helped(x))

        def helped(x: "Kept") -> int:
            return x

        class Kept:
            size = 1

        class Neighbour:
            size = 1
        ''',
    "late": "def add(a, b):\n    return a + b\n",
    "second": "from mended.base import Base\n\nclass Second(Base):\n    size = 1\n",
    "alone": """
        register = list
        register('form')

        def alone():
            return lambda: 1

        alone.width = 1
        """,
}


class Edited:
    """A package on disk, read anew after every edit."""

    def __init__(self, folder: Path):
        self.folder = folder / "mended"
        self.folder.mkdir()
        for name, text in PACKAGE.items():
            (self.folder / f"{name}.py").write_text(_dedent(text))

    def versions(self) -> dict[str, str]:
        for name in [n for n in sys.modules if n.partition(".")[0] == "mended"]:
            del sys.modules[name]
        importlib.invalidate_caches()
        module._source.cache_clear()
        things = {"first": "First", "second": "Second", "alone": "alone"}
        return {
            module: code_version(getattr(importlib.import_module(f"mended.{module}"), name))
            for module, name in things.items()
        }

    def edit(self, module: str, old: str, new: str) -> None:
        path = self.folder / f"{module}.py"
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))


def _dedent(text: str) -> str:
    import textwrap

    return textwrap.dedent(text).lstrip()


@pytest.fixture
def package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # an edit within a second is seen
    yield Edited(tmp_path)
    for name in [n for n in sys.modules if n.partition(".")[0] == "mended"]:
        del sys.modules[name]
    module._source.cache_clear()


@pytest.mark.parametrize(
    ("module", "old", "new", "changed"),
    [
        ("first", "helped(x))", "2 * helped(x))", {"first"}),
        ("first", "return x\n", "return -x\n", {"first"}),
        ("late", "a + b", "a - b", {"first"}),
        ("second", "size = 1", "size = 2", {"second"}),
        ("base", "TWO *", "3 *", {"first", "second"}),
        ("base", "TWO = 2", "TWO = 4", {"first", "second"}),
        ("limits", "LARGEST = 100", "LARGEST = 99", {"first", "second"}),
        ("first", "class Kept:\n    size = 1", "class Kept:\n    size = 2", {"first"}),
        ("alone", "register('form')", "register('other')", {"alone"}),
        ("alone", "lambda: 1", "lambda: 2", {"alone"}),
        ("alone", "alone.width = 1", "alone.width = 2", {"alone"}),
        # what is not reached, and what is only words
        ("first", "class Neighbour:\n    size = 1", "class Neighbour:\n    size = 2", set()),
        ("first", "# a remark", "# another", set()),
        ("first", "What is measured.", "What is counted.", set()),
        ("base", "return math.pi", "return math.e", set()),
        ("base", '"""Words."""', '"""Other words."""', set()),
        ("limits", "SMALLEST = 0", "SMALLEST = 1", set()),
        ("second", "Base\n\nclass", "Base\n\n\n\nclass", set()),
    ],
)
def test_an_edit_counts_where_it_is_used_and_nowhere_else(package, module, old, new, changed):
    before = package.versions()
    assert package.versions() == before
    package.edit(module, old, new)
    after = package.versions()
    assert {name for name in before if before[name] != after[name]} == changed


def test_the_place_of_a_definition_does_not_count(package):
    before = package.versions()
    package.edit("first", "class Kept:\n    size = 1", "from mended.limits import Kept")
    (package.folder / "limits.py").write_text("class Kept:\n    size = 1\n\nLARGEST = 100\n")
    assert package.versions() == before


def test_another_release_of_a_package_that_is_used_counts(monkeypatch):
    before = code_version(Count)
    monkeypatch.setattr(module, "package_version", lambda package: f"{package} 0")
    assert code_version(Count) != before


def test_things_differ_and_the_function_around_stands_for_what_is_made_in_it():
    def inner():
        return 1

    assert len({code_version(Count), code_version(Moment), code_version(Count, Moment)}) == 3
    this = test_things_differ_and_the_function_around_stands_for_what_is_made_in_it
    assert code_version(inner) == code_version(functools.partial(inner)) == code_version(this)


def test_what_has_no_source_is_never_taken_for_something_old():
    console = types.ModuleType("console")
    exec("def typed():\n    return 1", console.__dict__)
    sys.modules["console"] = console
    try:
        assert code_version(console.typed) != code_version(console.typed)
    finally:
        del sys.modules["console"]
