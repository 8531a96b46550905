"""Which rows belong together, which may be compared, and with which errors."""

import math
import random

import numpy as np
import pytest

from rerail.report.cells import cells_of
from rerail.report.comparison import comparison
from rerail.report.frame import Results, by, heads, largest_error, varying
from rerail.report.words import interval, megabytes, plus_minus, share
from rerail.run.settings import label_of, short_label
from result_rows import Row, cell, demo_rows, failed_cell


def estimate(results: Results, measure: str, stage: str = "repaired", text: str = "") -> tuple:
    """Return value, error, n and half of the one setting."""
    [actual] = results.estimate(results.settings, measure, stage, text).itertuples(index=False)
    return tuple(actual)


def paired(results: Results) -> list[list[str]]:
    """Return the keys of fine and coarse settings that are compared."""
    heads_of = results.settings["head"]
    return [
        [heads_of[s]["key"] for s in pair] for pair in results.pairs(results.settings).to_numpy()
    ]


def difference(results: Results) -> tuple:
    """Return value, half and n of the one pair."""
    actual = results.differences(results.pairs(results.settings))
    [gap] = actual[["value", "half", "n"]].itertuples(index=False)
    return tuple(gap)


def series_of(results: Results, column: str, *shown: str) -> list[list]:
    """Return what is shown of each setting, series by series."""
    series = results.series_over(column, results.settings)
    return [
        [tuple(head[name] for name in shown) for head in part["head"]]
        for _, part in series.groupby("series", sort=False)
    ]


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
        (actual,) = cells_of(both)
        assert actual.done
        assert len(actual.rows) == 3
    newer = {**old, "time": "2026-01-03T00:00:00+00:00"}
    (actual,) = cells_of([*rows, newer])
    assert not actual.done


def test_cells_that_differ_in_seeds_are_one_setting_with_mean_spread_and_number() -> None:
    values = [0.5, 0.6, 0.7]
    rows = [row for s, r in enumerate(values) for row in cell(seed=s, recovery=r)]
    results = Results.of([*rows, *cell(seed=3, recovery=None)])
    t_975_of_two_degrees = 4.302652729911275
    half = t_975_of_two_degrees * 0.1 / math.sqrt(3)
    expected = (0.6, np.std(values, ddof=1), 3, half)
    assert estimate(results, "recovery") == pytest.approx(expected)
    assert list(results.settings["blank"]) == [""]


def test_with_one_seed_the_error_is_that_of_the_row() -> None:
    results = Results.of(cell())
    assert estimate(results, "recovery") == (0.56, 0.034, 1, pytest.approx(1.96 * 0.034))
    nan = pytest.approx(math.nan, nan_ok=True)
    assert estimate(results, "bytes") == (9.8e6, nan, 1, nan)
    assert estimate(results, "active_experts") == (nan, nan, 0, nan)


@pytest.mark.parametrize(
    ("known", "reason"),
    [({}, ""), ({"recovery": None}, "gap under two standard errors")],
)
def test_a_blank_recovery_has_its_reason(known: dict, reason: str) -> None:
    assert list(Results.of(cell(**known)).settings["blank"]) == [reason]


def test_without_a_repair_the_reason_is_that() -> None:
    assert list(Results.of(cell()[:2]).settings["blank"]) == ["no repair"]


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
    assert len(Results.of([*cell(), *cell(seed=1, **other)]).settings) == 2
    assert len(Results.of([*cell(), *cell(seed=1)]).settings) == 1


def test_a_choice_without_a_column_separates_settings_too() -> None:
    rows = cell(seed=1)
    for row in rows:
        row["choices"]["trainer"] = {"precision": "bf16"}
    assert len(Results.of([*cell(), *rows]).settings) == 2


def test_settings_are_kept_apart_by_held_out_tokens() -> None:
    rows = [*cell(), *cell("tiny_coarse"), *cell(method="mobe", texts={"wiki": 9000})]
    groups = Results.of(rows).settings.groupby("tokens", sort=False)["compressor"].agg(list)
    assert list(groups) == [["mobe"], ["reap", "reap"]]


def test_fine_and_coarse_are_paired_only_on_equal_settings_and_tokens() -> None:
    rows = [
        *cell(),
        *cell("tiny_coarse"),
        *cell(ratio=0.25),
        *cell(method="mobe", recovery=0.2),
        *cell("tiny_coarse", "mobe", heldout="another tokenizer"),
        *cell("tiny_coarse", "hc_smoe", ratio=0.75),
    ]
    assert paired(Results.of(rows)) == [["0.5-0-256-tiny_fine-reap", "0.5-0-256-tiny_coarse-reap"]]


def test_pairs_of_several_fine_models_stand_together() -> None:
    rows = [*cell(), *cell(method="mobe"), *cell("tiny_coarse"), *cell("tiny_coarse", "mobe")]
    rows += [{**row, "model": "tiny_other", "key": f"{row['key']}-other"} for row in cell()]
    rows[-1]["choices"] = rows[-2]["choices"] = rows[-3]["choices"]
    names = [[key.split("-", 3)[3] for key in pair] for pair in paired(Results.of(rows))]
    assert names == [
        ["tiny_fine-mobe", "tiny_coarse-mobe"],
        ["tiny_fine-reap", "tiny_coarse-reap"],
        ["tiny_fine-reap-other", "tiny_coarse-reap"],
    ]


def test_the_comparison_is_one_sentence_with_errors_and_the_mean_of_what_both_have() -> None:
    assert comparison(Results.of(demo_rows())) == (
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
    message = comparison(Results.of(rows))
    assert "reap, ratio 0.25 48 % ± 7 (n=2) vs 48 % ± 7 (n=2)" in message
    assert "reap, ratio 0.5 50 % ± 7 (n=2)" in message
    assert message.endswith("mean 49 % ± 5 vs 49 % ± 5")


def test_there_is_no_mean_over_different_held_out_tokens() -> None:
    rows = [*cell(), *cell("tiny_coarse")]
    rows += [
        *cell(method="hc_smoe", heldout="other"),
        *cell("tiny_coarse", "hc_smoe", heldout="other"),
    ]
    message = comparison(Results.of(rows))
    assert "hc_smoe 44 %" in message
    assert "reap 56 %" in message
    assert "mean" not in message


@pytest.mark.parametrize("rows", [[], cell(), [*cell(), *cell("tiny_coarse", ratio=0.25)]])
def test_there_is_no_comparison_without_a_pair(rows: list[Row]) -> None:
    assert comparison(Results.of(rows)) == ""


def test_the_error_of_a_mean_is_the_largest_that_dependent_errors_allow() -> None:
    results = Results.of([*cell(recovery=0.2), *cell(method="mobe", recovery=0.6)])
    actual = results.estimate(results.settings, "recovery")
    actual["error"] = [0.034, 0.066]
    assert largest_error(actual) == pytest.approx(0.05)
    actual["error"] = [0.034, math.nan]
    assert math.isnan(largest_error(actual))


def test_fine_minus_coarse_is_paired_seed_by_seed_with_students_t() -> None:
    gains = {1: 0.10, 2: 0.14, 3: 0.12}
    rows = []
    for seed, gain in gains.items():
        rows += cell(seed=seed, recovery=0.5 + seed / 10 + gain)  # seeds differ more than models
        rows += cell("tiny_coarse", seed=seed, recovery=0.5 + seed / 10)
    rows += [*cell(seed=4, recovery=0.9), *cell("tiny_coarse", seed=5, recovery=0.1)]
    t_975_of_two_degrees = 4.302652729911275
    expected = (0.12, t_975_of_two_degrees * 0.02 / math.sqrt(3), 3)
    assert difference(Results.of(rows)) == pytest.approx(expected)


def test_with_one_seed_the_interval_is_that_of_two_independent_errors() -> None:
    actual = difference(Results.of([*cell(), *cell("tiny_coarse")]))
    assert actual == pytest.approx((0.38, 1.96 * 0.034 * math.sqrt(2), 1))
    bare = [{**row, "recovery_se": None} for row in cell()]
    actual = difference(Results.of([*bare, *cell("tiny_coarse")]))
    assert actual == pytest.approx((0.38, math.nan, 1), nan_ok=True)
    blank = Results.of([*cell(method="mobe"), *cell("tiny_coarse", method="mobe")])
    assert blank.differences(blank.pairs(blank.settings)).empty


def test_a_recovery_on_one_text_is_over_the_seeds_that_have_it() -> None:
    rows = [row for s, r in ((0, 0.4), (1, 0.6)) for row in cell(seed=s, recovery=r)]
    results = Results.of(rows)
    actual = estimate(results, "recovery", text="docs")
    assert actual[:3] == pytest.approx((0.5, np.std([0.4, 0.6], ddof=1), 2))
    assert estimate(results, "recovery", text="nothing of ours")[2] == 0


def test_bits_and_skipped_shares_are_series_of_their_own() -> None:
    rows = [row for b in (2.0, 4.0) for row in cell(method="rtn", ratio=1 - b / 16, bits=b)]
    rows += [row for q in (None, 0.25) for row in cell(method="odp", ratio=q)]
    rows += [row for q in (0.25, 0.5) for row in cell(ratio=q)]
    results = Results.of(rows)
    named = {}
    for column in ("ratio", "bits", "skip", "samples", "calibration"):
        series = results.series_over(column, results.settings)
        groups = series.groupby("series", sort=False)["head"]
        if labels := [[short_label(h, ["ratio"]) for h in heads_of] for _, heads_of in groups]:
            named[column] = labels
    assert named == {
        "ratio": [["reap r0.25", "reap r0.5"]],
        "bits": [["rtn 2 bits", "rtn 4 bits"]],
        "skip": [["odp skips 0.25", "odp skips by rule"]],
    }
    both = [*cell(calibration="docs"), *cell(calibration="speeches")]
    assert series_of(Results.of(both), "calibration", "calibration") == [[("docs",), ("speeches",)]]


def test_a_series_differs_in_one_column_only() -> None:
    rows = [row for q in (0.75, 0.25) for n in (64, 256) for row in cell(ratio=q, samples=n)]
    rows += [*cell(method="mobe"), *cell("tiny_coarse")]
    assert series_of(Results.of(rows), "ratio", "ratio", "samples") == [
        [(0.25, 64), (0.75, 64)],
        [(0.25, 256), (0.75, 256)],
    ]
    assert series_of(Results.of(cell()), "samples", "samples") == []


def test_labels_name_what_varies() -> None:
    cells = cells_of([*cell(), *cell(ratio=0.25), failed_cell(ratio=None)])
    assert varying(heads(cells)) == ["ratio"]
    assert label_of(cells[0].head, ["ratio"]) == "reap"
    assert label_of(cells[1].head, ["ratio", "samples"]) == "reap, ratio 0.25, 256 samples"
    assert short_label(cells[1].head, ["ratio", "samples"]) == "reap r0.25 n256"


def test_numbers_are_written_with_their_errors() -> None:
    assert plus_minus(3.51234, 0.01234) == "3.512 ± 0.012"
    assert plus_minus(3.51234, None) == "3.512"
    assert plus_minus(None, None) == share(None, None) == megabytes(None) == ""
    assert plus_minus(math.nan, math.nan) == share(math.nan) == megabytes(math.nan) == ""
    assert share(-0.126, 0.034) == "-13 % ± 3"
    assert (interval(0.5, 0.06), interval(0.5, math.nan)) == ("44 % to 56 %", "")
    assert [megabytes(n) for n in (15_600_000, 61_000_000_000)] == ["15.60", "61,000"]


def test_two_models_of_one_name_are_two_rows_two_settings_and_two_groups() -> None:
    """Their folders end in the same word, or one folder held other weights before."""
    both = [*cell(fingerprint="aaaa1111"), *cell(fingerprint="bbbb2222")]
    results = Results.of(both)
    assert [c.head["model"] for c in results.cells] == ["tiny_fine (aaaa)", "tiny_fine (bbbb)"]
    assert all(c.done and len(c.rows) == 3 for c in results.cells)
    assert len(results.settings) == 2
    assert [model for model, _ in by(results.settings, "model")] == [
        "tiny_fine (aaaa)",
        "tiny_fine (bbbb)",
    ]
    assert {c.head["model"] for c in cells_of(both[:3])} == {"tiny_fine"}


def test_a_cell_that_failed_before_its_model_was_read_is_no_other_model() -> None:
    rows = cell(fingerprint="aaaa1111", time="2026-01-02T00:00:00+00:00")
    old = failed_cell(key=rows[0]["key"], time="2026-01-01T00:00:00+00:00")
    (actual,) = cells_of([old, *rows])
    assert actual.done


def test_seeds_of_one_model_are_one_setting_wherever_it_lies() -> None:
    rows = [*cell(fingerprint="aaaa1111", seed=0), *cell(fingerprint="aaaa1111", seed=1)]
    for row in rows[3:]:
        row["model"], row["choices"] = (
            "copy",
            {
                **row["choices"],
                "names": {**row["choices"]["names"], "model": "copy"},
                "model": {"path_or_id": "/elsewhere", "name": "copy"},
            },
        )
    assert len(Results.of(rows).settings) == 1
    for row in rows:
        row["fingerprint"] = None
    assert len(Results.of(rows).settings) == 2
