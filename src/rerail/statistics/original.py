"""Statistics that stay those of the original model while a sequential driver measures anew."""

from dataclasses import dataclass

from rerail.statistics.rows import Rows


@dataclass(frozen=True)
class OriginalRows(Rows):
    """`Rows` of the original model: the same tokens, before anything was compressed."""

    @property
    def name(self) -> str:
        """`original_rows_<count>`."""
        return f"original_rows_{self.count}"
