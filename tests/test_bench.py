"""Every measurement of the bench runs and has its shape; no time that it measures is judged."""

import contextlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rerail.run.results import new_row, write_rows

FOLDER = Path(__file__).parents[1] / "experiments" / "bench"
MODULES = (
    "bench",
    "forms",
    "gpu",
    "memory",
    "models",
    "overhead",
    "planning",
    "speed",
    "sweep",
    "timing",
)


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in MODULES})
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def toy(bench: SimpleNamespace) -> object:
    return bench.models.Size(16, 8, 8, 2, 2, 64, 2, 8, kl_vocabulary=64, kl_tokens=20)


def test_the_whole_bench_gives_named_rows_with_the_promised_limits(
    bench: SimpleNamespace, toy: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = itertools.count(1_000_000, 1_000_000)
    few = lambda size: bench.memory.memory_rows(size, lambda task, size: next(sizes))  # noqa: E731
    monkeypatch.setattr(bench.bench, "memory_rows", few)
    spent = itertools.count(1.0)
    monkeypatch.setattr(bench.overhead, "cpu_seconds", lambda *command: next(spent))
    two = lambda *of: bench.planning.planning_rows(*of, ("reap", "rtn"))  # noqa: E731
    monkeypatch.setattr(bench.bench, "planning_rows", two)
    some = lambda *of: bench.forms.form_rows(*of, ("svd", "quantized, 3 bits"))  # noqa: E731
    monkeypatch.setattr(bench.bench, "form_rows", some)
    rows = json.loads(json.dumps(bench.bench.measure(toy, 1, ("tiny_coarse",))))
    assert all(set(r) == {"name", "value", "limit", "unit"} for r in rows)
    assert len({r["name"] for r in rows}) == len(rows)
    assert {r["name"] for r in rows if r["unit"] == "s"} == {
        "random model: planning a layer, reap",
        "random model: planning 2 layers, reap",
        "random model: planning a layer, rtn",
    }
    limits = {r["name"]: r["limit"] for r in rows if r["limit"] is not None}
    assert limits == {
        "launch: first step of a cell / the bare imports": 1.3,
        "chunked KL: time / plain": 1.0,
        "chunked KL: loss, relative error": 1e-5,
        "chunked KL: gradient, largest error / largest entry": 1e-5,
        "svd: experts in memory / stored": 1.1,
        "svd: prefill / dense": 1.0,
        "quantized, 3 bits: experts in memory / stored": 1.1,
        "quantized, 3 bits: prefill / dense": 1.3,
        "peak memory: chunked / plain KL": 0.25,
        "peak memory: with REAP student / teacher alone": 1.15,
        "random model: statistics for REAP / plain forward": 1.3,
        "random model: statistics for REAP, logits that differ": 0,
        "random model: counts and all moments g^a n^p / plain forward": 1.6,
        "random model: counts and all moments g^a n^p, logits that differ": 0,
        "random model: all routed statistics / plain forward": 2.5,
        "random model: all routed statistics, logits that differ": 0,
        "random model: dense statistics / E/K forwards of the experts": 1.3,
        "random model: Router KD step, live teacher / floor of 3 forwards": 1.25,
        "random model: Router KD step, cached teacher / floor of 2 + h forwards": 1.25,
        "tiny_coarse: statistics for REAP, logits that differ": 0,
        "tiny_coarse: counts and all moments g^a n^p, logits that differ": 0,
        "tiny_coarse: all routed statistics, logits that differ": 0,
    }
    for r in rows:
        if r["limit"] in (0, 1e-5):  # what is not a matter of speed
            assert 0 <= r["value"] <= r["limit"], r


def test_forms_of_the_bench_keep_in_memory_what_they_store(
    bench: SimpleNamespace, toy: object
) -> None:
    teacher = bench.models.random_model(toy)
    made = dict(bench.forms.specs(teacher.layers[0]))
    assert {"svd", "moe_svd", "d2_moe", "mobe", "narrow, uneven"} <= made.keys()
    for name, spec in made.items():
        student = bench.forms.student(teacher, spec)
        slots = sum(layer.experts.slots.nbytes for layer in student.layers)
        in_memory = bench.forms.bytes_in_memory(student) - slots
        assert in_memory == bench.forms.bytes_stored(student), name


def test_every_preset_of_a_compressor_has_its_planning_row(bench: SimpleNamespace) -> None:
    names = bench.planning.presets()
    assert {"reap", "svd", "gptq", "odp"} <= set(names)
    assert set(bench.planning.WHOLE) <= set(names)


def test_a_process_is_measured_up_to_the_line_that_is_waited_for(bench: SimpleNamespace) -> None:
    work = "import sys; [i * i for i in range(3_000_000)]; print('now', file=sys.stderr); "
    forever = [sys.executable, "-c", work + "import time; time.sleep(60)"]
    assert 0.05 < bench.overhead.cpu_seconds(forever, b"now") < 30
    with pytest.raises(RuntimeError, match="ended with 1"):
        bench.overhead.cpu_seconds([sys.executable, "-c", "raise SystemExit(1)"], b"now")


def test_a_ratio_is_the_median_over_rounds_of_weighted_times(bench: SimpleNamespace) -> None:
    found = {"a": [6.0, 8.0, 90.0], "b": [1.0, 2.0, 3.0], "c": [1.0, 1.0, 3.0]}
    assert bench.timing.ratio(found, "a", b=1, c=2) == 2.0


def test_work_takes_turns_and_the_first_round_is_not_counted(bench: SimpleNamespace) -> None:
    calls: list[str] = []
    work = {name: lambda name=name: calls.append(name) for name in "abc"}
    found = bench.timing.interleaved(work, 7)
    turns = {"".join(calls[i : i + 3]) for i in range(0, len(calls), 3)}
    assert len(calls) == 24
    assert len(turns) > 2
    assert {"".join(sorted(turn)) for turn in turns} == {"abc"}
    assert {name: len(times) for name, times in found.items()} == {"a": 7, "b": 7, "c": 7}


def test_the_head_s_share_is_what_torch_counts(bench: SimpleNamespace, toy: object) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = bench.models.random_model(toy)
    model.model.set_attn_implementation("eager")  # torch counts no FLOPs of the fused attention
    ids, _ = bench.models.text(model, toy)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model(input_ids=ids, use_cache=False)
    head = 2 * ids.numel() * model.vocab_size * model.config.hidden_size
    share = bench.models.head_share(model, ids.shape[1])
    assert share == pytest.approx(head / counter.get_total_flops(), rel=1e-6)


def test_a_step_trains_the_students_router_rows(bench: SimpleNamespace, toy: object) -> None:
    teacher = bench.models.random_model(toy)
    student = bench.models.reap_student(teacher, bench.models.text(teacher, toy))
    assert [layer.num_experts for layer in student.layers] == [4, 4]
    before = [layer.router_rows.clone() for layer in student.layers]
    bench.memory.one_step(teacher, student, bench.models.text(teacher, toy))
    for layer, rows in zip(student.layers, before, strict=True):
        assert not torch.equal(layer.router_rows, rows)


def test_a_fresh_process_measures_what_a_tensor_takes(bench: SimpleNamespace) -> None:
    size = bench.models.Size(16, kl_vocabulary=4_000, kl_tokens=2_000)
    assert 2 < bench.memory.fresh_peak("plain KL", size) / (4_000 * 2_000 * 4) < 12


def write_cell(out: Path, model: str, compressor: str, seconds: dict[str, float]) -> None:
    """Write the rows of a cell that spent 2 s on each scoring."""
    stages = {"teacher": 0.0, **seconds}
    shared: dict[str, Any] = {"model": model, "compressor": compressor, "ratio": 0.5, "seed": 0}
    shared |= {"key": f"{model}-{compressor}", "evaluation_seconds": 2.0, "choices": {"names": {}}}
    rows = [
        new_row(**shared, stage=stage, seconds=spent, nll=3.0 + spent / 100)
        for stage, spent in stages.items()
    ]
    write_rows(out / f"{model}-{compressor}", rows)


def test_a_sweep_is_compared_with_its_cells_alone_and_every_second_has_its_place(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[list[str], dict[str, str]]] = []

    def seconds(words: list[str], env: dict[str, str], core: str = "") -> float:
        calls.append((words, {**env, "core": core}))
        given = dict(word.split("=", 1) for word in words if "=" in word)
        cost = {"compressed": 1.0, "repaired": 4.0 if words[0] == "-m" else 6.0}
        for model in given["model"].split(","):
            for compressor in given["compressor"].split(","):
                write_cell(Path(given["out"]), model, compressor, cost)
        if words[0] == "-m":
            return 60.0 / int(given["hydra.launcher.array_parallelism"])
        return 25.0

    monkeypatch.setattr(bench.sweep, "seconds", seconds)
    monkeypatch.setattr(bench.sweep, "cluster", lambda *_: contextlib.nullcontext())
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    grid = {"model": ("a", "b"), "compressor": ("reap", "svd"), "ratio": ("half",)}
    comparison = bench.sweep.Bench(tmp_path, "n64", grid)
    rows = {r["name"]: r for r in bench.sweep.sweep_rows(comparison, 1)}
    value = {name: r["value"] for name, r in rows.items()}
    assert rows["sweep: one worker / the cells alone (n64)"]["limit"] == 0.85
    assert value["sweep: one worker / the cells alone (n64)"] == 0.6
    assert value["sweep: one worker / two workers"] == 2
    assert value["sweep: cells alone, all cores / one core"] == 1
    assert value["sweep: largest difference of an NLL, sweep to alone"] == pytest.approx(0.02)
    assert value["sweep: largest difference of an NLL, two workers to one"] == 0
    # two teachers in the sweep, four in the cells alone
    assert value["one worker: teacher scored"] == 4
    assert value["cells alone: teacher scored"] == 8
    assert value["cells alone: repaired"] == 24
    assert value["cells alone: rest"] == 100 - (8 + 4 + 8 + 24 + 8)
    assert value["one worker: rest"] == 60 - (4 + 4 + 8 + 16 + 8)
    assert value["two workers: rest"] == 2 * 30 - (4 + 4 + 8 + 16 + 8)
    single = [env for words, env in calls if words[0] != "-m"]
    assert [env["core"] for env in single] == ["1"] * 4 + [""] * 2
    assert not any("OMP_NUM_THREADS" in env for _, env in calls)
    caches = [env["RERAIL_CACHE"] for _, env in calls]
    assert len(set(caches)) == len(calls) == 8
    assert not any(Path(cache).exists() for cache in caches)


def test_a_run_that_fails_ends_the_comparison(bench: SimpleNamespace, tmp_path: Path) -> None:
    env = bench.sweep.environment(tmp_path / "cache")
    with pytest.raises(RuntimeError, match="nowhere"):
        bench.sweep.seconds(["model=nowhere", f"out={tmp_path}"], env)


def test_the_gpu_bench_measures_everything_on_a_toy_and_writes_its_page(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, out = tmp_path / "gpu.md", tmp_path / "bench_gpu.json"
    page.write_text((FOLDER.parent / "gpu.md").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", "--out", str(out), "--page", str(page)])
    assert bench.gpu.main() == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    rows = {r["name"]: r for r in found["rows"]}
    assert len(rows) == len(found["rows"])
    assert all(set(r) == {"name", "value", "limit", "unit"} for r in rows.values())
    assert all(r["value"] >= 0 for r in rows.values())
    limits = {name: r["limit"] for name, r in rows.items() if r["limit"] is not None}
    assert limits == {
        "REAP statistics / plain forward": 1.2,
        "Router KD, cached teacher: goal of 12,000 tokens/s / scaled": 1.0,
    }
    assert rows["layers"]["value"] == 2
    assert {r.split(",")[1].split(":")[0].strip() for r in rows if r.startswith("planning")} == {
        "hc_smoe",
        "svd",
        "gptq",
        "mobe",
    }
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# What does it cost on one GPU?")
    assert "Not run yet" not in text
    assert all(name in text for name in rows)
    assert found["surroundings"]["torch"] == torch.__version__


def test_a_measurement_that_fails_leaves_its_error_and_the_others_go_on(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    def works(one: Any) -> None:
        one.add(bench.timing.row("works", 1.0))

    late = bench.gpu.Bench(bench.gpu.SMALL, torch.device("cpu"), 0.0)
    early = bench.gpu.Bench(bench.gpu.SMALL, torch.device("cpu"), float("inf"))
    monkeypatch.setattr(bench.gpu, "MEASUREMENTS", {"fails": fails, "works": works})
    first, second = bench.gpu.measure(early)
    assert first["error"].startswith("RuntimeError: CUDA out of memory")
    assert "fails" in first["error"]
    assert second["value"] == 1.0
    assert [r["error"] for r in bench.gpu.measure(late)] == ["not begun: the time was up"] * 2
    section = bench.gpu.section({"surroundings": {"card": "x"}, "rows": [first, second]})
    assert "| fails | failed | | RuntimeError: CUDA out of memory |" in section
