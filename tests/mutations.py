"""Files as a careless or a hostile hand leaves them: systematic changes of JSON, and of weights."""

import copy
import json
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rerail.errors import InputError
from rerail.moe.source import ModelSource

PATIENCE = 60  # seconds


class TooLong(BaseException):
    """Nothing may take this long, and nothing may swallow it."""


def wrong_values(value: Any) -> Iterator[tuple[str, Any]]:
    """Values in the place of another: of all other types, and out of all bounds."""
    yield from (("null", None), ("a word", "abc"), ("a list", [1]), ("a mapping", {"a": 1}))
    yield from (("true", True), ("negative", -1), ("a half", 1.5), ("huge", 10**15))
    if isinstance(value, int) and not isinstance(value, bool):
        yield from (("zero", 0), ("one more", value + 1), ("text", str(value)), ("vast", 10**4000))
    if isinstance(value, list):
        yield from (("empty", []), ("longer", [*value, *value[-1:]]), ("shorter", value[:-1]))
        yield from (("vast inside", [10**15] * len(value)), ("negative inside", [-1] * len(value)))
        yield from (("words inside", ["abc"] * len(value)), ("null inside", [None] * len(value)))
    if isinstance(value, dict):
        yield from (("empty", {}), ("another key", {**value, "abc": 1}))
    if isinstance(value, str):
        yield from (("empty", ""), ("a path", "../../etc/passwd"), ("dotted", "os.system"))


def leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of a JSON file, containers included; of a list its first and last item."""
    if path:
        yield path
    keys: list[Any] = list(node) if isinstance(node, dict) else []
    if isinstance(node, list):
        keys = sorted({0, len(node) - 1}) if node else []
    for key in keys:
        yield from leaves(node[key], (*path, key))


def changed(content: Any, path: tuple[Any, ...], value: Any, *, drop: bool = False) -> Any:
    """A copy with one value replaced, or removed."""
    made = copy.deepcopy(content)
    owner = made
    for key in path[:-1]:
        owner = owner[key]
    if drop:
        del owner[path[-1]]
    else:
        owner[path[-1]] = value
    return made


def json_changes(
    content: Any, below: tuple[Any, ...] = ()
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The name of every change of every place of a JSON file (below one), and what makes it."""
    for path in leaves(content):
        if path[: len(below)] != below:
            continue
        value = content
        for key in path:
            value = value[key]
        place = ".".join(map(str, path))
        yield f"{place}: missing", partial(changed, content, path, None, drop=True)
        for name, wrong in wrong_values(value):
            if type(wrong) is not type(value) or wrong != value:
                yield f"{place}: {name}", partial(changed, content, path, wrong)


def what_comes_of(folder: Path, ids: torch.Tensor) -> torch.Tensor | str:
    """Read a checkpoint as a cell does: its logits, or the sentence for which it is refused."""
    source = ModelSource(str(folder))
    try:
        source.meta()
        source.tokenizer()
        source.fingerprint()
        source.itemsize()
        model = source.load()
        with torch.no_grad():
            return model.model(input_ids=ids, use_cache=False).logits
    except InputError as error:
        return str(error)


def verdict(folder: Path, ids: torch.Tensor, expected: torch.Tensor) -> str:
    """`refused`, `same`, `other numbers`, or what escaped."""

    def stop(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(PATIENCE)
    try:
        made = what_comes_of(folder, ids)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"escaped: {type(error).__name__}: {str(error)[:120]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    if isinstance(made, str):
        return "refused" if made and len(made) < 2000 else "escaped: no sentence"
    same = made.shape == expected.shape and torch.allclose(made, expected, atol=1e-5)
    return "same" if same else "other numbers"


def rewritten(path: Path, content: Any) -> None:
    """Write JSON that Python itself would not, such as numbers of 4,000 digits."""
    text = json.dumps(content, default=str) if not isinstance(content, str) else content
    path.write_text(text, encoding="utf-8")
