"""The summary in a terminal and in a pipe."""

import io
import re

import pytest
from rich.console import Console

from rerail.report.terminal import print_summary
from result_rows import Row, cell, demo_rows, failed_cell


def printed(rows: list[Row], capsys: pytest.CaptureFixture[str]) -> str:
    print_summary(rows)
    return capsys.readouterr().out


def test_the_table_has_a_line_a_cell_with_all_its_numbers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = printed(demo_rows(), capsys)
    (line,) = [x for x in out.splitlines() if re.match(r"tiny_fine +reap", x)]
    for number in (
        *("0.5", "15.60 → 9.80", "3.520 ± 0.031", "4.330 ± 0.031", "3.876 ± 0.031"),
        *("0.891 → 0.392", "56 % ± 3", "59"),
    ):
        assert f" {number}" in line
    assert "33.78" in out
    assert "75.94" in out
    assert "48.25" in out
    assert len(re.findall(r"^tiny_\w+ +(reap|hc_smoe|mobe) ", out, flags=re.M)) == 6


def test_a_pipe_gets_plain_lines_of_at_most_160_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    out = printed([*demo_rows(), failed_cell()], capsys)
    assert "\x1b" not in out
    table = [line for line in out.splitlines() if re.match(r"model|tiny_\w+  ", line)]
    assert max(map(len, table)) <= 160
    assert "KL to teacher" in table[0]


def test_a_terminal_gets_colours() -> None:
    out = io.StringIO()
    print_summary(demo_rows(), Console(file=out, force_terminal=True, width=160))
    assert "\x1b[" in out.getvalue()


def test_a_narrow_terminal_keeps_every_number() -> None:
    out = io.StringIO()
    print_summary(cell(), Console(file=out, width=80))
    for number in ("3.520", "4.330", "3.876", "0.891", "0.392", "56", "router"):
        assert (number in out.getvalue()) == (number != "router")


def test_one_line_compares_fine_and_coarse(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(demo_rows(), capsys)
    (line,) = [x for x in out.splitlines() if x.startswith("recovery fine vs coarse: ")]
    assert "reap 56 % ± 3 vs 18 % ± 3" in line
    assert "recovery fine vs coarse" not in printed(cell(), capsys)


def test_one_cell_of_each_model_is_continued(capsys: pytest.CaptureFixture[str]) -> None:
    rows = demo_rows()
    for row in rows:
        row["samples_text"] = f" [bold]{row['model']}[/] said\n  nothing in {row['stage']}."
    out = printed(rows, capsys)
    assert out.count("The Congress of the United States") == 2
    for model in ("tiny_fine", "tiny_coarse"):
        for stage in ("teacher", "compressed", "repaired"):
            assert f"  {stage:<11}... [bold]{model}[/] said nothing in {stage}." in out


def test_a_cell_that_is_not_done_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        failed_cell(reason="ValueError: [red]one\ntwo[/]"),
        failed_cell("not_applicable", key="b", compressor="mobe", reason="out of reach"),
    ]
    lines = printed(rows, capsys).splitlines()
    assert lines == [
        "not applicable: tiny_fine, mobe, ratio 0.9: out of reach",
        "failed: tiny_fine, reap, ratio 0.9: ValueError: [red]one two[/]",
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (cell(recovery=None), "gap under two standard errors"),
        (cell()[:2], "no repair"),
        (cell()[:1], "3.520 ± 0.031"),
        ([*cell(), *cell(method="mobe", heldout="other")], "cannot be compared"),
        ([*cell(seed=0), *cell(seed=1)], "seed"),
        ([*cell(samples=16), *cell(samples=64)], "samples"),
    ],
)
def test_what_is_special_is_said(
    rows: list[Row], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in printed(rows, capsys)
    assert message == "3.520 ± 0.031" or message not in printed(cell(), capsys)


def test_no_rows_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed([], capsys) == ""
