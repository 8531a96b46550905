"""Rows of results: what is refused, and that files read back as they were written."""

import csv
import functools
import json
import logging
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest

from rerail.errors import InputError
from rerail.files import LARGEST
from rerail.run.results import (
    COLUMNS,
    choices_key,
    gather,
    new_row,
    read_rows,
    rows_of,
    validate_row,
    write_csv,
    write_rows,
)
from rerail.tracking.csv import CsvMirror
from result_rows import cell, demo_rows, failed_cell


def test_rows_read_back_equal_and_in_path_order(tmp_path: Path) -> None:
    first, second = cell(), [*cell("tiny_coarse"), failed_cell()]
    write_rows(tmp_path / "b" / "deep", second)
    write_rows(tmp_path / "a", first)
    write_rows(tmp_path / ".half", first)
    assert read_rows(tmp_path) == first + second
    assert read_rows(tmp_path, recursive=False) == []
    assert read_rows(tmp_path / "a" / "result.json") == first
    assert list(read_rows(tmp_path)[0]) == list(COLUMNS)


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"nlll": 1.0}, "unknown columns ['nlll']"),
        (
            {"status": "finished"},
            "status='finished': input should be 'done', 'failed' or 'not_applicable'",
        ),
        (
            {"stage": "pupil"},
            "stage='pupil': input should be 'teacher', 'compressed' or 'repaired'",
        ),
        ({"nll": "3.5"}, "nll='3.5': input should be a valid number"),
        ({"nll": True}, "nll=True: input should be a valid number"),
        ({"nll": math.nan}, "nll=nan: input should be a finite number"),
        ({"nll_se": -1.0}, "nll_se=-1.0: input should be greater than or equal to 0"),
        ({"tokens": 1.5}, "tokens=1.5: input should be a valid integer"),
        ({"tasks": {"task": "blimp"}}, "tasks={'task': 'blimp'}: input should be a valid list"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(known: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        new_row(**known)


def test_a_missing_column_is_refused() -> None:
    row = dict(new_row())
    del row["tasks"]
    with pytest.raises(ValueError, match=r"missing columns \['tasks'\]"):
        validate_row(row)


def test_numbers_of_numpy_become_plain_and_nested_ones_that_are_not_finite_become_none() -> None:
    row = new_row(
        nll=np.float32(0.5),
        tokens=np.int64(7),
        ratio=1,
        layers=({"layer": np.int16(0), "load_entropy": math.inf},),
        choices={"path": Path("a"), 1: [np.float64(2.5)]},
    )
    assert json.dumps([row[n] for n in ("nll", "tokens", "ratio", "layers", "choices")]) == (
        '[0.5, 7, 1.0, [{"layer": 0, "load_entropy": null}], {"path": "a", "1": [2.5]}]'
    )


def test_the_key_ignores_order_and_the_way_the_choices_were_typed() -> None:
    item = {"seed": 0, "ratio": {"removed": 0.5, "counts": "experts"}, "command": "rerail"}
    other = {"ratio": {"counts": "experts", "removed": 0.5}, "command": "rerail -m", "seed": 0}
    assert choices_key(item) == choices_key(other)
    assert choices_key(item) != choices_key({**item, "seed": 1})


def test_csv_reads_back_equal(tmp_path: Path) -> None:
    rows = [*demo_rows(), failed_cell(reason='two\nlines, "quoted"')]
    rows[0] = new_row(**{**rows[0], "nll": 0.1 + 0.2, "choices": {"a": {"b": [1, "x"]}, "c": None}})
    CsvMirror().open("key", None, {}, tmp_path).close("done", rows)
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as handle:
        actual = list(csv.DictReader(handle))
    assert len(actual) == len(rows)
    for row, text in zip(rows, actual, strict=True):
        for name, column in COLUMNS.items():
            if column.kind in (dict, list):
                assert name not in text
            else:
                read = None if text[name] == "" else column.kind(text[name])
                assert read == row[name], name
    assert json.loads(actual[0]["choices.a.b"]) == [1, "x"]
    assert actual[0]["choices.c"] == ""
    assert actual[1]["choices.calibration.samples"] == "256"


def as_json(**known: object) -> str:
    return json.dumps([{**new_row(), **known}])


DAMAGED = {
    "half": '[{"key": "a"',
    "foreign": '{"accuracy": 0.5}',
    "a number": "3",
    "older": json.dumps([{n: v for n, v in new_row().items() if n != "heldout"}]),
    "newer": json.dumps([{**new_row(), "mood": "good"}]),
    "not text": b"\xff\xfe",
    "deeper than the parser goes": "[" * 100_000,
    "deep": as_json(choices=functools.reduce(lambda inner, _: {"a": inner}, range(100), {})),
    "long": as_json(seed=0).replace('"seed": 0', f'"seed": {"9" * 5000}'),
    "a number like no other": as_json(tokens=0).replace('"tokens": 0', f'"tokens": {"9" * 400}'),
    "half a character": as_json(choices={"a": "b"}).replace('"b"', '"\\ud800"'),
    "no mapping of texts": as_json(nll_by={"docs": 3.5}),
    "no layer": as_json(layers=[{"load_entropy": 0.5}]),
    "a curve of words": as_json(curve=[{"step": "one", "train_kl": None, "val_kl": None}]),
    "a score of nothing": as_json(tasks=[{"metric": "acc"}]),
    "no choices of a model": as_json(choices={"model": "tiny"}),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_reported_left_alone_and_the_others_are_read(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    content = DAMAGED[name]
    bad = tmp_path / "bad" / "result.json"
    bad.parent.mkdir()
    bad.write_bytes(content if isinstance(content, bytes) else content.encode())
    write_rows(tmp_path / "good", cell())
    with pytest.raises(
        InputError, match=r"result\.json (is not a list of result rows|cannot be read)"
    ):
        read_rows(bad)
    before = bad.read_bytes()
    with caplog.at_level(logging.WARNING):
        assert read_rows(tmp_path) == cell()
    assert str(bad) in caplog.text
    assert bad.read_bytes() == before


def test_a_field_that_does_not_fit_names_its_file_row_value_and_what_is_allowed(
    tmp_path: Path,
) -> None:
    rows = [*cell()[:1], {**cell()[1], "nll": "low"}]
    path = tmp_path / "result.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    why = "row 1: nll='low': input should be a valid number"
    message = f"{path} is not a list of result rows ({why})"
    with pytest.raises(InputError, match=re.escape(message)):
        read_rows(path)


def test_a_row_is_its_columns_by_name_and_as_fields() -> None:
    row = new_row(nll=1.5, stage="teacher")
    assert (row.nll, row["nll"], row.get("kl")) == (1.5, 1.5, None)
    assert {**row} == row == new_row(**row)
    assert list(row) == list(COLUMNS)
    assert "validate" not in row
    with pytest.raises(KeyError):
        row["choice"]


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere does not exist"):
        read_rows(tmp_path / "nowhere")


def test_nothing_is_written_when_a_row_is_wrong(tmp_path: Path) -> None:
    wrong = [*cell(), {"key": "a"}]
    for write in (
        lambda: write_rows(tmp_path, wrong),
        lambda: write_csv(tmp_path / "a.csv", wrong),
    ):
        with pytest.raises(ValueError, match="missing columns"):
            write()
    assert list(tmp_path.iterdir()) == []


SPECIAL = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a link that leads nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "larger than is read": lambda path: (path.touch(), os.truncate(path, LARGEST + 1)),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_what_is_no_file_under_the_name_of_one_is_reported_and_the_others_are_read(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "bad").mkdir()
    SPECIAL[name](tmp_path / "bad" / "result.json")
    write_rows(tmp_path / "good", cell())
    rows, problems = gather(tmp_path)
    assert rows == cell()
    assert [str(tmp_path / "bad" / "result.json") in problem for problem in problems] == [True]
    with pytest.raises(InputError, match="bad/result"):
        rows_of(tmp_path / "bad" / "result.json")


def test_a_long_value_is_shortened_in_the_sentence_about_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"key=.*\.\.\.: input") as caught:
        new_row(key=["x" * 10_000])
    assert len(str(caught.value)) < 400


FORMULAS = ("=1+1", "+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", " =1", "\uff1d1")


def test_no_field_of_the_table_is_a_formula_or_acts_on_a_terminal(tmp_path: Path) -> None:
    rows = [new_row(reason=text, nll=-0.5, choices={"\x1b[2Ja": text}) for text in FORMULAS]
    rows.append(new_row(reason="red \x1b[31m and \u202eback", choices={"list": ["=1"]}))
    with write_csv(tmp_path / "a.csv", rows).open(newline="", encoding="utf-8") as handle:
        *fields, last = csv.DictReader(handle)
    for field in fields:
        assert field["reason"].startswith("'")
        assert field["choices.\ufffd[2Ja"] == field["reason"]
        assert field["nll"] == "-0.5"
    assert last["reason"] == "red \ufffd[31m and \ufffdback"
    assert last["choices.list"] == '["=1"]'
