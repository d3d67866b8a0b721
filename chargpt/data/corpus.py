"""Finding a text: a named text, a UTF-8 file, or a folder of .txt files.

Named texts lie at `<data_dir>/<name>/input.txt`: tiny-shakespeare is downloaded, python-reference
comes with every Python, and any other name is a folder that somebody put there.
"""

import hashlib
import http.client
import json
import os
import stat
import sys
import urllib.request
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from chargpt.atomic_file import atomic_write

TINY_SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINY_SHAKESPEARE_BYTES = 1_115_394
TIMEOUT_S = 15  # for connecting, and for each silence of the server


class CorpusError(ValueError):
    """The text can't be had or can't be used. The message says what, where and what to do."""


class UnavailableError(CorpusError):
    """A known named text can't be had here: the one case in which a fallback is used."""


class FallbackWarning(UserWarning):
    """Another text than the one asked for is used."""


class Source(NamedTuple):
    """A file of a text, as it stood when the text was found."""

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Text:
    """A text that was found."""

    name: str  # the named text, or the path as it was given
    path: Path  # its file or folder, absolute
    sources: list[Source]  # its files, in the order in which they are read
    token_files: list[Path]  # where its token file may stand, the best place first


def find_text(corpus: str, data_dir: str | Path | None = None, fallback: str | None = None) -> Text:
    """Find a text by its name or path.

    Args:
        corpus: a named text, a UTF-8 text file, or a folder.
        data_dir: where named texts and token files are kept, `default_data_dir()` if not given.
        fallback: used instead, after a FallbackWarning, where a known named text can't be had.
    """
    data_dir = Path(os.path.abspath(os.path.expanduser(data_dir or default_data_dir())))
    try:
        return locate(corpus, data_dir)
    except UnavailableError as error:
        if fallback is None or fallback == corpus:
            raise
        rule = "*" * 80
        warnings.warn(
            f"\n{rule}\n{corpus} CAN'T BE HAD. THE TEXT USED IN ITS PLACE IS {fallback}.\n"
            f"{error}\n{rule}",
            FallbackWarning,
            stacklevel=2,
        )
        return locate(fallback, data_dir)


def default_data_dir() -> Path:
    """The folder that CHARGPT_DATA_DIR names, else the user's cache directory."""
    return Path(os.environ.get("CHARGPT_DATA_DIR") or cache_dir())


def cache_dir() -> Path:
    """The user's cache directory, where the system keeps such things."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.abspath(os.path.expanduser(base)), "chargpt")


def locate(corpus: str, data_dir: Path) -> Text:
    """Turn a name or a path into a Text."""
    given = Path(os.path.abspath(os.path.expanduser(corpus)))
    kept = data_dir / corpus / "input.txt"
    if corpus in NAMED_TEXTS:
        path, token_dir = kept, kept.parent
        try:
            NAMED_TEXTS[corpus](path)
        except OSError as error:
            raise UnavailableError(
                f"{path} can't be read or written: {error.strerror}\n"
                "set CHARGPT_DATA_DIR (or data_dir) to another folder"
            ) from error
    elif corpus and os.path.exists(given):
        path, token_dir = given, data_dir / "tokens"
    elif corpus and os.path.isfile(kept):
        path, token_dir = kept, kept.parent
    else:
        names = {*NAMED_TEXTS, *(file.parent.name for file in data_dir.glob("*/input.txt"))}
        raise CorpusError(
            f"there is no text {corpus!r}: no such file or folder, nor a name in {data_dir}\n"
            f"give a text file, a folder of .txt files, or one of {', '.join(sorted(names))}"
        )
    if str(path).encode(errors="replace").decode() != str(path):  # a run must record it
        raise CorpusError(f"the path {str(path)!r} is not UTF-8\nrename the file or folder")
    sources = find_sources(path)
    # The sources make the name unique, its beginning lets a person recognize it.
    state = hashlib.sha256(json.dumps(sources).encode()).hexdigest()[:16]
    token_dirs = dict.fromkeys([token_dir, cache_dir() / "tokens"])
    return Text(corpus, path, sources, [d / f"{path.stem[:40]}-{state}.npy" for d in token_dirs])


def find_sources(path: Path) -> list[Source]:
    """The file at `path` or the .txt files of the folder there, sub-folders included, sorted."""

    def fail(error: OSError) -> None:
        raise error  # os.walk would leave out what it can't read, without a word

    try:
        files = [path]
        if os.path.isdir(path):
            walk = os.walk(path, onerror=fail)
            files = [Path(folder, name) for folder, _, names in walk for name in names]
            files = [file for file in files if file.suffix.lower() == ".txt"]
            files.sort(key=lambda file: file.relative_to(path).as_posix())
        statuses = {file: os.stat(file) for file in files}
    except OSError as error:
        raise CorpusError(f"{error.filename} can't be read: {error.strerror}") from error
    if not files:
        raise CorpusError(
            f"the folder {path} and its sub-folders hold no .txt file\n"
            "choose another folder, or a file; linked folders are not looked into"
        )
    for file, status in statuses.items():
        if not stat.S_ISREG(status.st_mode):
            raise CorpusError(f"{file} is neither a file nor a folder\nchoose a text file")
    return [Source(str(f), status.st_size, status.st_mtime_ns) for f, status in statuses.items()]


def tiny_shakespeare(path: Path) -> None:
    """Download tiny-shakespeare, unless it is there; another text there is left as it is."""
    if path.exists():
        check_digest(path.read_bytes(), str(path), "delete it, and it will be downloaded again")
        return
    print(f"downloading {TINY_SHAKESPEARE_URL}", file=sys.stderr)
    by_hand = f"download it by hand to {path}"
    try:
        with urllib.request.urlopen(TINY_SHAKESPEARE_URL, timeout=TIMEOUT_S) as response:
            data = response.read(TINY_SHAKESPEARE_BYTES + 1)  # an endless answer ends there
    except (OSError, http.client.HTTPException) as error:
        reason = str(error).strip("<>")
        raise UnavailableError(
            f"{TINY_SHAKESPEARE_URL} can't be downloaded: {reason}\n{by_hand}"
        ) from error
    check_digest(data, f"what came from {TINY_SHAKESPEARE_URL}", by_hand)
    with atomic_write(path) as file:
        file.write(data)


def check_digest(data: bytes, what: str, advice: str) -> None:
    if hashlib.sha256(data).hexdigest() != TINY_SHAKESPEARE_SHA256:
        kind = "a web page of " if data.lstrip()[:1] == b"<" else ""
        raise UnavailableError(
            f"{what} is not tiny-shakespeare: {kind}{len(data):,} bytes with another SHA-256, "
            f"not {TINY_SHAKESPEARE_BYTES:,} bytes with {TINY_SHAKESPEARE_SHA256[:12]}...\n{advice}"
        )


def python_reference(path: Path) -> None:
    """Write out the language reference that Python carries along for its `help`."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UnavailableError(
            "python-reference can't be had: this Python comes without pydoc_data\n"
            "choose another corpus"
        ) from error
    data = "\n".join(topics[key] for key in sorted(topics)).encode()
    if not path.exists() or path.read_bytes() != data:
        with atomic_write(path) as file:
            file.write(data)


NAMED_TEXTS: dict[str, Callable[[Path], None]] = {  # name -> puts the text in its place
    "tiny-shakespeare": tiny_shakespeare,
    "python-reference": python_reference,
}
