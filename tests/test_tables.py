"""The tables that stand in the pages of experiments/ are made from rows, and say what rows say."""

import sys
from pathlib import Path

import pytest

from rerail.report.cells import cells_of
from result_rows import cell

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
tables = pytest.importorskip("tables")
sys.path.pop(0)


def test_a_cell_is_one_line_with_what_is_stored_lost_and_got_back():
    rows = cell()
    rows[-1] |= {"disk_bytes": 9_870_000, "recovery_se": 0.02}
    rows[-1] |= {"memory_bytes": 12_340_000, "tokens": 32_640, "evaluation_seconds": 4.0}
    [item] = cells_of(rows)
    line = dict(zip(tables.COLUMNS, tables.line(item), strict=True))
    assert line["method"] == "reap"
    assert line["budget"] == "0.5"
    assert line["model"] == "fine"
    assert (line["experts MB"], line["disk MB"], line["active M"]) == ("5.80", "9.87", "1.50")
    assert line["NLL compressed"] == "4.330 ± 0.031"
    assert line["recovery"] == "56 % ± 2"
    assert line["seconds plan + repair"] == "8 + 42"
    assert line["peak MB"] == "1074"
    assert (line["memory MB"], line["tokens/s"]) == ("12.34", "8160")


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
    ("known", "message"),
    [
        ({"bits": 2.0}, "2 bits"),
        ({"paradigm": "skipping", "ratio": None}, "rule"),
        ({"paradigm": "skipping", "ratio": 0.25}, "skip 0.25"),
    ],
)
def test_budgets_are_said_in_the_terms_of_their_paradigm(known, message):
    rows = [{**row, **known} for row in cell()]
    [item] = cells_of(rows)
    assert tables.budget(item) == message


def grid(claim: str, **known):
    """Return cells of both models that differ from a claim's fixed choices in `known` alone."""
    rows = []
    for model in ("tiny_fine", "tiny_coarse"):
        for row in cell(model, "hc_smoe", **known):
            names = {
                "model": model,
                "compressor": "hc_smoe",
                "ratio": "half",
                "distill": "router_kd",
            }
            names |= {"calibration": "mix", "evaluation": "heldout"}
            rows.append({**row, "choices": {**row["choices"], "names": names}})
    return rows


def test_a_claim_s_table_holds_its_own_cells_only():
    rows = grid("samples") + grid("samples", samples=16, recovery=0.1) + grid("samples", samples=32)
    entry = tables.cells_in("calibration_size", cells_of(rows))
    assert sorted({c.head["samples"] for c in entry}) == [16, 256]
    text = tables.of_claim("calibration_size", cells_of(rows))
    assert "| hc_smoe | fine | 10 %" in text
    assert text.splitlines()[0] == "| method | model | n16 | n64 | n256 | n1024 | n2048 |"


def test_seeds_are_paired_and_their_interval_is_student_s():
    rows = []
    for seed, (fine, coarse) in enumerate([(0.4, 0.1), (0.5, 0.3), (0.6, 0.2)]):
        both = {"tiny_fine": fine, "tiny_coarse": coarse}
        for row in grid("seeds", seed=seed):
            known = both[row["model"]] if row["stage"] == "repaired" else None
            rows.append({**row, "recovery": known})
    message = tables.over_seeds(tables.cells_in("seeds", cells_of(rows))).splitlines()[-1]
    # differences 0.3, 0.2, 0.4: mean 0.3, sd 0.1, t(2) = 4.3027
    assert message == (
        "| hc_smoe | 50.0 % ± 24.8 (n = 3) | 20.0 % ± 24.8 (n = 3) | 30.0 % ± 24.8 (n = 3) |"
    )


def test_the_two_models_are_compared_budget_by_budget_on_methods_that_both_have():
    rows = cell("tiny_fine", "reap", recovery=0.4) + cell("tiny_coarse", "reap", recovery=0.2)
    rows += cell("tiny_fine", "mobe", recovery=0.2) + cell("tiny_coarse", "mobe", recovery=0.3)
    rows += cell("tiny_fine", "hc_smoe", recovery=0.9)
    message = tables.fine_against_coarse(cells_of(rows)).splitlines()[-1]
    assert message == "| 0.5 | 30 % | 25 % | 1 of 2 | mobe |"


def test_a_repair_that_kept_step_0_is_counted():
    still = cell("tiny_coarse")
    still[-1]["nll"] = still[-2]["nll"]
    message = tables.unmoved(cells_of([*cell(), *still]))
    assert message == "1 of 2 repairs changed nothing (0 tiny_fine, 1 tiny_coarse)"
