"""One redaction for every writer, however a secret is spelled by then."""

import html
import io
import json
import shlex
import sys
import urllib.parse

import pytest

from rerail.config.secrets import guard_streams, redacted, without_secrets
from rerail.files import write_json
from rerail.store import Artefact, read, write

SECRET = "a<b&c'd\"e-12345"


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)


@pytest.mark.parametrize(
    "spelled",
    [
        SECRET,
        repr(SECRET),
        json.dumps(SECRET),
        html.escape(SECRET),
        "a&lt;b&amp;c&#39;d&#34;e-12345",
        urllib.parse.quote(SECRET),
        shlex.quote(SECRET),
        SECRET.replace("'", "\\'"),
    ],
)
def test_every_spelling_is_hidden(spelled):
    left = redacted(f"x {spelled} y")
    assert left.startswith("x ")
    assert left.endswith(" y")
    assert "12345" not in left
    assert "(hidden)" in left


@pytest.mark.parametrize(
    ("variable", "hides"),
    [
        ("SLACK_TOKENS", True),
        ("GITHUB_PAT", True),
        ("MY_PRIVATE_KEY", True),
        ("HF_TOKEN_READ", True),
        ("TOKENIZERS_PARALLELISM", False),
        ("SSH_AUTHORITY", False),
        ("KEYBOARD", False),
    ],
)
def test_which_variables_are_secret(variable, hides, monkeypatch):
    monkeypatch.setenv(variable, "value-of-it")
    assert (redacted("value-of-it") == "(hidden)") is hides


def test_files_and_seals_hold_no_secret_and_read_back(tmp_path):
    write_json(tmp_path / "a.json", {"b": [SECRET], "token": "not a choice"})
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "b": ["(hidden)"],
        "token": "not a choice",
    }
    write(tmp_path / "sealed.json", Artefact({"text": SECRET}))
    stored = read(tmp_path / "sealed.json")
    assert stored is not None
    assert stored.data == {"text": "(hidden)"}


def test_a_terminal_of_another_encoding_gets_what_it_can_show(monkeypatch):
    below = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(below, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    guard_streams()
    guard_streams()
    print(f"é {SECRET}", flush=True)  # noqa: T201
    assert below.getvalue() == b"? (hidden)\n"


def test_a_command_keeps_the_variable_and_not_its_value():
    words = ["rerail", f"prompt={SECRET}", "prompt=${oc.env:HF_TOKEN}"]
    referring = without_secrets(words, references=True)
    assert shlex.join(referring) == "rerail 'prompt=${oc.env:HF_TOKEN}' 'prompt=${oc.env:HF_TOKEN}'"
