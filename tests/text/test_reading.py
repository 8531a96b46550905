import json
import lzma
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rerail.errors import InputError
from rerail.text import reading
from rerail.text.reading import digest_of, expand, read_rows, stem

TEXTS = ["first\u2028text", "", "second"]


def write(path: Path, content: bytes | str | pa.Table) -> Path:
    if isinstance(content, pa.Table):
        sink = pa.BufferOutputStream()
        pq.write_table(content, sink)
        content = sink.getvalue().to_pybytes()
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(lzma.compress(data) if path.suffix == ".xz" else data)
    return path


def lines(records: list[object]) -> str:
    return "\n\n".join(json.dumps(r, ensure_ascii=False) for r in records)


ROWS = [{"text": t, "id": i} for i, t in enumerate(TEXTS)] + [{"text": None, "id": 9}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(ROWS)),
        ("a.jsonl", "\ufeff" + lines(ROWS) + "\n"),
        ("a.json", json.dumps(ROWS)),
        ("a.parquet", pa.table({"id": [1, 2, 3, 4], "text": [*TEXTS, None]})),
    ],
)
@pytest.mark.parametrize("packed", ["", ".xz"])
def test_every_kind_gives_its_non_empty_rows(tmp_path, name, content, packed):
    path = write(tmp_path / (name + packed), content)
    assert read_rows(path, "text") == [(0, TEXTS[0]), (2, TEXTS[2])]
    assert stem(path) == "a"


@pytest.mark.parametrize("name", ["a.txt", "a.txt.xz"])
def test_a_txt_file_is_one_row(tmp_path, name):
    [(row, text)] = read_rows(write(tmp_path / name, "\ufeffone\ntwo\n"), "text")
    assert (row, text[:], text[4:6]) == (0, "one\ntwo\n", "tw")


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "cut \\ud83d here \\ud83d\\ude00"}')
    assert read_rows(path, "text") == [(0, "cut ? here \U0001f600")]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", b"caf\xe9", "is not UTF-8 \\(byte 3 is 0xe9\\)"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "is not UTF-8"),
        ("a.txt", " \n\t", "is empty"),
        ("a.jsonl", "", "is empty"),
        ("a.json", "", "is empty"),
        ("a.json", "[]", "is empty"),
        ("a.jsonl", '{"text": ""}', "is empty"),
        ("a.jsonl", '{"text": "x"}\n{"text": oops}', "line 2 is not JSON"),
        ("a.json", '{"text": "x"}\n{"text": "y"}', "belongs in .jsonl"),
        ("a.jsonl", '{"body": "x"}', "row 0 has no column 'text'; it has body"),
        ("a.jsonl", '{"text": "x"}\n{}', "row 1 has no column 'text'; it has none"),
        ("a.jsonl", '"x"', "row 0 is not an object with a field 'text'"),
        ("a.jsonl", '{"text": 3}', "has int in column 'text' where text is expected"),
        ("a.parquet", pa.table({"body": ["x"]}), "has no column 'text'; it has body"),
        ("a.parquet", pa.table({"text": [3]}), "has int in column 'text'"),
        ("a.parquet", "no parquet", "is not a readable parquet file"),
        ("a.jsonl", '{"text": 1' + "0" * 5000 + "}", "line 1 cannot be read as JSON"),
        ("a.jsonl", "[" * 100_000, "line 1 cannot be read as JSON"),
        ("a.txt.xz", None, "cannot be read"),
    ],
)
def test_bad_files_are_named_with_the_reason(tmp_path, name, content, sentence):
    path = tmp_path / name
    if content is None:
        path.write_bytes(lzma.compress(b"text" * 1000)[:-20])
    else:
        write(path, content)
    with pytest.raises(InputError, match=sentence) as caught:
        [text[:] for _, text in read_rows(path, "text")]
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("absent.txt", "absent.txt matches no file"),
        ("*.jsonl", r"\*.jsonl matches no file"),
        ("folder", "is a folder; name its files"),
        ("a.csv", r"must end in .txt, .jsonl, .json, .parquet"),
        ("*", "must end in .txt"),
    ],
)
def test_paths_that_name_no_text_are_refused(tmp_path, monkeypatch, pattern, sentence):
    (tmp_path / "folder").mkdir()
    write(tmp_path / "a.csv", "x")
    monkeypatch.chdir(tmp_path)
    for given in (pattern, str(tmp_path / pattern)):
        with pytest.raises(InputError, match=sentence):
            expand((given,))


def test_globs_expand_sorted_and_every_file_comes_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a.txt", "c[1].txt"):
        write(tmp_path / name, name)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write(tmp_path / "deep" / "er" / "z.txt", "z")
    names = [p.name for p in expand(("b.txt", "*.txt", "c[1].txt"))]
    assert names == ["b.txt", "a.txt", "c[1].txt"]
    assert [p.name for p in expand((f"{tmp_path}/**/*.txt",))][-1] == "z.txt"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand(("~/a.txt",)) == [tmp_path / "a.txt"]


@pytest.mark.parametrize("read", [digest_of, lambda path: read_rows(path, "text")])
def test_a_path_that_the_system_will_not_read_is_named(tmp_path, read):
    path = tmp_path / "a.txt"
    path.mkdir()
    with pytest.raises(InputError, match=f"{path} cannot be read"):
        read(path)


def test_a_byte_that_is_not_utf8_is_counted_from_the_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_CHUNK", 4)
    path = write(tmp_path / "a.jsonl", '{"text": "\u4e2d\U0001f642"}'.encode() + b"\n\xe9 ")
    with pytest.raises(InputError, match="byte 20 is 0xe9"):
        read_rows(path, "text")


@pytest.mark.parametrize("name", ["a.txt", "a.txt.xz"])
def test_a_txt_file_is_read_no_further_than_its_text_is_looked_at(tmp_path, monkeypatch, name):
    chunks = []
    check = reading._decoded

    def watched(path):
        for part in check(path):
            chunks.append(part)
            yield part

    monkeypatch.setattr(reading, "_decoded", watched)
    monkeypatch.setattr(reading, "_CHUNK", 1000)
    lines = "".join(f"{i:099}\n" for i in range(1000))
    [(_, text)] = read_rows(write(tmp_path / name, lines), "text")
    assert text[150:300] == lines[150:300]
    assert text[:1500] == lines[:1500]
    assert sum(map(len, chunks)) < 10_000
    assert (text[99_990:200_000], text[:]) == (lines[99_990:], lines)


@pytest.mark.parametrize("name", ["a.txt.xz", "a.jsonl.xz", "a.json.xz"])
def test_a_file_that_unpacks_to_far_more_than_text_does_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(reading, "LARGEST", 2**21)
    path = write(tmp_path / name, " " * 2**23)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"a\.\w+\.xz unpacks to more than 2,097,152 bytes"):
        read_rows(path, "text")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


def test_what_is_packed_as_text_packs_is_read_whatever_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LARGEST", 10)
    rows = [{"text": f"{i} {i * 7919}"} for i in range(2000)]
    path = write(tmp_path / "a.jsonl.xz", lines(rows))
    assert [text for _, text in read_rows(path, "text")] == [row["text"] for row in rows]


@pytest.mark.parametrize("rows", [["x" * 2**22], ["x" * 2**12] * 2**10])
def test_a_parquet_file_of_one_value_many_times_is_refused(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(reading, "LARGEST", 2**21)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": rows}), sink, compression="zstd")
    path = write(tmp_path / "a.parquet", sink.getvalue().to_pybytes())
    with pytest.raises(InputError, match=r"a\.parquet unpacks to more than"):
        read_rows(path, "text")
