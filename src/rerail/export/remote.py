"""One self-contained modelling file, assembled from the very files that rerail itself runs.

A folder with this file and the `auto_map` of its config loads wherever torch and transformers are,
with `trust_remote_code=True`. Internal imports are taken out, and the files follow one another in
the order in which they need each other, so no two of them may define the same name.
"""

import ast
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rerail.experts.base import bank_class
from rerail.export.classes import PREFIX, Classes, our_name, stock_classes

_ROOT = "rerail.export.structure"
# finds a bank by its file, which a self-contained module has not
_REPLACED = {"bank_class"}


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
    banks = {kind: bank_class(kind) for kind in sorted(set(kinds) | {"dense"})}
    order: list[str] = []
    for module in [*(bank.__module__ for bank in banks.values()), _ROOT]:
        _follow(module, order)
    table = _table({kind: bank.__name__ for kind, bank in banks.items()})
    parts = [*map(_section, order), table, _classes(family)]
    _check_names(parts)
    return "\n\n\n".join([_HEAD.format(family=family), *parts])


_HEAD = '''"""Compressed `{family}` models: the stock model, and the stored form of its experts.

Written by rerail, and put together from its files; it needs torch and transformers only.
"""'''


def _path(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def _internal_imports(tree: ast.Module) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rerail."):
            yield node
        if isinstance(node, ast.Import) and node.names[0].name.startswith("rerail."):
            yield node


def _follow(module: str, order: list[str]) -> None:
    """Append a module after everything that it imports from rerail."""
    if module in order:
        return
    for node in _internal_imports(ast.parse(_path(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not any(alias.asname for alias in node.names), "a name must stay what it is"
            _follow(str(node.module), order)
    order.append(module)


def _section(module: str) -> str:
    """Return a file without its internal imports: what they name stands above it."""
    text = _path(module).read_text(encoding="utf-8")
    tree = ast.parse(text)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    cut = [*_internal_imports(tree), *(node for node in functions if node.name in _REPLACED)]
    lines = text.splitlines()
    for node in sorted(cut, key=lambda node: node.lineno, reverse=True):
        del lines[node.lineno - 1 : node.end_lineno]
    source = "\n".join(lines).strip()
    return f"# {'-' * 8} {module}\n\n{source}"


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


def _table(banks: dict[str, str]) -> str:
    rows = "\n".join(f'    "{kind}": {name},' for kind, name in banks.items())
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
