"""Files and folders that are whole or absent, whatever happens while they are written."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path, mtime_ns: int | None = None) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` when all went well and else leaves nothing.

    It is written beside `path` and renamed when the disk has it: whoever reads finds the old file
    or the new one. Of several processes that do this at once the last one wins.

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


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when all went well and else leaves nothing.

    Raises:
        FileExistsError: `path` is a file, or a folder that holds something.
    """
    if path.is_dir():
        if any(path.iterdir()):
            raise FileExistsError(f"{path} holds files already; name another folder, or empty it")
    elif path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} is a file; name a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        if path.is_dir():
            path.rmdir()  # empty: renaming onto a folder is an error on Windows
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
