"""Folders that cannot be made or written are one sentence and exit status 2, before heavy work."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from rerail import __main__ as surface
from rerail.run import task

FIXED = ("compressor=aimer", "ratio=half", "distill=none", "evaluation.new_tokens=0", "debug=fast")


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Run `rerail` in this process; its exit status and all that it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RERAIL_CACHE", str(tmp_path / "cache"))

    def run(*words: str) -> tuple[int, str]:
        GlobalHydra.instance().clear()
        for name, value in (("started", False), ("failed", False), ("out", None)):
            monkeypatch.setattr(task.Outcome, name, value)
        monkeypatch.setattr(sys, "argv", ["rerail", *words, *FIXED, "samples.count=12"])
        with pytest.raises(SystemExit) as ended:
            surface.main()
        return int(ended.value.code or 0), "".join(capfd.readouterr())

    return run


def as_nobody(*words: str, **variables: str) -> tuple[int, str]:
    """Run `rerail` as the user nobody, whose cache is where the variables say."""
    kept = {n: v for n, v in os.environ.items() if n not in ("RERAIL_CACHE", "XDG_CACHE_HOME")}
    prefix = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    command = [*prefix, sys.executable, "-m", "rerail", *words, *FIXED, "samples.count=12"]
    env = {**kept, **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    return done.returncode, done.stdout + done.stderr


IN_THE_WAY = {
    "a file": lambda path: path.write_text("x"),
    "a link that leads nowhere": lambda path: path.symlink_to("nowhere/at/all"),
    "a link to itself": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_what_stands_in_the_way_of_the_folder_is_named(run, name: str, tmp_path: Path) -> None:
    way = tmp_path / "way"
    IN_THE_WAY[name](way)
    for words in ((f"out={way}/x",), ("-m", f"out={way}/x", "seed=0,1")):
        code, message = run(*words)
        assert (code, "Traceback" in message) == (2, False), message
        assert f"{way}" in message
        assert "cannot be written (" in message
        assert "evaluate" not in message


def test_a_cache_below_a_file_is_found_before_the_model_loads(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("RERAIL_CACHE", f"{tmp_path}/file/cache")
    code, message = run(f"out={tmp_path / 'out'}")
    assert (code, "Traceback" in message) == (2, False), message
    assert "file/cache cannot be written (" in message
    assert "RERAIL_CACHE" in message
    assert "load" not in message


def test_names_that_no_file_can_have_are_refused(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 300)
    for words in ((f"out={long}",), ("-m", f"out={long}")):
        code, message = run(*words)
        assert (code, "Traceback" in message) == (2, False), message
        assert "file name too long" in message
    monkeypatch.setenv("RERAIL_CACHE", "~nobody-of-this-name/cache")
    code, message = run(f"out={tmp_path}")
    assert (code, "Traceback" in message) == (2, False), message
    assert "set RERAIL_CACHE" in message


def test_what_the_summary_cannot_replace_is_named_after_the_run(run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    os.mkfifo(out / "results.csv")
    code, message = run(f"out={out}")
    assert (code, "Traceback" in message) == (2, False), message
    assert f"{out / 'results.csv'} is a pipe, a device or a socket" in message
    assert (out / "results.csv").is_fifo()


@pytest.mark.slow
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
    code, message = as_nobody(f"out={tmp_path / 'free'}", HOME="/nonexistent")
    assert (code, "Traceback" in message) == (2, False), message
    assert "/nonexistent" in message
    assert "RERAIL_CACHE" in message
    free = {"RERAIL_CACHE": str(tmp_path / "free" / "cache")}
    code, message = as_nobody(f"out={tmp_path / 'closed'}", **free)
    assert (code, "Traceback" in message) == (2, False), message
    assert "permission denied" in message
