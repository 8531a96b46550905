"""`rerail-report`: a page of what is there, and one sentence where nothing is."""

import json
from pathlib import Path

import pytest

from rerail.cli.report import main
from rerail.files import write_json
from rerail.run.results import write_rows
from result_rows import cell, demo_rows


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """Return a folder with two sound cells, and five things that are none."""
    out = tmp_path / "outputs"
    write_rows(out / "one", cell())
    write_rows(out / "two", cell("tiny_coarse"))
    (out / "half").mkdir()
    (out / "half" / "result.json").write_text('[{"key": "a", "sta', encoding="utf-8")
    (out / "foreign").mkdir()
    (out / "foreign" / "result.json").write_text('{"accuracy": 0.9}', encoding="utf-8")
    old = [{name: value for name, value in row.items() if name != "bits"} for row in cell()]
    write_json(out / "old" / "result.json", old)
    write_json(out / "new" / "result.json", [{**row, "colour": "red"} for row in cell()])
    write_json(out / "begun" / "status.json", {"state": "running", "stage": "repair"})
    return out


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_page_is_written_beside_the_rows_or_where_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "outputs" / "one", demo_rows())
    main([str(tmp_path / "outputs")])
    page = tmp_path / "outputs" / "report.html"
    assert "6 cells: 6 done." in page.read_text(encoding="utf-8")
    assert capsys.readouterr().out == f"report: {page}\n"
    other = tmp_path / "new" / "page.html"
    main([str(tmp_path / "outputs" / "one" / "result.json"), "--out", str(other)])
    main([str(tmp_path / "outputs"), "--out", str(other), "--title", "What came out"])
    assert "<h1>What came out</h1>" in other.read_text(encoding="utf-8")


def test_what_cannot_be_read_is_said_left_alone_and_the_rest_is_shown(
    outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = bytes_of(outputs)
    page = tmp_path / "page.html"
    main([str(outputs), "--out", str(page)])
    message = capsys.readouterr().err
    content = page.read_text(encoding="utf-8")
    for name, why in (
        ("half/result.json", "cannot be read (Unterminated string"),
        ("foreign/result.json", "not a list of result rows"),
        ("old/result.json", "missing columns ['bits']"),
        ("new/result.json", "unknown columns ['colour']"),
        ("begun", "has no rows yet; its status is: running repair"),
    ):
        (line,) = [item for item in message.splitlines() if f"{outputs}/{name} " in item]
        assert why in line
        assert f">{name} " in content
    assert str(outputs) not in content
    assert "2 cells: 2 done." in content
    assert bytes_of(outputs) == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["{0}/nowhere"], "does not exist; give a result.json or a folder that holds one"),
        (["{0}/empty"], "has no result rows (it holds nothing)"),
        (["{0}/bad"], "has no result rows (it holds a.txt, result.json); 1 could not be read"),
        (["{0}/bad/result.json"], "is not a list of result rows"),
        (["{0}/good", "--columns", "nll,nul"], "column nul does not exist; allowed: key, status"),
        (["{0}/good", "--columns", "curve"], "column curve does not exist; allowed: key"),
        (["{0}/good", "--out", "{0}"], "is a folder; give the name of a file"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_status_2(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.txt").write_text("a", encoding="utf-8")
    (tmp_path / "bad" / "result.json").write_text(json.dumps("a"), encoding="utf-8")
    write_rows(tmp_path / "good", cell())
    with pytest.raises(SystemExit) as ended:
        main([word.format(tmp_path) for word in words])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("rerail-report: ")
    assert message.count("\n") == 1
    assert sentence in message
    assert not list(tmp_path.rglob("*.html"))


def test_columns_are_added_to_the_overview(tmp_path: Path) -> None:
    write_rows(tmp_path, cell())
    main([str(tmp_path), "--columns", "agreement, host"])
    assert ">agreement</th>" in (tmp_path / "report.html").read_text(encoding="utf-8")
