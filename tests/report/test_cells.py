"""Which rows belong together, which may be compared, and with which errors."""

import math
import random

import numpy as np
import pytest

from rerail.report.cells import by_tokens, cells_of, series_over, settings_of
from rerail.report.comparison import comparison, difference, mean_of, pairs_of
from rerail.report.labels import label_of, short_label, varying
from rerail.report.words import megabytes, plus_minus, share
from rerail.run.results import Row
from result_rows import cell, demo_rows, failed_cell


def settings(rows: list[Row]) -> list:
    return settings_of(cells_of(rows))


def test_cells_are_the_rows_of_a_key_fine_first_whatever_the_order_of_rows() -> None:
    rows = [*demo_rows(), failed_cell()]
    random.Random(0).shuffle(rows)
    cells = cells_of(rows)
    named = [(c.head["model"], c.head["compressor"], c.done, len(c.rows)) for c in cells]
    assert named == [
        ("tiny_fine", "hc_smoe", True, 3),
        ("tiny_fine", "mobe", True, 3),
        ("tiny_fine", "reap", True, 3),
        ("tiny_fine", "reap", False, 1),
        ("tiny_coarse", "hc_smoe", True, 3),
        ("tiny_coarse", "mobe", True, 3),
        ("tiny_coarse", "reap", True, 3),
    ]
    assert [row["stage"] for row in cells[0].rows] == ["teacher", "compressed", "repaired"]
    assert cells[0].seconds == pytest.approx(9.4 + 8.1 + 41.7)


def test_a_cell_that_failed_and_was_run_again_shows_its_new_rows_only() -> None:
    rows = cell(time="2026-01-02T00:00:00+00:00")
    old = failed_cell(key=rows[0]["key"], time="2026-01-01T00:00:00+00:00")
    for both in ([old, *rows], [*rows, old]):
        (found,) = cells_of(both)
        assert found.done
        assert len(found.rows) == 3
    newer = {**old, "time": "2026-01-03T00:00:00+00:00"}
    (found,) = cells_of([*rows, newer])
    assert not found.done


def test_cells_that_differ_in_seeds_are_one_setting_with_mean_spread_and_number() -> None:
    values = [0.5, 0.6, 0.7]
    rows = [row for s, r in enumerate(values) for row in cell(seed=s, recovery=r)]
    (setting,) = settings([*rows, *cell(seed=3, recovery=None)])
    found = setting.estimate("repaired", "recovery")
    assert found == pytest.approx((0.6, np.std(values, ddof=1), 3))
    t_975_of_two_degrees = 4.302652729911275
    assert found.half_interval == pytest.approx(t_975_of_two_degrees * 0.1 / math.sqrt(3))
    assert setting.no_recovery == ""


def test_with_one_seed_the_error_is_that_of_the_row() -> None:
    (setting,) = settings(cell())
    found = setting.estimate("repaired", "recovery")
    assert found == (0.56, 0.034, 1)
    assert found.half_interval == pytest.approx(1.96 * 0.034)
    assert setting.estimate("repaired", "bytes") == (9.8e6, None, 1)
    assert setting.estimate("repaired", "tasks") is None


@pytest.mark.parametrize(
    ("known", "reason"),
    [({}, ""), ({"recovery": None}, "gap under two standard errors")],
)
def test_a_blank_recovery_has_its_reason(known: dict, reason: str) -> None:
    assert settings(cell(**known))[0].no_recovery == reason


def test_without_a_repair_the_reason_is_that() -> None:
    assert settings(cell()[:2])[0].no_recovery == "no repair"


@pytest.mark.parametrize(
    "other",
    [
        {"ratio": 0.25},
        {"samples": 64},
        {"texts": {"speeches": 16320, "docs": 100}},
        {"heldout": "another tokenizer"},
        {"distill": "none"},
    ],
)
def test_what_differs_in_more_than_seeds_is_another_setting(other: dict) -> None:
    assert len(settings([*cell(), *cell(seed=1, **other)])) == 2
    assert len(settings([*cell(), *cell(seed=1)])) == 1


def test_a_choice_without_a_column_separates_settings_too() -> None:
    rows = cell(seed=1)
    for row in rows:
        row["choices"]["trainer"] = {"precision": "bf16"}
    assert len(settings([*cell(), *rows])) == 2


def test_settings_are_kept_apart_by_held_out_tokens() -> None:
    rows = [*cell(), *cell("tiny_coarse"), *cell(method="mobe", texts={"wiki": 9000})]
    groups = by_tokens(settings(rows))
    assert [[s.head["compressor"] for s in group] for group in groups.values()] == [
        ["mobe"],
        ["reap", "reap"],
    ]


def test_fine_and_coarse_are_paired_only_on_equal_settings_and_tokens() -> None:
    rows = [
        *cell(),
        *cell("tiny_coarse"),
        *cell(ratio=0.25),
        *cell(method="mobe", recovery=0.2),
        *cell("tiny_coarse", "mobe", heldout="another tokenizer"),
        *cell("tiny_coarse", "hc_smoe", ratio=0.75),
    ]
    pairs = pairs_of(settings(rows))
    assert [(f.head["key"], c.head["key"]) for f, c in pairs] == [
        ("0.5-0-256-tiny_fine-reap", "0.5-0-256-tiny_coarse-reap")
    ]


def test_the_comparison_is_one_sentence_with_errors_and_the_mean_of_what_both_have() -> None:
    assert comparison(settings(demo_rows())) == (
        "recovery fine vs coarse: hc_smoe 44 % ± 3 vs 21 % ± 3; "
        "mobe blank (gap under two standard errors) vs 9 % ± 3; reap 56 % ± 3 vs 18 % ± 3; "
        "mean of 2 settings 50 % ± 3 vs 20 % ± 3"
    )


def test_the_comparison_names_what_varies_and_the_number_of_seeds() -> None:
    rows = [
        row
        for model in ("tiny_fine", "tiny_coarse")
        for ratio in (0.25, 0.5)
        for seed in (0, 1)
        for row in cell(model, ratio=ratio, seed=seed, recovery=0.4 + 0.1 * seed + ratio / 10)
    ]
    said = comparison(settings(rows))
    assert "reap, ratio 0.25 48 % ± 7 (n=2) vs 48 % ± 7 (n=2)" in said
    assert "reap, ratio 0.5 50 % ± 7 (n=2)" in said
    assert said.endswith("mean 49 % ± 5 vs 49 % ± 5")


def test_there_is_no_mean_over_different_held_out_tokens() -> None:
    rows = [*cell(), *cell("tiny_coarse")]
    rows += [
        *cell(method="hc_smoe", heldout="other"),
        *cell("tiny_coarse", "hc_smoe", heldout="other"),
    ]
    said = comparison(settings(rows))
    assert "hc_smoe 44 %" in said
    assert "reap 56 %" in said
    assert "mean" not in said


@pytest.mark.parametrize("rows", [[], cell(), [*cell(), *cell("tiny_coarse", ratio=0.25)]])
def test_there_is_no_comparison_without_a_pair(rows: list[Row]) -> None:
    assert comparison(settings(rows)) == ""


def test_the_error_of_a_mean_is_the_largest_that_dependent_errors_allow() -> None:
    held = [settings(cell(recovery=r))[0].estimate("repaired", "recovery") for r in (0.2, 0.6)]
    held[1] = held[1]._replace(error=0.066)
    assert mean_of(held) == pytest.approx((0.4, 0.05, 1))


def test_fine_minus_coarse_is_paired_seed_by_seed_with_students_t() -> None:
    gains = {1: 0.10, 2: 0.14, 3: 0.12}
    rows = []
    for seed, gain in gains.items():
        rows += cell(seed=seed, recovery=0.5 + seed / 10 + gain)  # seeds differ more than models
        rows += cell("tiny_coarse", seed=seed, recovery=0.5 + seed / 10)
    rows += [*cell(seed=4, recovery=0.9), *cell("tiny_coarse", seed=5, recovery=0.1)]
    ((fine, coarse),) = pairs_of(settings(rows))
    found = difference(fine, coarse)
    t_975_of_two_degrees = 4.302652729911275
    assert found == pytest.approx((0.12, t_975_of_two_degrees * 0.02 / math.sqrt(3), 3))


def test_with_one_seed_the_interval_is_that_of_two_independent_errors() -> None:
    ((fine, coarse),) = pairs_of(settings([*cell(), *cell("tiny_coarse")]))
    found = difference(fine, coarse)
    assert found == pytest.approx((0.38, 1.96 * 0.034 * math.sqrt(2), 1))
    ((fine, coarse),) = pairs_of(
        settings([*cell(method="mobe"), *cell("tiny_coarse", method="mobe")])
    )
    assert difference(fine, coarse) is None


def test_a_recovery_on_one_text_is_over_the_seeds_that_have_it() -> None:
    rows = [row for s, r in ((0, 0.4), (1, 0.6)) for row in cell(seed=s, recovery=r)]
    (setting,) = settings(rows)
    found = setting.on_text("docs")
    assert found == pytest.approx((0.5, np.std([0.4, 0.6], ddof=1), 2))
    assert setting.on_text("nothing of ours") is None


def test_bits_and_skipped_shares_are_series_of_their_own() -> None:
    rows = [row for b in (2.0, 4.0) for row in cell(method="rtn", ratio=1 - b / 16, bits=b)]
    rows += [row for q in (None, 0.25) for row in cell(method="odp", ratio=q)]
    rows += [row for q in (0.25, 0.5) for row in cell(ratio=q)]
    named = {
        column: [[short_label(s.head, ["ratio"]) for s in one] for one in found]
        for column in ("ratio", "bits", "skip", "samples", "calibration")
        if (found := series_over(column, settings(rows)))
    }
    assert named == {
        "ratio": [["reap r0.25", "reap r0.5"]],
        "bits": [["rtn 2 bits", "rtn 4 bits"]],
        "skip": [["odp skips 0.25", "odp skips by rule"]],
    }
    both = [*cell(calibration="docs"), *cell(calibration="speeches")]
    assert len(series_over("calibration", settings(both))) == 1


def test_a_series_differs_in_one_column_only() -> None:
    rows = [row for q in (0.75, 0.25) for n in (64, 256) for row in cell(ratio=q, samples=n)]
    rows += [*cell(method="mobe"), *cell("tiny_coarse")]
    series = series_over("ratio", settings(rows))
    assert [[(s.head["ratio"], s.head["samples"]) for s in one] for one in series] == [
        [(0.25, 64), (0.75, 64)],
        [(0.25, 256), (0.75, 256)],
    ]
    assert series_over("samples", settings(cell())) == []


def test_labels_name_what_varies() -> None:
    cells = cells_of([*cell(), *cell(ratio=0.25), failed_cell(ratio=None)])
    assert varying(cells) == ["ratio"]
    assert label_of(cells[0].head, ["ratio"]) == "reap"
    assert label_of(cells[1].head, ["ratio", "samples"]) == "reap, ratio 0.25, 256 samples"
    assert short_label(cells[1].head, ["ratio", "samples"]) == "reap r0.25 n256"


def test_numbers_are_written_with_their_errors() -> None:
    assert plus_minus(3.51234, 0.01234) == "3.512 ± 0.012"
    assert plus_minus(3.51234, None) == "3.512"
    assert plus_minus(None, None) == share(None, None) == megabytes(None) == ""
    assert share(-0.126, 0.034) == "-13 % ± 3"
    assert [megabytes(n) for n in (15_600_000, 61_000_000_000)] == ["15.60", "61,000"]
