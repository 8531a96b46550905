"""What charts show: the front, what lies far off, rows that look alike, and lines."""

import re

import pytest

from rerail.report.chart import Chart
from rerail.report.charts import (
    before_after,
    by_calibration,
    fine_against_coarse,
    forest,
    loss_over,
    pareto,
    recovery_over,
)
from rerail.report.frame import Results
from rerail.report.svg import within
from result_rows import Row, cell


def only(charts: object) -> Chart:
    [chart] = charts
    return chart


def sized(ratio: float, nll: float) -> list[Row]:
    """Return a cell whose size follows the ratio and whose repaired NLL is this."""
    rows = cell(ratio=ratio)
    rows[1]["nll"] = nll + 1
    rows[2]["nll"] = nll
    return rows


def test_the_front_is_what_no_other_point_beats_in_size_and_loss() -> None:
    rows = [*sized(0.75, 4.5), *sized(0.5, 4.0), *sized(0.25, 4.2)]
    results = Results.of(rows)
    chart = only(pareto(results, results.settings))
    best = re.search(r"no other point beats: (.*?)\. ", chart.caption)
    assert best
    assert best[1] == "1 reap r0.75, repaired; 2 reap r0.5, repaired; 3 teacher"
    assert [row[0] for row in chart.rows][:3] == ["teacher", *expected_of("0.25")]
    assert ("reap r0.5, repaired", "9.80 MB", "4.000 ± 0.031") in chart.rows


def expected_of(ratio: str) -> list[str]:
    return [f"reap r{ratio}, {stage}" for stage in ("compressed", "repaired")]


def test_what_lies_far_off_is_a_triangle_at_the_edge_and_whole_in_the_numbers() -> None:
    assert within([3.0, 3.1, 3.2, 3.3, 90.0]) == pytest.approx(3.0 + 2 * (3.3 - 3.0))
    assert within([3.0, 3.1, 3.2]) == float("inf")
    rows = [row for i, nll in enumerate((3.6, 3.7, 3.8, 90.0)) for row in sized(i / 10, nll)]
    for row in rows:
        if row["stage"] == "compressed":
            row["nll"] = 3.9
    results = Results.of(rows)
    chart = only(before_after(results, results.settings))
    assert "A triangle at the edge" in chart.caption
    assert chart.numbers["repaired"][-1] == "90.000 ± 0.031"
    assert chart.drawing.x.end < 6


def test_settings_that_look_alike_have_rows_of_their_own() -> None:
    rows = [*cell(), *cell("tiny_coarse")]
    rows += [
        {**row, "choices": {**row["choices"], "trainer": {"precision": "bf16"}}}
        for row in [*cell(key="a"), *cell("tiny_coarse", key="b")]
    ]
    results = Results.of(rows)
    chart = only(fine_against_coarse(results, results.settings))
    assert chart.drawing.y.rows == ["reap", "reap"]
    assert [row[:3] for row in chart.rows] == [
        ("reap", model, words)
        for _ in range(2)
        for model, words in (("tiny_fine", "56 % ± 3"), ("tiny_coarse", "18 % ± 3"))
    ]


def test_lines_hold_every_value_of_a_budget_in_its_order() -> None:
    rows = [
        row
        for model in ("tiny_fine", "tiny_coarse")
        for ratio, recovery in ((0.75, 0.2), (0.25, None), (0.5, -0.4))
        for row in cell(model, ratio=ratio, recovery=recovery)
    ]
    results = Results.of(rows)
    chart = only(recovery_over("ratio", results, results.settings))
    assert chart.rows[:3] == [
        ("tiny_fine reap", "0.25", "", "", "gap under two standard errors"),
        ("tiny_fine reap", "0.5", "-40 % ± 3", "-47 % to -33 %", "one seed"),
        ("tiny_fine reap", "0.75", "20 % ± 3", "13 % to 27 %", "one seed"),
    ]
    assert len(chart.rows) == 6
    assert "tiny_fine reap at 0.25: gap under two standard errors." in chart.spoken
    fine, coarse = chart.drawing.marks
    assert list(fine.data["x"]) == [0.5, 0.75]
    assert (fine.label, coarse.label) == ("tiny_fine reap", "tiny_coarse reap")
    assert fine.style["color"] != coarse.style["color"]


def test_a_skipper_stands_where_it_computes_experts_and_not_where_it_was_asked_to() -> None:
    rows = [
        {**row, "active_experts": 2.0 if row["stage"] == "teacher" else active}
        for share, active in ((0.25, 1.5), (0.5, 1.0), (None, 1.2))
        for row in cell(method="odp", ratio=share)
    ]
    results = Results.of(rows)
    chart = only(loss_over("active_experts", results, results.settings))
    assert [row[:2] for row in chart.rows] == [
        ("odp skips 0.5", "1"),
        ("odp skips by rule", "1.2"),
        ("odp skips 0.25", "1.5"),
    ]
    assert chart.drawing.teacher == pytest.approx(3.52)


def test_each_heldout_text_has_its_bars_by_calibration_text() -> None:
    rows = [*cell(calibration="docs", recovery=0.6), *cell(calibration="speeches", recovery=0.3)]
    rows[2]["nll_by"]["docs"]["recovery"] = 0.9
    results = Results.of(rows)
    whole, each = by_calibration(results, results.settings)
    assert [row[2] for row in whole.rows] == ["60 % ± 3", "30 % ± 3"]
    assert [row[:3] for row in each.rows] == [
        ("reap docs", "docs", "90 % ± 3"),
        ("reap docs", "speeches", "60 % ± 3"),
        ("reap speeches", "docs", "30 % ± 3"),
        ("reap speeches", "speeches", "30 % ± 3"),
    ]


def test_the_forest_shows_pairs_of_several_seeds_only() -> None:
    rows = [*cell(method="hc_smoe"), *cell("tiny_coarse", "hc_smoe")]
    for seed, gap in enumerate((0.1, 0.3)):
        rows += [
            *cell(seed=seed, recovery=0.5 + gap),
            *cell("tiny_coarse", seed=seed, recovery=0.5),
        ]
    results = Results.of(rows)
    chart = only(forest(results, results.settings))
    # mean 0.2, sd 0.1414, t(1) = 12.706: half 1.27
    assert chart.rows == [("reap", "20 %", "-107 % to 147 %", "2")]
