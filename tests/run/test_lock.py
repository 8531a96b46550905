"""Two processes of one cell: the second one waits for the first, however that ends."""

import subprocess
import sys
from pathlib import Path

import pytest

from rerail.errors import InputError
from rerail.run import lock

HOLD = """
import sys
from pathlib import Path
from rerail.run.lock import only_process
with only_process(Path(sys.argv[1])):
    print("inside", flush=True)
    sys.stdin.read()
"""


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLD, str(folder)]
    return subprocess.Popen(command, stdin=-1, stdout=-1, text=True)


@pytest.mark.parametrize("end", ["kill", "communicate"])
def test_a_second_process_waits_until_the_first_has_ended(tmp_path, end):
    folder = tmp_path / "out" / "cell"
    first = start(folder)
    assert first.stdout.readline() == "inside\n"
    second = start(folder)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(timeout=2)
        getattr(first, end)()
        assert second.stdout.readline() == "inside\n"
        second.communicate()
        assert second.returncode == 0
        assert list((tmp_path / "out").iterdir()) == []
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


def test_another_cell_does_not_wait_and_where_no_locks_are_nobody_does(tmp_path, monkeypatch):
    import fcntl

    with lock.only_process(tmp_path / "a"), lock.only_process(tmp_path / "b"):
        assert len(list(tmp_path.iterdir())) == 2

    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with lock.only_process(tmp_path / "a"), lock.only_process(tmp_path / "a"):
        pass


def test_only_the_first_of_several_processes_has_a_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "is_first", lambda: False)
    with lock.only_process(tmp_path / "a"), lock.only_process(tmp_path / "a"):
        assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / ".b.lock").symlink_to("elsewhere")
    for folder in (tmp_path / "file" / "a", tmp_path / "b"):
        with pytest.raises(InputError, match="cannot be written"), lock.only_process(folder):
            pass
    assert not (tmp_path / "elsewhere").exists()
