"""Atomic writes, with concurrent writers and with one that is killed."""

import errno
import os
import subprocess
import sys

import pytest

from chargpt.atomic_file import atomic_write


def test_a_file_is_replaced_only_after_success(tmp_path):
    path = tmp_path / "new" / "folder" / "a[b].txt"
    with atomic_write(path) as file:
        file.write(b"one")
        assert not path.exists()
    with pytest.raises(KeyError), atomic_write(path) as file:
        file.write(b"two")
        raise KeyError
    assert path.read_bytes() == b"one"
    assert os.listdir(path.parent) == ["a[b].txt"]


def test_two_writers_at_once_do_not_delete_each_others_files(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as one:
        one.write(b"one")
        one.flush()
        with atomic_write(path) as two:
            two.write(b"two")
        assert path.read_bytes() == b"two"
    assert path.read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_killed_process_leaves_the_file_as_it_was(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from chargpt.atomic_file import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os._exit(9)\n"
    )
    path = tmp_path / "a.txt"
    path.write_text("whole")
    assert subprocess.run([sys.executable, "-c", script, str(path)]).returncode == 9
    assert path.read_text() == "whole"


@pytest.mark.parametrize("fault", ["a folder", "a file as its folder", "a full disk"])
def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path, monkeypatch, fault):
    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "a" / "b.txt"
    if fault == "a folder":
        path.mkdir(parents=True)
    elif fault == "a file as its folder":
        path.parent.touch()
    else:
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as error, atomic_write(path) as file:
        file.write(b"text")
    assert error.value.filename == str(path) and ".tmp" not in str(error.value)
    assert not list(tmp_path.rglob("*.tmp"))
