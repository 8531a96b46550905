"""The journal of what was shown: a line that was cut off is as if it had never been begun."""

from pathlib import Path

import pytest

from rerail.tracking.journal import Journal


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
    "torn", ['{"name": "b", "rec', '{"name": "b", "record": {}}', "[1]\n", "\0"]
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
