"""Which classes a configuration may name: those of this package, and of packages that are trusted.

A yaml file of somebody else must not run code. So a class is looked up only in packages that are
allowed, its name is checked before anything is imported, and it must be what its place asks for.
No file can add a package: `trust=PACKAGE` counts on the command line, `RERAIL_TRUST` in the shell.
"""

import importlib
import inspect
import os
import re
from collections.abc import Iterable
from typing import Any, get_args, get_origin

from rerail.errors import InputError

VARIABLE = "RERAIL_TRUST"  # packages with commas between; a job takes it over from its submitter
PACKAGE = __name__.partition(".")[0]

# What each group must name; the annotations of `run.cell.Cell`, as names: they load torch.
BASES = {
    "model": ("rerail.moe.source.ModelSource",),
    "compressor": ("rerail.compress.base.Compressor",),
    "ratio": ("rerail.plan.budget.Ratio", "rerail.plan.budget.Bits"),
    "skip": ("rerail.plan.budget.Skip",),
    "allocation": ("rerail.plan.allocation.Allocation",),
    "calibration": ("rerail.text.calibration.Calibration",),
    "distill": ("rerail.distill.settings.RouterKD", "rerail.distill.settings.Ridge"),
    "evaluation": ("rerail.run.evaluation.Evaluation",),
    "export": ("rerail.run.cell.Export",),
    "logger": ("rerail.run.mirror.Mirror",),
}

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
# as it was when the process began: Hydra sets variables that a file names
_trusted = [name for name in os.environ.get(VARIABLE, "").split(",") if name]


def trust(packages: Iterable[str]) -> None:
    """Let configurations name classes of these packages, in this process and those it starts.

    Raises:
        InputError: it is not the name of a package.
    """
    for name in packages:
        if not _DOTTED.fullmatch(name):
            raise InputError(f"trust={name!r} is not the name of a package, as in trust=my_plugin")
        if name not in _trusted:
            _trusted.append(name)
    os.environ[VARIABLE] = ",".join(_trusted)


def trusted() -> tuple[str, ...]:
    """Return the packages that were trusted by hand."""
    return tuple(_trusted)


def bases_of(group: str) -> tuple[type, ...]:
    """Return the classes of which a group must name one, or one derived from them."""
    paths = [path.rpartition(".") for path in BASES[group]]
    return tuple(getattr(importlib.import_module(module), name) for module, _, name in paths)


def classes_in(hint: Any) -> tuple[type, ...]:
    """Return the classes anywhere in an annotation: what may stand in its place."""
    if get_origin(hint) is None:
        return (hint,) if inspect.isclass(hint) else ()
    return tuple(made for inner in get_args(hint) for made in classes_in(inner))


def class_of(target: Any, bases: tuple[type, ...], where: str) -> type:
    """Return the class that a `_target_` names.

    Args:
        target: dotted name of the class.
        bases: what it must be or derive from.
        where: the names around it, for the sentence.

    Raises:
        InputError: its package is not trusted (nothing was imported then), it does not exist, or it
            is not what its place asks for.
    """
    asked = f"{where}._target_={target!r}"
    known = isinstance(target, str) and _DOTTED.fullmatch(target)
    if not known or not any(target.startswith(f"{name}.") for name in (PACKAGE, *_trusted)):
        raise InputError(
            f"{asked} is not a class of {', '.join((PACKAGE, *_trusted))}, so nothing of it was "
            "run; where you trust a package, add trust=PACKAGE to the command"
        )
    module, _, name = target.rpartition(".")
    try:
        made = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{asked} does not exist ({error})") from error
    if not (inspect.isclass(made) and bases and issubclass(made, bases)):
        expected = " or ".join(base.__name__ for base in bases) or "no class: a plain value"
        raise InputError(f"{asked} does not fit; {where} takes {expected}")
    return made
