"""Write the docs corpus that the package ships: `python experiments/zoo/docs_sample.py FILE`.

The corpus is the docstrings of eight packages, read from their sources without importing them. FILE
gets the documents of the calibration and of the held-out split; prepare.py trains the zoo on those
of the train split. The shipped file was written once, from the versions that LICENSES.txt beside it
names. Other versions would give other text and move every number that rests on it.
"""

import argparse
import ast
import importlib.util
import json
import lzma
import warnings
from collections.abc import Iterator
from pathlib import Path

from rerail.text.documents import Document, split_of, without_near_duplicates

PACKAGES = ("torch", "transformers", "numpy", "scipy", "sklearn", "sympy", "pandas", "networkx")
MIN_CHARACTERS = 200
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# plain text compresses best with four literal context bits and no alignment
FILTERS = [
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "pb": 0,
     "dict_size": 1 << 24, "nice_len": 273, "depth": 1000}
]  # fmt: skip


def docstrings() -> list[Document]:
    """Return the long docstrings of all packages, sorted by their qualified names."""
    # a name that is defined twice keeps its last text
    texts = {name: text for package in PACKAGES for name, text in of_package(package)}
    return [Document(name, text) for name, text in sorted(texts.items())]


def of_package(package: str) -> Iterator[tuple[str, str]]:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    for path in sorted(root.rglob("*.py")):
        if {"tests", "test"} & set(path.relative_to(root).parts):
            continue
        module = ".".join(path.relative_to(root.parent).with_suffix("").parts)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        yield from of_node(tree, module.removesuffix(".__init__"))


def of_node(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, (ast.Module, *DEFINITIONS)):
        text = ast.get_docstring(node)
        if text and len(text) >= MIN_CHARACTERS:
            yield name, text
    for child in ast.iter_child_nodes(node):
        # definitions are statements: walking expressions, too, would take most of the time
        if not isinstance(child, ast.expr):
            yield from of_node(
                child, f"{name}.{child.name}" if isinstance(child, DEFINITIONS) else name
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="where to write, for instance documents.jsonl.xz")
    file = parser.parse_args().file
    documents = [d for d in without_near_duplicates(docstrings()) if split_of(d.name) != "train"]
    lines = [
        json.dumps({"name": d.name, "text": d.text}, ensure_ascii=False)
        for d in sorted(documents, key=lambda d: d.name)
    ]
    data = "".join(f"{line}\n" for line in lines).encode()
    file.write_bytes(lzma.compress(data, filters=FILTERS))
    print(
        f"{file}: {len(documents)} documents, {len(data)} bytes, {file.stat().st_size} compressed"
    )


if __name__ == "__main__":
    main()
