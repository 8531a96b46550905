"""Artefacts: whole, sealed, and made again when they are damaged or their code has changed."""

import json
import logging

import pytest
import torch

from rerail import store
from rerail.errors import InputError
from rerail.store import Artefact, get, is_sound, read, remove_sealed, sealed_file, write

TENSORS = {"a": torch.arange(6).view(2, 3), "b": torch.randn(4).bfloat16()}
MADE = Artefact({"b": [1, 2.5, None], "a": {"text": "\u00e9"}}, TENSORS)


def other() -> None:
    """Other code."""


def never():
    pytest.fail("made again")


def same(one: Artefact, two: Artefact) -> bool:
    assert one.data == two.data
    assert list(one.data) == list(two.data)
    assert one.tensors.keys() == two.tensors.keys()
    assert all(one.tensors[n].dtype == two.tensors[n].dtype for n in one.tensors)
    return all(torch.equal(one.tensors[n], two.tensors[n]) for n in one.tensors)


def test_an_artefact_is_made_once_and_read_back_as_it_was_returned(tmp_path):
    path = tmp_path / "deep" / "a.json"
    made = get(path, lambda: MADE, [other])
    assert list(made.data) == ["a", "b"]
    assert same(get(path, never, [other]), made)
    assert sorted(p.name for p in path.parent.iterdir()) == ["a.json", "a.safetensors"]


def test_plain_data_alone_needs_one_file(tmp_path):
    get(tmp_path / "a.json", lambda: Artefact([1, "x"]), [other])
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert get(tmp_path / "a.json", never, [other]) == Artefact([1, "x"])


def test_tensors_that_are_views_or_need_gradients_are_stored_as_values(tmp_path):
    tensor = torch.randn(3, 4, requires_grad=True)
    write(tmp_path / "a.json", Artefact(None, {"t": tensor.T}))
    found = read(tmp_path / "a.json")
    assert found is not None
    assert torch.equal(found.tensors["t"], tensor.detach().T)


def test_what_was_never_made_is_absent_without_a_word(tmp_path, caplog):
    assert read(tmp_path / "a.json") is None
    assert caplog.text == ""


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("a.safetensors", flip),
        ("a.safetensors", lambda b: b[:-8]),
        ("a.safetensors", None),
        ("a.json", lambda b: b[:-3]),
        ("a.json", lambda b: b.replace(b"2.5", b"2.6")),
        ("a.json", lambda _: b""),
        ("a.json", lambda b: b"\xff" + b),
        ("a.json", lambda _: b"null"),
        ("a.json", lambda _: b"[1]"),
        ("a.json", lambda _: b'{"content": 1}'),
        ("a.json", lambda _: json.dumps({"sha256": store.digest([1]), "content": [1]}).encode()),
    ],
)
def test_damage_is_logged_and_the_artefact_made_again(tmp_path, caplog, name, damage):
    path = tmp_path / "a.json"
    get(path, lambda: MADE, [other])
    hurt = tmp_path / name
    if damage is None:
        hurt.unlink()
    else:
        assert damage(hurt.read_bytes()) != hurt.read_bytes()
        hurt.write_bytes(damage(hurt.read_bytes()))
    again = Artefact({"again": True}, {"a": torch.ones(1)})
    with caplog.at_level(logging.WARNING):
        assert same(get(path, lambda: again, [other]), again)
    assert f"{hurt} is damaged" in caplog.text
    assert same(get(path, never, [other]), again)


def test_other_code_makes_the_artefact_again(tmp_path, monkeypatch, caplog):
    path = tmp_path / "a.json"
    get(path, lambda: MADE, [other])
    get(path, never, [other])
    monkeypatch.setattr(store, "code_version", lambda *_: "mended")
    new = Artefact({}, {"a": torch.ones(1)})
    with caplog.at_level(logging.WARNING):
        assert same(get(path, lambda: new, [other]), new)
    assert caplog.text == ""  # nothing is wrong
    assert same(get(path, never, [other]), new)


def test_the_function_around_is_the_code_unless_another_is_named(tmp_path, monkeypatch):
    versions = []
    monkeypatch.setattr(store, "code_version", lambda *code: versions.append(code) or "v")
    get(tmp_path / "a.json", never_made := (lambda: Artefact(1)))
    get(tmp_path / "b.json", lambda: Artefact(1), [other, Artefact])
    assert versions == [(never_made,), (other, Artefact)]


def test_nothing_half_made_is_left_behind(tmp_path):
    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        get(tmp_path / "a.json", broken, [other])
    with pytest.raises(TypeError, match="has nothing to hold"):
        get(tmp_path / "a.json", lambda: None, [other])
    assert list(tmp_path.iterdir()) == []


def test_a_sealed_file_is_sound_until_a_byte_of_it_changes(tmp_path, caplog):
    path = tmp_path / "fit.ckpt"
    assert not is_sound(path)
    with sealed_file(path) as temporary:
        temporary.write_bytes(b"first")
    assert is_sound(path)
    assert caplog.text == ""
    path.write_bytes(b"fjrst")
    with caplog.at_level(logging.WARNING):
        assert not is_sound(path)
    assert f"{path} is damaged" in caplog.text
    remove_sealed(path)
    remove_sealed(path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_a_seal_is_not_sound(tmp_path):
    (tmp_path / "fit.ckpt").write_bytes(b"content")
    assert not is_sound(tmp_path / "fit.ckpt")


@pytest.mark.parametrize("when", ["before the seal", "before the file"])
def test_a_writer_killed_at_any_moment_leaves_a_sound_file(tmp_path, monkeypatch, when):
    path = tmp_path / "fit.ckpt"
    with sealed_file(path) as temporary:
        temporary.write_bytes(b"old")

    class Killed(BaseException):
        pass

    def die(*_args):
        raise Killed

    if when == "before the seal":
        monkeypatch.setattr(store, "_write_sealed", die)
    else:
        monkeypatch.setattr("rerail.files._take_name", _once_then(die))
    with pytest.raises(Killed), sealed_file(path) as temporary:
        temporary.write_bytes(b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert is_sound(path)
    with sealed_file(path) as temporary:
        temporary.write_bytes(b"new")
    assert is_sound(path)


def _once_then(die):
    """Let the seal take its name, and die when the file would."""
    from rerail.files import _take_name

    def take(temporary, path):
        return _take_name(temporary, path) if path.suffix == ".seal" else die()

    return take


def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch):
    def full(*_args, **_named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(InputError, match="no space left on the device"):
        write(tmp_path / "a.json", MADE)
    assert list(tmp_path.iterdir()) == []
