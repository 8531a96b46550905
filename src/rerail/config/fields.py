"""Whether a value fits the annotation of a field, all the way down, and the sentence if not."""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from beartype.door import is_bearable

from rerail.errors import InputError

_LONGEST = 200  # characters of a value in a sentence


class Misfit(NamedTuple):
    """A value that does not fit, what is asked for in its place, and where that is."""

    value: Any
    hint: Any
    where: str


def check_names(names: Iterable[Any], allowed: Sequence[str], where: str) -> None:
    """Raise InputError for a name that is not allowed; it names the nearest and lists all."""
    for name in sorted(set(map(str, names)) - set(allowed)):
        close = difflib.get_close_matches(name, allowed, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        place = f"{where}.{name}" if where else name
        raise InputError(
            f"{place} does not exist; {hint}allowed: {', '.join(allowed) or 'nothing'}"
        )


def check_value(value: Any, hint: Any, where: str) -> None:
    """Check a value against its annotation; an int will do for a float, a bool for neither.

    Raises:
        InputError: it does not fit, at any depth; infinities fit nowhere.
    """
    if (misfit := _misfit(value, hint, where)) is None:
        return
    wrong, asked, place = misfit
    shown = repr(wrong)
    shown = shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."
    several = ""
    if isinstance(wrong, list) and wrong and not _takes(asked, Sequence):
        several = f"; to sweep over several values, use -m and commas: -m {where}=A,B"
    raise InputError(f"{place}={shown} is not {_words(asked, wrong)}{several}")


def _misfit(value: Any, hint: Any, where: str) -> Misfit | None:
    """Return the innermost value that does not fit, or None."""
    wrong = Misfit(value, hint, where)
    if get_origin(hint) in (Union, UnionType):
        tried = [_misfit(value, one, where) for one in get_args(hint)]
        if None in tried:
            return None
        return _first(misfit for misfit in tried if misfit and misfit.where != where) or wrong
    for kind, there in ((Mapping, Mapping), (Sequence, list | tuple)):
        if _is(get_origin(hint), kind):
            inside = _inside(value, get_args(hint), where)
            return _first(_misfit(*each) for each in inside) if isinstance(value, there) else wrong
    return None if _fits(value, hint) else wrong


def _inside(value: Any, hints: Sequence[Any], where: str) -> Iterator[tuple[Any, Any, str]]:
    """Yield what a container holds, what is asked for in its place, and where that is."""
    if isinstance(value, Mapping):
        names, values = hints or (Any, Any)
        for name, item in value.items():
            yield (name, names, f"{where} (a name)")
            yield (item, values, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield (item, hints[0] if hints else Any, f"{where}.{i}")


def _first(misfits: Iterable[Misfit | None]) -> Misfit | None:
    return next((misfit for misfit in misfits if misfit is not None), None)


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value fits an annotation without further ones inside, or a Literal."""
    if hint is float:
        return type(value) in (int, float) and _finite(value)
    if hint in (int, bool, str):
        return type(value) is hint
    if get_origin(hint) is Literal:
        return any(type(value) is type(word) and value == word for word in get_args(hint))
    if hint is Any:
        return not isinstance(value, float) or _finite(value)
    return is_bearable(value, hint)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False


def _is(origin: Any, kind: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, kind)


def _takes(hint: Any, kind: Any) -> bool:
    """Return whether an annotation lets lists (or mappings) stand in its place."""
    if get_origin(hint) in (Union, UnionType):
        return any(_takes(one, kind) for one in get_args(hint))
    return _is(get_origin(hint), kind)


def _words(hint: Any, value: Any = None) -> str:
    """Return an annotation in words; where a number is asked for and given, what it must be."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_words(one, value) for one in inner)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if hint is float and type(value) in (int, float):
        return "a finite number"
    if _is(origin, Sequence):
        return f"a list of {_words(inner[0])}"
    if _is(origin, Mapping):
        return "a mapping of names to values"
    return "null" if hint is NoneType else str(getattr(hint, "__name__", hint))
