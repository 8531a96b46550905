"""One self-contained modelling file, assembled from the very files that rerail itself runs.

A folder with this file and the `auto_map` of its config loads wherever torch and transformers are,
with `trust_remote_code=True`. Internal imports are taken out and the files follow one another in
the order in which they need each other; each bank file becomes a function, since all of them name
their class `Bank`.
"""

import ast
import importlib.util
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rerail.export.families import PREFIX, Classes, our_name, stock_classes

_ROOT = "rerail.export.structure"
_BANKS = "rerail.experts"
_BASE = "rerail.experts.base"
# finds a bank by its file, which a self-contained module has not
_REPLACED = {"bank_class"}
# imported for annotations only, and it would bring the rest of rerail
_FOR_TYPES = {"rerail.moe.model"}


def module_name(family: str) -> str:
    """Return the name of the modelling file of a family, without its suffix."""
    return f"modelling_{PREFIX}{family}"


def auto_map(family: str) -> dict[str, str]:
    """Return what `config.json` must say for the Auto classes to find the file."""
    stock, module = stock_classes(family), module_name(family)
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    return {n: f"{module}.{our_name(c)}" for n, c in zip(names, stock, strict=True)}


def modelling_file(family: str, kinds: Iterable[str]) -> str:
    """Return the source of the modelling file of a family, for the bank kinds that it stores."""
    banks = [f"{_BANKS}.{kind}" for kind in sorted(set(kinds) | {"dense"})]
    order: list[str] = []
    for module in [*banks, _ROOT]:
        _follow(module, order)
    found = [m.rpartition(".")[2] for m in order if _is_form(m)]
    parts = [*map(_section, order), _table(found), _classes(family)]
    _check_names(parts)
    return "\n\n\n".join([_HEAD.format(family=family), *parts])


_HEAD = '''"""Compressed `{family}` models: the stock model, and the stored form of its experts.

Written by rerail, and put together from its files; it needs torch and transformers only.
"""

from types import SimpleNamespace
from typing import Any'''


def _is_form(module: str) -> bool:
    return module.startswith(f"{_BANKS}.") and module != _BASE


def _path(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def _internal(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rerail."):
            yield node
        if isinstance(node, ast.Import) and node.names[0].name.startswith("rerail."):
            yield node


def _follow(module: str, order: list[str]) -> None:
    """Append a module after everything that it imports from rerail."""
    path = _path(module)
    if module in order or module in _FOR_TYPES or path.name == "__init__.py":
        return
    for node in _internal(ast.parse(path.read_text(encoding="utf-8"))):
        for name in [node.module] if isinstance(node, ast.ImportFrom) else []:
            _follow(str(name), order)
    order.append(module)


def _section(module: str) -> str:
    """Return a file without its internal imports; a bank file as a function of its names."""
    text = _path(module).read_text(encoding="utf-8")
    tree = ast.parse(text)
    cuts: dict[tuple[int, int], str] = {}
    for node in _internal(tree):
        cuts[node.lineno, node.end_lineno or node.lineno] = _instead(node)
    for part in tree.body:
        if isinstance(part, ast.FunctionDef) and part.name in _REPLACED:
            cuts[part.lineno, part.end_lineno or part.lineno] = ""
    lines = text.splitlines()
    for (first, last), new in sorted(cuts.items(), reverse=True):
        lines[first - 1 : last] = [new] if new else []
    source = "\n".join(lines).strip()
    title = f"# {'-' * 8} {module}"
    if not _is_form(module):
        return f"{title}\n\n{source}"
    name = _maker(module.rpartition(".")[2])
    body = textwrap.indent(source, "    ")
    return f"{title}\n\n\ndef {name}():\n{body}\n\n    return SimpleNamespace(**locals())"


def _instead(node: ast.Import | ast.ImportFrom) -> str:
    """Return what stands where names were imported from a file that is now the same one."""
    indent = " " * node.col_offset
    lines = []
    if isinstance(node, ast.ImportFrom):
        module = str(node.module)
        bank = _is_form(module)
        prefix = f"{_maker(module.rpartition('.')[2])}()." if bank else ""
        for alias in node.names:
            here = alias.asname or alias.name
            there = "Any" if module in _FOR_TYPES else f"{prefix}{alias.name}"
            if here != there:
                lines.append(f"{indent}{here} = {there}")
    if not lines and indent:
        lines = [f"{indent}pass"]
    return "\n".join(lines)


def _maker(kind: str) -> str:
    return f"_{kind}_form"


def _check_names(parts: list[str]) -> None:
    """Check that no two files define the same name, which would take the other's place."""
    owner: dict[str, int] = {}
    for number, part in enumerate(parts):
        for name in _defined(ast.parse(part)):
            if owner.setdefault(name, number) != number:
                raise RuntimeError(f"two files of a remote export define {name!r}; rename one")


def _defined(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        targets: list[Any] = getattr(node, "targets", None) or [getattr(node, "target", None)]
        yield from (t.id for t in targets if isinstance(t, ast.Name))


def _table(kinds: list[str]) -> str:
    rows = "\n".join(f'    "{kind}": {_maker(kind)}().Bank,' for kind in kinds)
    return (
        f"# {'-' * 8} the stored forms\n\nBANKS = {{\n{rows}\n}}\n\n\n"
        'def bank_class(kind):\n    """Return the class of a stored form."""\n'
        "    return BANKS[kind]"
    )


def _classes(family: str) -> str:
    stock: Classes = stock_classes(family)
    imports = "\n".join(f"from {c.__module__} import {c.__name__}" for c in stock)
    config = our_name(stock.config)
    models = "\n\n\n".join(
        f"class {our_name(c)}(Compressed, {c.__name__}):\n"
        f'    """The stored form, on {c.__name__}."""\n\n    config_class = {config}'
        for c in stock[1:]
    )
    return (
        f"# {'-' * 8} the family\n\n{imports}\n\n\n"
        f"class {config}({stock.config.__name__}):\n"
        f'    """The family\'s config; `rerail` says what each layer stores."""\n\n'
        f'    model_type = "{PREFIX}{family}"\n\n\n{models}\n'
    )
