"""Folders of cells that have no rows yet."""

import json
from collections.abc import Iterable
from pathlib import Path

from rerail.run.results import RESULT, hidden


def unstarted(folder: Path) -> list[str]:
    """Return a sentence on each cell below a folder that has a status file, but no rows yet."""
    sentences = []
    for file in sorted(folder.rglob("status.json")) if folder.is_dir() else []:
        if (file.parent / RESULT).exists() or hidden(file, folder):
            continue
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
            state = " ".join(str(said[name] or "") for name in ("state", "stage")).strip()
        except (OSError, ValueError, KeyError, TypeError) as error:
            state = f"unreadable ({type(error).__name__})"
        sentences.append(f"{file.parent} has no rows yet; its status is: {state}")
    return sentences


def below(folder: Path, sentences: Iterable[str]) -> list[str]:
    """Return sentences for a page that others will see: files named from `folder` on."""
    return [sentence.replace(f"{folder}/", "") for sentence in sentences]
