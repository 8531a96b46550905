"""Benchmark tasks that read files of `$RERAIL_DATA/eval` in the place of the hub."""

import difflib
import json
import lzma
import os
from pathlib import Path
from typing import Any

import yaml

from rerail.errors import InputError
from rerail.files import cache_dir, digest, file_digest

FOLDER = Path(__file__).parent / "tasks"


def local_names() -> list[str]:
    """Return the names of the tasks that read local files."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def local_config(name: str) -> dict[str, Any]:
    """Return the task yaml of a local task with absolute paths filled in.

    Raises:
        InputError: `RERAIL_DATA` is unset or no folder.
    """
    from lm_eval import tasks

    config = _config(name)
    config["include"] = str(Path(str(tasks.__file__)).parent / config["include"])
    files = config["dataset_kwargs"]["data_files"]
    config["dataset_kwargs"] = {
        "data_files": {split: str(_folder() / file) for split, file in files.items()},
        "cache_dir": str(cache_dir() / "datasets"),
    }
    return config


def local_fingerprint(name: str) -> str:
    """Return a hash of a local task: its settings and the content of its files."""
    config = _config(name)
    return digest([config, [file_digest(path) for path in _files_of(config)]])


def check_local(name: str) -> None:
    """Check that a local task exists and that its files can be read.

    Raises:
        InputError: an unknown task, `RERAIL_DATA` unset, a file that is missing or damaged.
    """
    check_known(name, local_names())
    for path in _files_of(_config(name)):
        if not path.is_file():
            raise InputError(
                f"task {name} needs {path}, which does not exist; add it to RERAIL_DATA"
            )
        try:
            # one line is enough: a file of another kind fails at its first bytes
            with lzma.open(path, "rt", encoding="utf-8") as handle:
                json.loads(handle.readline())
        except (OSError, ValueError, EOFError, lzma.LZMAError) as error:
            raise InputError(
                f"task {name} cannot read {path} ({error}); "
                "it must be xz-compressed JSON lines in UTF-8"
            ) from error


def check_known(name: str, known: list[str]) -> None:
    """Check that a task exists.

    Raises:
        InputError: it is not among `known`; the sentence names the nearest.
    """
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=5)
    hint = f"the nearest are {', '.join(near)}; " if near else ""
    raise InputError(
        f"task {name} is unknown; {hint}local tasks are {', '.join(local_names())}, "
        "and any task of lm-eval can be named (list: lm-eval ls tasks)"
    )


def _config(name: str) -> dict[str, Any]:
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    config: dict[str, Any] = yaml.safe_load(text)
    return config


def _files_of(config: dict[str, Any]) -> list[Path]:
    return [_folder() / file for file in config["dataset_kwargs"]["data_files"].values()]


def _folder() -> Path:
    data = os.environ.get("RERAIL_DATA")
    if not data:
        raise InputError(
            "RERAIL_DATA is not set, but local tasks read $RERAIL_DATA/eval; "
            "set it to the data folder"
        )
    folder = Path(data).expanduser().resolve() / "eval"
    if not folder.is_dir():
        raise InputError(f"RERAIL_DATA={data} has no folder eval; set it to the data folder")
    return folder
