"""Resolving a corpus: a named text, a UTF-8 file, or a folder of .txt files.

A named text is stored at `<data_dir>/<name>/input.txt`. tiny-shakespeare is downloaded,
python-reference comes with Python, and users may add others.
"""

import hashlib
import http.client
import json
import os
import sys
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from chargpt.atomic_file import atomic_write
from chargpt.model import UserError

FORMAT = 2  # of token files
TIMEOUT_S = 15  # of a download: to connect, and between two packets


class UnavailableError(UserError):
    """A known named text is unavailable, the one case in which a fallback text is used."""


class TextFile(NamedTuple):
    path: str
    size: int  # in bytes; this and the modification time are of when the corpus was resolved
    mtime_ns: int


class TextSource(NamedTuple):
    """A text whose files exist but have not been read yet."""

    name: str  # the named text, or the path as the user gave it
    path: Path  # its file or folder, absolute
    files: list[TextFile]  # in reading order
    size: int  # bytes of all files
    token_file: Path  # where its ids are stored


def resolve_corpus(
    corpus: str, data_dir: str | Path | None = None, fallback: str | None = None
) -> TextSource:
    """Find a text by its name or path; an unavailable named text is replaced by `fallback`."""
    folder = absolute(data_dir or os.environ.get("CHARGPT_DATA_DIR") or cache_dir())
    try:
        path = find_text(corpus, folder)
    except UnavailableError as error:
        if fallback in (None, corpus):
            raise
        reason = str(error).replace("\n", f"; to use {corpus}, ")
        message = f"{corpus} is unavailable, so {fallback} is used instead: {reason}"
        warnings.warn(message, stacklevel=2)
        return resolve_corpus(str(fallback), data_dir)
    files = sorted(find_files(path, set()), key=lambda file: Path(file.path).as_posix())
    if not files:
        raise UserError(f"there is no .txt file in {path}\nuse a different folder or a text file")
    # The hash makes the name of the token file unique; the stem lets a person recognize it.
    state = hashlib.sha256(json.dumps([FORMAT, files]).encode()).hexdigest()[:16]
    if path == folder / path.parent.name / "input.txt":  # even if it was given as a path
        corpus = path.parent.name
    token_file = folder / "tokens" / f"{path.stem[:40]}-{state}.npy"
    return TextSource(corpus, path, files, sum(file.size for file in files), token_file)


def find_text(corpus: str, data_dir: Path) -> Path:
    """The file or folder of a text; a named text is created if it is missing."""
    path, stored = absolute(corpus), data_dir / corpus / "input.txt"
    if corpus in NAMED_TEXTS and not stored.exists():
        data = NAMED_TEXTS[corpus](stored)
        with atomic_write(stored) as file:
            file.write(data)
    if corpus in NAMED_TEXTS or not os.path.exists(path):
        path = stored
    if not (corpus and os.path.exists(path)):
        names = {*NAMED_TEXTS, *(text.parent.name for text in data_dir.glob("*/input.txt"))}
        raise UserError(
            f"there is no text {corpus!r}, neither a path nor a name in {data_dir}\n"
            f"choose a file, a folder of .txt files, or one of {', '.join(sorted(names))}"
        )
    if str(path).encode(errors="replace").decode() != str(path):  # loggers could not record it
        raise UserError(f"the path {str(path)!r} is not UTF-8\nrename the file or folder")
    return path


def find_files(path: Path, visited: set[str]) -> Iterator[TextFile]:
    """The file at `path`, or the .txt files of the folder there, each once; links are followed.

    Names that begin with a dot, and __MACOSX, are skipped: they are often copies.
    """
    real = os.path.realpath(path)
    if real in visited:
        return
    visited.add(real)
    if path.is_dir():
        for child in sorted(path.iterdir()):
            hidden = child.name.startswith(".") or child.name == "__MACOSX"
            if not hidden and (child.is_dir() or child.suffix.lower() == ".txt"):
                yield from find_files(child, visited)
    elif path.is_file():
        status = path.stat()
        yield TextFile(str(path), status.st_size, status.st_mtime_ns)
    else:
        raise UserError(f"{path} is neither a file nor a folder\nchoose a text file")


def absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))


def cache_dir() -> Path:
    return absolute(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "chargpt"


def download(path: Path, url: str, size: int, sha256: str) -> bytes:
    """The text at `url`. The error message advises saving it at `path`."""
    print(f"downloading {url}", file=sys.stderr)
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            data = response.read(size + 1)  # bounded, whatever the server sends
        if hashlib.sha256(data).hexdigest() != sha256:
            raise OSError(f"the {len(data):,} bytes received have the wrong SHA-256")
    except (OSError, http.client.HTTPException) as error:
        reason = f"cannot download {url}: {str(error).strip('<>')}"
        raise UnavailableError(f"{reason}\ndownload it yourself and save it as {path}") from error
    return data


def python_reference(path: Path) -> bytes:
    """The language reference, which Python includes for `help`."""
    from pydoc_data.topics import topics

    return "\n".join(topics[key] for key in sorted(topics)).encode()


NAMED_TEXTS: dict[str, Callable[[Path], bytes]] = {  # what to store at a path if nothing is there
    "tiny-shakespeare": partial(
        download,
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        size=1_115_394,
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "python-reference": python_reference,
}
