"""Atomic writing: a file is whole or absent, whatever happens while it is written."""

import glob
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, which lets nobody remove a file that is open
    fcntl = None


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the place of `path` if all goes well, else leaves nothing.

    It is written beside `path` and renamed when the disk has it: whoever reads finds the old file
    or the new one. Of several processes that do this at once the last one wins. What a process
    that was killed has left of `path` is removed. Folders that are missing are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            with suppress(OSError):  # a file system without locks: nothing is swept there
                lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(path: Path) -> None:
    """Remove half-written files of `path` whose writer is gone: it would hold a lock."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError):
            with open(left, "rb") as file:
                lock(file)  # fails where somebody writes
                begun = os.fstat(file.fileno()).st_size > 0  # an empty one may not be locked yet
            if begun:
                left.unlink()


def lock(file: BinaryIO) -> None:
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
