"""How far a step is, for whoever watches the cell."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Protocol, TypeVar

from tqdm import tqdm

from rerail.parallel import is_first

T = TypeVar("T")


class Listener(Protocol):
    """Hears of progress."""

    def progress(self, label: str, done: int, of: int) -> None:
        """Hear that `done` of `of` parts are behind us."""


_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextlib.contextmanager
def reporting_to(listener: Listener) -> Iterator[None]:
    """Report progress inside the block to `listener`."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def report_progress(label: str, done: int, of: int) -> None:
    """Report that `done` of `of` parts are behind us, where somebody listens."""
    if (listener := _listener.get()) is not None:
        listener.progress(label, done, of)


def bar(label: str) -> Callable[[Sequence[T]], Iterable[T]]:
    """Return a wrapper that shows a progress bar over its items, and tells the listener."""

    def over(items: Sequence[T]) -> Iterator[T]:
        how = {"leave": False, "dynamic_ncols": True, "mininterval": 0.5}
        shown = tqdm(items, desc=label, disable=not is_first(), **how)
        for done, item in enumerate(shown):
            report_progress(label, done, len(items))
            yield item

    return over
