"""The tables that stand in the pages of experiments/ are made from rows, and say what rows say."""

import sys
from pathlib import Path

import pytest

from rerail.track.cells import cells_of
from track.result_rows import cell

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
tables = pytest.importorskip("tables")
sys.path.pop(0)


def test_a_cell_is_one_line_with_what_is_stored_lost_and_got_back():
    rows = cell()
    rows[-1] |= {"disk_bytes": 9_870_000, "recovery_se": 0.02}
    [one] = cells_of(rows)
    line = dict(zip(tables.COLUMNS, tables.line(one), strict=True))
    assert line["method"] == "reap"
    assert line["budget"] == "0.5"
    assert line["model"] == "fine"
    assert (line["experts MB"], line["disk MB"], line["active M"]) == ("5.80", "9.87", "1.50")
    assert line["NLL compressed"] == "4.330 ± 0.031"
    assert line["recovery"] == "56 % ± 2"
    assert line["seconds plan + repair"] == "8 + 42"
    assert line["peak MB"] == "1074"


def test_a_cell_that_does_not_apply_keeps_its_reason_and_harm_is_listed():
    rows = cell(recovery=-0.1)
    out = {**rows[0], "key": "other", "status": "not_applicable", "reason": "cannot reach 0.9"}
    out |= {"stage": None, "compressor": "mobe"}
    cells = cells_of([*rows, out])
    table = tables.methods(cells)
    assert "not applicable: cannot reach 0.9" in table
    assert "| reap | 0.5 | fine | +0.0810 |" in tables.harmed(cells)
    assert tables.harmed(cells_of(cell())) == "none"


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({"bits": 2.0}, "2 bits"),
        ({"paradigm": "skipping", "ratio": None}, "rule"),
        ({"paradigm": "skipping", "ratio": 0.25}, "skip 0.25"),
    ],
)
def test_budgets_are_said_in_the_terms_of_their_paradigm(known, said):
    rows = [{**row, **known} for row in cell()]
    [one] = cells_of(rows)
    assert tables.budget(one) == said
