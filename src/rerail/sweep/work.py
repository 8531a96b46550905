"""What a sweep needs from the rooms that know models; the command line hands it over."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig


class Described(Protocol):
    """A cell on the submitting side.

    Attributes:
        held: what `Work.run` needs, as plain data without secrets: resolved config, names, command.
        out: the folder of all cells, absolute.
        folder: of this cell, a name below `out`.
        key: hash of its choices.
        state: `open`, `done`, or why it cannot run: `failed` or `not_applicable`.
        reason: a sentence where it cannot run.
    """

    @property
    def held(self) -> Mapping[str, Any]: ...
    @property
    def out(self) -> str: ...
    @property
    def folder(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def reason(self) -> str: ...


class Work(Protocol):
    """Functions of one module, so that a job can import them by name."""

    def describe(self, config: DictConfig) -> Described:
        """Resolve and check a cell; one that cannot run is recorded in its folder."""

    def run(self, held: Mapping[str, Any]) -> tuple[str, str]:
        """Run or finish a cell; its state (done, failed or not_applicable) and the reason."""

    def complain(self, sentence: str) -> None:
        """Tell the user what is wrong."""

    def record(self, out: Path | None, failed: bool) -> None:
        """Note what the exit status and the summary say at the end."""

    def revision(self) -> str | None:
        """Return the git revision of the code, None outside git."""
