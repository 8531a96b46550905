"""A tokenizer of whole words and corpora in memory, so that tokens can be read as words."""

from dataclasses import dataclass
from typing import Any, ClassVar

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rerail.text.corpora import Corpus
from rerail.text.documents import Document, Split, split_of

END = "<end>"
WORDS = (END, "train", "calibration", "heldout", "x", "y", *map(str, range(58)))


def word_tokenizer(words: tuple[str, ...] = WORDS, **special: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose token i is `words[i]`."""
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[-1])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(special or {"eos_token": END}))


@dataclass(frozen=True)
class Wordy(Corpus):
    """58 documents; each says its split and its number, `length` words in all."""

    length: int = 9
    word: str = ""
    name: ClassVar[str] = "wordy"

    def fingerprint(self) -> dict[str, Any]:
        return {"name": self.name, "length": self.length, "word": self.word}

    def documents(self, split: Split) -> list[Document]:
        found = []
        for i in range(58):
            where = split_of(str(i))
            if where == split:
                words = [self.word or where, str(i)] * self.length
                found.append(Document(str(i), " ".join(words[: self.length])))
        return found
