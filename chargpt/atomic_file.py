"""Atomic writing: readers find the old file or the new one, never a part of it."""

import glob
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` at the end, or is deleted after an error.

    If several processes write at once, the last one wins. Files of killed processes are deleted.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            with suppress(OSError):
                if leftover.stat().st_size:  # an empty file may not be locked yet
                    with open(leftover, "rb") as file:
                        lock(file)  # fails while another process is writing it
                    leftover.unlink()
        with open(temporary, "xb") as file:
            with suppress(OSError):  # without locks nothing is deleted
                lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # name the file that the caller knows
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def lock(file: BinaryIO) -> None:
    with suppress(ImportError):  # Windows, where an open file cannot be deleted anyway
        from fcntl import LOCK_EX, LOCK_NB, flock

        flock(file, LOCK_EX | LOCK_NB)
