"""The journal of what was shown: a line that was cut off is as if it had never been begun."""

import os
from pathlib import Path

import pytest

from rerail.errors import InputError
from rerail.tracking.journal import Journal
from rerail.tracking.wandb import WandbMirror


def test_it_reads_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "records.jsonl"
    journal = Journal(path)
    journal.add("b", {"x": 0.1 + 0.2})
    journal.add("a", {"y": None})
    again = Journal(path)
    assert list(again.records.items()) == [("b", {"x": 0.1 + 0.2}), ("a", {"y": None})]
    assert not again.closed
    again.close()
    assert Journal(path).closed


@pytest.mark.parametrize(
    "torn",
    [
        *('{"name": "b", "rec', '{"name": "b", "record": {}}', "[1]\n", "\0"),
        *("[" * 100_000 + "\n", '{"name": "b", "record": 3}\n'),
    ],
)
def test_a_torn_last_line_is_dropped_and_the_next_one_is_whole(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "records.jsonl"
    Journal(path).add("a", {})
    with path.open("a") as out:
        out.write(torn)
    journal = Journal(path)
    assert list(journal.records) == ["a"]
    journal.add("b", {"x": 1})
    assert Journal(path).records == {"a": {}, "b": {"x": 1}}


@pytest.mark.parametrize("made", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_regular_file_is_a_sentence_and_no_end_of_a_cell(tmp_path, made, caplog):
    path = tmp_path / "wandb" / "records.jsonl"
    path.parent.mkdir()
    made(path)
    with pytest.raises(InputError, match="is no regular file"):
        Journal(path)
    live = WandbMirror(mode="offline").open("key", None, {}, tmp_path)
    live.close("done")
    assert "nothing else is lost" in caplog.text


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    journal = Journal(tmp_path / "file" / "records.jsonl")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="cannot be written"):
        journal.add("a", {})
