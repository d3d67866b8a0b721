"""Files that are whole or absent, whatever happens while they are written."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path, mtime_ns: int | None = None) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` when all went well and else leaves nothing.

    It is written beside `path` and renamed when the disk has it: whoever reads finds the old file or
    the new one. Of several processes that do this at once the last one wins.

    Args:
        path: where the file shall stand; folders that are missing are made.
        mtime_ns: the modification time to give it, in nanoseconds; now unless given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if mtime_ns is not None:
            os.utime(temporary, ns=(mtime_ns, mtime_ns))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
