"""Folders that cannot be made or written are one sentence and exit status 2, before heavy work."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FIXED = ("compressor=aimer", "ratio=half", "distill=none", "evaluation.new_tokens=0", "debug=fast")


def run(*words: str, prefix: tuple[str, ...] = (), **variables: str) -> tuple[int, str]:
    """Run `rerail`; its exit status and all that it said."""
    removed = ("RERAIL_CACHE", "XDG_CACHE_HOME") if "HOME" in variables else ()
    env = {n: v for n, v in os.environ.items() if n not in removed} | variables
    command = [*prefix, sys.executable, "-m", "rerail", *words, *FIXED, "samples.count=12"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


IN_THE_WAY = {
    "a file": lambda path: path.write_text("x"),
    "a link that leads nowhere": lambda path: path.symlink_to("nowhere/at/all"),
    "a link to itself": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_what_stands_in_the_way_of_the_folder_is_named(
    name: str, tmp_path: Path, cache: str
) -> None:
    way = tmp_path / "way"
    IN_THE_WAY[name](way)
    for words in ((f"out={way}/x",), ("-m", f"out={way}/x", "seed=0,1")):
        code, message = run(*words, RERAIL_CACHE=cache)
        assert (code, "Traceback" in message) == (2, False), message
        assert f"{way}" in message
        assert "cannot be written (" in message
        assert "evaluate" not in message


def test_a_cache_below_a_file_is_found_before_the_model_loads(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    code, message = run(f"out={tmp_path / 'out'}", RERAIL_CACHE=f"{tmp_path}/file/cache")
    assert (code, "Traceback" in message) == (2, False), message
    assert "file/cache cannot be written (" in message
    assert "RERAIL_CACHE" in message
    assert "load" not in message


def test_names_that_no_file_can_have_are_refused(tmp_path: Path, cache: str) -> None:
    long = tmp_path / ("x" * 300)
    for words in ((f"out={long}",), ("-m", f"out={long}")):
        code, message = run(*words, RERAIL_CACHE=cache)
        assert (code, "Traceback" in message) == (2, False), message
        assert "file name too long" in message
    code, message = run(f"out={tmp_path}", RERAIL_CACHE="~nobody-of-this-name/cache")
    assert (code, "Traceback" in message) == (2, False), message
    assert "set RERAIL_CACHE" in message


def test_what_the_summary_cannot_replace_is_named_after_the_run(tmp_path: Path, cache: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    os.mkfifo(out / "results.csv")
    code, message = run(f"out={out}", RERAIL_CACHE=cache)
    assert (code, "Traceback" in message) == (2, False), message
    assert f"{out / 'results.csv'} is a pipe, a device or a socket" in message
    assert (out / "results.csv").is_fifo()


@pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("setpriv") is None, reason="needs root to become another user"
)
def test_a_user_without_a_home_is_told_of_the_cache(tmp_path: Path) -> None:
    for path in (tmp_path, *tmp_path.parents):
        if path.owner() == "root" and len(path.parts) > 2:
            path.chmod(0o755)
    (tmp_path / "free").mkdir()
    (tmp_path / "free").chmod(0o777)
    (tmp_path / "closed").mkdir(mode=0o755)
    prefix = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    code, message = run(f"out={tmp_path / 'free'}", prefix=prefix, HOME="/nonexistent")
    assert (code, "Traceback" in message) == (2, False), message
    assert "/nonexistent" in message
    assert "RERAIL_CACHE" in message
    free = {"RERAIL_CACHE": str(tmp_path / "free" / "cache")}
    for words in ((), ("-m",)):
        code, message = run(*words, f"out={tmp_path / 'closed'}", prefix=prefix, **free)
        assert (code, "Traceback" in message) == (2, False), message
        assert "permission denied" in message
