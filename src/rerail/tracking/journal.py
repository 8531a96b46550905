"""What was shown of a cell, line by line, so that it can be shown again and nothing twice."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rerail.files import append_line, read_text, whole_file


class Journal:
    """Named records in the order in which they came; one JSON line each.

    Lines are only ever added, each in one write, so that a killed process leaves at most a last
    line that was cut off; that one is dropped when the journal is opened again.

    Raises:
        InputError: the file cannot be read, or is no regular file.

    Attributes:
        records: name -> record, in order.
        closed: whether the cell was shown to its end.
    """

    def __init__(self, path: Path):
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        self.closed = False
        text = read_text(path) if os.path.lexists(path) else ""
        whole = ""
        for line in text.splitlines(keepends=True):
            if not self._take(line):
                break
            whole += line
        if whole != text:
            with whole_file(path) as temporary:
                temporary.write_text(whole, encoding="utf-8")

    def _take(self, line: str) -> bool:
        """Take in what a line says; False where it is not a whole one."""
        try:
            entry: Any = json.loads(line) if line.endswith("\n") else None
            self.closed = "closed" in entry
            if not self.closed:
                self.records[str(entry["name"])] = dict(entry["record"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return False
        return True

    def add(self, name: str, record: Mapping[str, Any]) -> None:
        """Write a record down; its name must be new."""
        self._write({"name": name, "record": record})
        self.records[name] = dict(record)

    def close(self) -> None:
        """Note that the cell was shown to its end."""
        self._write({"closed": True})
        self.closed = True

    def _write(self, entry: Mapping[str, Any]) -> None:
        append_line(self.path, json.dumps(entry))
