"""A whole cell by two processes: one set of files, and the rows of one process."""

import json
import re
from pathlib import Path

import pytest

import rank_programs
from checkpoints import checkpoint
from rerail.errors import InputError
from together import close, together

SAME = ("host", "time", "seconds", "evaluation_seconds", "peak_memory", "revision")
NAMED = ("key", "choices", "trainer")  # the strategy is a choice


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model"))


def words(model_folder, *more):
    text = f"[{model_folder / 'text.jsonl'}]"
    return [
        *("model=local", f"model.path_or_id={model_folder}", "calibration=files"),
        *(f"calibration.sources.0.paths={text}", "evaluation=file", "samples.count=16"),
        *(f"evaluation.texts.file.sources.0.paths={text}", "evaluation.texts.file.samples=6"),
        *("calibration.block=16", "evaluation.texts.file.block=16", "evaluation.new_tokens=4"),
        *("++evaluation.batch_size=2", "++calibration.batch_size=2", "++distill.batch_size=4"),
        *("++distill.epochs=2", "++distill.evaluations=2", *more),
    ]


def comparable(row):
    return {k: v for k, v in row.items() if k not in (*SAME, *NAMED)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "compressor"), [("ddp", "reap"), ("fsdp2", "naee_progressive")]
)
def test_two_processes_run_a_cell_as_one_does(
    model_folder, tmp_path, monkeypatch, strategy, compressor
):
    one, two = tmp_path / "one", tmp_path / "two"
    chosen = {
        one: words(model_folder, f"compressor={compressor}", "trainer=cpu"),
        two: words(
            model_folder,
            f"compressor={compressor}",
            f"trainer={strategy}",
            "trainer.enable_progress_bar=false",
        ),
    }
    for folder, content in chosen.items():
        folder.mkdir()
        (folder / "words.json").write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("RERAIL_CACHE", str(tmp_path / "cache one"))
    alone = rank_programs.cell(one)
    monkeypatch.setenv("RERAIL_CACHE", str(tmp_path / "cache two"))
    rows, others = together("cell", two)
    assert rows == others
    assert [row["stage"] for row in rows] == ["teacher", "compressed", "repaired"]
    for ours, theirs in zip(rows[:2], alone[:2], strict=True):
        assert comparable(ours) == comparable(theirs)
    close(comparable(rows[2]), comparable(alone[2]))
    [made], [wanted] = ((folder / "out").iterdir() for folder in (two, one))
    assert {p.name for p in made.iterdir()} == {p.name for p in wanted.iterdir()}
    caches = [
        sorted(str(p.relative_to(c)) for p in c.rglob("*") if p.is_file())
        for c in (tmp_path / "cache one", tmp_path / "cache two")
    ]
    assert caches[0] == caches[1]
    assert json.loads((made / "status.json").read_text(encoding="utf-8"))["state"] == "done"


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["trainer=ddp", "++model.device_map=auto"], "model.device_map='auto' spreads the model"),
        (["trainer=ddp", "++distill.batch_size=1", "++distill.accumulate=2"], "start at most 2"),
        (["trainer=fsdp2", "++distill.teacher=live"], "use distill.teacher=cached"),
        (["++trainer.strategy=deepspeed"], "'deepspeed' is not one of auto, ddp, fsdp2"),
        (["trainer=cpu"], "4 processes started and trainer.strategy='auto' is for one"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_before_anything_is_written(
    model_folder, tmp_path, monkeypatch, more, sentence
):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    changed = [word.split("=")[0].lstrip("+") for word in more]
    kept = [w for w in words(model_folder) if w.split("=")[0].lstrip("+") not in changed]
    (tmp_path / "words.json").write_text(json.dumps([*kept, *more]), encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(sentence)):
        rank_programs.cell(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["words.json"]
