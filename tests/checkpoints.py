"""A checkpoint folder for whole cells: a tiny random model, the zoo's tokenizer, and a text."""

import json
import shutil
from pathlib import Path

import rerail
from families import tiny

ZOO = Path(rerail.__file__).parent / "zoo/tiny_fine"


def add_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ZOO / name, folder / name)


def checkpoint(folder: Path) -> Path:
    """Fill a folder that exists, and return it; its text is `text.jsonl`."""
    tiny("qwen3_moe", vocab_size=4096).model.save_pretrained(folder)
    add_tokenizer(folder)
    text = "It was a bright cold day, and the clocks were striking thirteen. "
    lines = [json.dumps({"text": f"{i}: {text * (3 + i % 4)}"}) for i in range(60)]
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder
