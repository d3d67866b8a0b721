"""Files that are whole or absent, also where several processes write and one is killed."""

import os
import signal
import subprocess
import sys

import pytest

from chargpt.atomic_file import atomic_write

ON_UNIX = pytest.mark.skipif(sys.platform == "win32", reason="no such signal")


def test_a_file_takes_its_place_only_when_all_went_well(tmp_path):
    path = tmp_path / "new" / "folder" / "a[b].txt"
    with atomic_write(path) as file:
        file.write(b"one")
        assert not path.exists()
    with pytest.raises(KeyError), atomic_write(path) as file:
        file.write(b"two")
        raise KeyError
    assert path.read_bytes() == b"one"
    assert os.listdir(path.parent) == ["a[b].txt"]


def test_of_two_that_write_at_once_neither_takes_away_what_the_other_has_begun(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as one:
        one.write(b"one")
        one.flush()
        with atomic_write(path) as two:
            two.write(b"two")
        assert path.read_bytes() == b"two"
    assert path.read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["a.txt"]


@ON_UNIX
def test_what_a_killed_process_leaves_is_swept_by_the_next_who_writes_that_file(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from chargpt.atomic_file import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for name in ("a[b].txt", "other.txt"):
        run = subprocess.run([sys.executable, "-c", script, str(tmp_path / name)])
        assert run.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2
    with atomic_write(tmp_path / "a[b].txt") as file:
        file.write(b"whole")
    (left,) = tmp_path.glob(".*.tmp")
    assert left.name.startswith(".other.txt.")


@ON_UNIX
def test_what_another_has_only_just_opened_is_not_swept(tmp_path):
    """It may not hold its lock yet."""
    begun = tmp_path / ".a.txt.0123.tmp"
    begun.touch()
    with atomic_write(tmp_path / "a.txt") as file:
        file.write(b"whole")
    assert begun.exists()
