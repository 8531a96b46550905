"""The KL of a fit is reported while it runs."""

from pathlib import Path
from typing import Any

import pytest

from families import tiny
from rerail.distill.repair import repair
from rerail.distill.settings import RouterKD
from rerail.teacher.hidden_states import LiveTeacher
from students import blocks, sliced

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}
SETTINGS = RouterKD(
    learning_rate=3e-3, batch_size=4, accumulate=2, epochs=3, evaluations=5, validation=0.25
)  # 18 of 24 blocks train: 12 batches, 6 steps, rounds of 2


def fit(report: Any, folder: Any = None) -> Any:
    teacher = tiny("qwen3_moe")
    student, states = sliced(teacher), LiveTeacher(teacher)

    def report_point(point: dict[str, float], steps: int) -> None:
        assert steps == 6
        report(point)

    return repair(student, states, blocks(), SETTINGS, QUIET, 0, folder, report_point)


def test_every_step_and_every_point_of_the_curve_is_reported_once_and_in_order() -> None:
    reported: list[dict[str, float]] = []
    done = fit(reported.append)
    assert [p for p in reported if "val_kl" in p] == done.curve
    steps = {p["step"]: p["batch_kl"] for p in reported if "batch_kl" in p}
    assert list(steps) == [1, 2, 3, 4, 5, 6]
    order = [(p["step"], "val_kl" in p) for p in reported]
    assert order == sorted(order)
    for before, now in zip(done.curve, done.curve[1:], strict=False):
        made = [steps[n] for n in range(int(before["step"]) + 1, int(now["step"]) + 1)]
        assert sum(made) / len(made) == pytest.approx(now["train_kl"], rel=1e-6)


def test_a_fit_that_goes_on_reports_what_is_left(tmp_path: Path) -> None:
    whole: list[dict[str, float]] = []
    fit(whole.append)
    reported: list[dict[str, float]] = []

    def killed(point: dict[str, float]) -> None:
        if point["step"] == 3:
            raise KeyboardInterrupt
        reported.append(point)

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(killed, tmp_path)
    again: list[dict[str, float]] = []
    fit(again.append, tmp_path)
    assert again[0]["step"] == 3
    assert reported + again == whole
