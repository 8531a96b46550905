"""The Python door: the lines of the README, on a tiny model."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from checkpoints import add_tokenizer
from families import tiny
from rerail import api
from rerail.errors import InputError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("door")
    tiny("qwen3_moe", vocab_size=4096).model.save_pretrained(folder)
    add_tokenizer(folder)
    lines = [
        json.dumps({"text": f"{i} green bottles hanging on the wall. " * 6}) for i in range(60)
    ]
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return api.load(str(folder))


def text_of(teacher, split: str = "calibration"):
    source = {"_target_": "rerail.text.corpora.Files"}
    source["paths"] = [str(Path(teacher.source.path_or_id) / "text.jsonl")]
    return api.text(teacher, "files", sources=[source], samples=16, block=16, split=split)


def test_load_collect_compress_repair_evaluate_save(teacher, tmp_path):
    text, held = text_of(teacher), text_of(teacher, "heldout")
    student = api.compress(teacher, "reap", 0.5, api.collect(teacher, text, "reap"))
    before = api.evaluate(student, teacher, held)
    done = api.repair(student, teacher, text, batch_size=4, epochs=1)
    after = api.evaluate(student, teacher, held)
    assert done.kl_best <= done.kl_first
    assert before["kl"] > 0
    assert before["tokens"] == after["tokens"] == 16 * 15
    assert after["bytes"] < api.evaluate(teacher, teacher, held)["bytes"]
    path = api.save(student, tmp_path / "smaller")
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert loaded.config.num_experts == 4


def test_unknown_presets_list_those_that_exist(teacher):
    with pytest.raises(InputError, match=r"compressor='reapp' does not exist; allowed: .*reap"):
        api.compress(teacher, "reapp", 0.5)
    with pytest.raises(InputError, match="did you mean epochs"):
        api.repair(teacher, teacher, text_of(teacher), epoch=1)


def test_the_readme_uses_what_the_door_has():
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    used = set(re.findall(r"api\.(\w+)\(", example))
    assert used == {"load", "text", "collect", "compress", "repair", "evaluate", "save"}
    compile(example, "README.md", "exec")
    assert len([line for line in example.splitlines() if line.strip()]) <= 8
