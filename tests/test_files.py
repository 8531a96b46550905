import errno
import hashlib
import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors import SafetensorError

from rerail.errors import InputError
from rerail.files import (
    append_line,
    cache_dir,
    digest,
    file_digest,
    temporary_folder,
    whole_file,
    write_json,
)


def fail_half_way(path: Path, error: BaseException) -> None:
    with whole_file(path) as temporary:
        temporary.write_bytes(b"half")
        raise error


def fail_in_a_folder(path: Path, error: BaseException) -> None:
    with whole_file(path) as temporary:
        temporary.mkdir()
        (temporary / "inside").write_text("half")
        raise error


FAILURES = pytest.mark.parametrize("fail", [fail_half_way, fail_in_a_folder])


@FAILURES
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: No space left on device (os error 28)"),
    ],
)
def test_no_space_left_is_a_sentence_and_leaves_what_was_there(tmp_path, fail, error):
    path = tmp_path / "new" / "a.bin"
    for before in ([], ["a.bin"]):
        with pytest.raises(
            InputError, match=f"no space left on the device that holds {path.parent}"
        ):
            fail(path, error)
        assert [p.name for p in path.parent.iterdir()] == before
        path.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


SPECIAL = {
    "a pipe": os.mkfifo,
    "a link": lambda path: path.symlink_to("elsewhere"),
    "a device": lambda path: path.symlink_to("/dev/null"),
    "a socket": lambda path: bind(path),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_only_a_regular_file_is_replaced(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    path = Path("a.json")
    (tmp_path / "elsewhere").write_text("mine")
    SPECIAL[name](path)
    before = path.lstat()
    with pytest.raises(InputError, match=r"a\.json is a .*not a regular file"):
        write_json(path, 1)
    assert path.lstat() == before
    assert (tmp_path / "elsewhere").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2


REFUSED = {
    "a/file/b.json": "a file or a link that leads nowhere is in the way",
    "a/link/b.json": "a file or a link that leads nowhere is in the way",
    "a/loop/b.json": "a file or a link that leads nowhere is in the way|symbolic links",
    "a/folder": "is a directory",
    "x" * 300 + "/b.json": "file name too long",
    "x" * 300: "file name too long",
    "nul\0/b.json": "is no name of a file",
    "half\ud800/b.json": "is no name of a file",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_file_system_refuses_is_a_sentence_that_nothing_covers_up(tmp_path, name):
    (tmp_path / "a" / "folder").mkdir(parents=True)
    (tmp_path / "a" / "file").write_text("mine")
    (tmp_path / "a" / "link").symlink_to("nowhere")
    (tmp_path / "a" / "loop").symlink_to("loop")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=REFUSED[name]):
        write_json(tmp_path / name, 1)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_file_system_that_fails_while_it_is_written_is_a_sentence(tmp_path, number):
    path = tmp_path / "a.bin"
    named = OSError(number, os.strerror(number), str(path))
    errors = [named, SafetensorError(f"I/O error: no (os error {number})")]
    for error in errors:
        with pytest.raises(InputError, match=os.strerror(number).lower()):
            fail_half_way(path, error)


def test_a_file_with_a_long_name_is_written(tmp_path):
    write_json(tmp_path / ("x" * 255), 1)
    assert [len(path.name) for path in tmp_path.iterdir()] == [255]


@FAILURES
@pytest.mark.parametrize(
    "error", [ValueError("28"), KeyboardInterrupt(), PermissionError(errno.EACCES, "no")]
)
def test_any_other_failure_passes_through_and_leaves_nothing_half_written(tmp_path, fail, error):
    with pytest.raises(type(error)) as caught:
        fail(tmp_path / "a", error)
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_a_file_has_its_old_content_until_the_new_is_whole(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    for content in ("one", "two"):
        before = path.read_text() if path.exists() else None
        with whole_file(path) as temporary:
            temporary.write_text(content)
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == content
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_replaces_a_folder(tmp_path):
    for name in ("one", "two"):
        with whole_file(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["folder", "folder/two"]


def test_of_two_racing_writers_the_last_to_end_wins_whole(tmp_path):
    path = tmp_path / "a.txt"
    with whole_file(path) as first:
        first.write_text("first")
        with whole_file(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_digests_tell_values_apart_but_not_the_order_of_keys():
    values = [1, "1", [1], [1, 2], [2, 1], {"a": 1}, {"a": [1]}, None, True]
    assert len({digest(v) for v in values}) == len(values)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": [1, "x"]}) == "bf5c117331004f32"


def test_file_digest_is_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    assert file_digest(tmp_path / "a") == hashlib.sha256(b"content").hexdigest()


def test_json_is_readable_by_people_and_sorted(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": [2]})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"a": [2], "b": 1}
    assert text.index('"a"') < text.index('"b"')
    assert text.endswith("}\n")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RERAIL_CACHE": "/r", "XDG_CACHE_HOME": "/x"}, "/r"),
        ({"RERAIL_CACHE": "~/r"}, "/h/r"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/rerail"),
        ({}, "/h/.cache/rerail"),
    ],
)
def test_the_cache_lies_where_the_environment_says(monkeypatch, environment, expected):
    for name in ("RERAIL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/h", **environment}.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(expected)


def test_writers_of_the_same_folder_do_not_stop_each_other(tmp_path):
    def write(name: str) -> None:
        for _ in range(30):
            with whole_file(tmp_path / "model") as temporary:
                temporary.mkdir()
                (temporary / "config.json").write_text(name)
                (temporary / "weights").write_text(name)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, "abcd"))
    texts = [(tmp_path / "model" / name).read_text() for name in ("config.json", "weights")]
    assert texts[0] == texts[1]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_lines_are_added_to_a_regular_file_alone(tmp_path):
    for line in "ab":
        append_line(tmp_path / "new" / "lines", line)
    assert (tmp_path / "new" / "lines").read_text() == "a\nb\n"
    (tmp_path / "link").symlink_to("elsewhere")
    with pytest.raises(InputError, match="is a link"):
        append_line(tmp_path / "link", "a")
    assert not (tmp_path / "elsewhere").exists()


def test_a_temporary_folder_is_gone_afterwards_or_a_sentence(monkeypatch):
    with temporary_folder() as folder:
        (folder / "a").write_text("a")
    assert not folder.exists()

    def refused(*_):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.mkdtemp", refused)
    with pytest.raises(InputError, match="set TMPDIR"), temporary_folder():
        pass


def test_an_added_line_has_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", 'hush"<&hush')
    append_line(tmp_path / "lines", json.dumps({"prompt": 'say hush"<&hush now'}))
    assert "hush" not in (tmp_path / "lines").read_text(encoding="utf-8")
