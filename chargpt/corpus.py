"""Where the text comes from: named corpora, a file, or a folder of files.

A text is encoded once, in a stream, into a token file: one id per character in the narrowest
unsigned integer type that holds the vocabulary. Training reads it through `numpy.memmap`, so that
a text larger than memory costs no more per step than a small one. The next start finds the token
file by the path, size and modification time of the text, and reads no text at all.
"""

from __future__ import annotations

import codecs
import hashlib
import http.client
import json
import os
import stat
import struct
import sys
import time
import urllib.request
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from chargpt.files import whole_file
from chargpt.vocabulary import UnknownCharacterError, Vocabulary, code_points

TINY_SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINY_SHAKESPEARE_BYTES = 1_115_394
TIMEOUT_S = 15  # for connecting, and for each silence of the server

PIECE_BYTES = 1 << 17  # read at a time: long enough for numpy, short enough for the CPU's cache
CHECKED_BYTES = 1 << 28  # token files up to this size have every id checked when they are opened

MAGIC = b"chargpt\n"
FORMAT = 1
PREFIX = struct.Struct("<8sIQ")  # magic, CRC-32 of the header, length of the header in bytes
ALIGNMENT = 64  # bytes; the first token stands at a multiple of this


class CorpusError(ValueError):
    """The text can't be had or can't be used. The message says what, where and what to do."""


class UnavailableError(CorpusError):
    """A known named corpus can't be had here: the one case in which a fallback is used."""


class FallbackWarning(UserWarning):
    """Another text than the one asked for is used."""


class TokenFileWarning(UserWarning):
    """A token file can't be used as it is, and the text is encoded again."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text as ids, open for reading at any place.

    Attributes:
        name: the named corpus, or the path as it was given.
        path: the text file or folder, absolute.
        vocabulary: the characters of the whole text.
        tokens: the ids of its characters: shape (characters,), of `vocabulary.dtype`, read-only.
        digest: SHA-256 of the text's bytes, in hexadecimal.
    """

    name: str
    path: Path
    vocabulary: Vocabulary
    tokens: np.memmap
    digest: str


Opened = tuple[Vocabulary, np.memmap, str]  # what a token file gives a Corpus


def open_corpus(
    corpus: str, data_dir: str | Path | None = None, fallback: str | None = None
) -> Corpus:
    """Find a text, encode it unless that was done before, and open it.

    Args:
        corpus: `tiny-shakespeare`, `python-reference`, a UTF-8 text file, a folder (its .txt
            files, sub-folders included, in the order of their relative paths), or the name of
            a folder in `data_dir` that holds an `input.txt`.
        data_dir: where named texts and token files are kept, `default_data_dir()` if not given.
            What can't be written there goes to the user's cache directory.
        fallback: what to use instead, after a FallbackWarning, when a known named corpus can't
            be had. The Corpus then bears the fallback's name.

    Raises:
        CorpusError: there is no such text, or it can't be used.
    """
    data_dir = Path(os.path.abspath(os.path.expanduser(data_dir or default_data_dir())))
    try:
        return _open(corpus, data_dir)
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
        return _open(fallback, data_dir)


def default_data_dir() -> Path:
    """The folder that CHARGPT_DATA_DIR names, else the user's cache directory."""
    return Path(os.environ.get("CHARGPT_DATA_DIR") or _cache_dir())


def _cache_dir() -> Path:
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.abspath(os.path.expanduser(base)), "chargpt")


def _open(corpus: str, data_dir: Path) -> Corpus:
    path, is_named = _locate(corpus, data_dir)
    sources = _look_at(path)
    # The whole path makes the name unique, its last part lets a person recognise it.
    key = f"{path.stem[:40]}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}.tokens"
    first = path.with_suffix(".tokens") if is_named else data_dir / "tokens" / key
    token_files = list(dict.fromkeys([first, _cache_dir() / "tokens" / key]))
    for token_file in token_files:
        if opened := _open_tokens(token_file, sources):
            return Corpus(corpus, path, *opened)
    return Corpus(corpus, path, *_encode(path, sources, token_files))


# --- locating ---------------------------------------------------------------------------------


def _locate(corpus: str, data_dir: Path) -> tuple[Path, bool]:
    """The text's file or folder, and whether it is a named text, kept in a data directory."""
    if corpus in KNOWN:
        return KNOWN[corpus](list(dict.fromkeys([data_dir, _cache_dir()]))), True
    if corpus:
        given = os.path.abspath(os.path.expanduser(corpus))
        if os.path.exists(given):
            return Path(given), False
        kept = data_dir / corpus / "input.txt"
        if os.path.isfile(kept):
            return kept, True
    names = sorted({*KNOWN, *(path.parent.name for path in data_dir.glob("*/input.txt"))})
    raise CorpusError(
        f"there is no text {corpus!r}: no such file or folder, and no such name in {data_dir}.\n"
        f"Give a text file, a folder of .txt files, or one of: {', '.join(names)}."
    )


def _tiny_shakespeare(places: list[Path]) -> Path:
    for place in places:
        path = place / "tiny-shakespeare" / "input.txt"
        if os.path.exists(path):
            try:
                data = path.read_bytes()
            except OSError as error:
                raise UnavailableError(f"{path} can't be read: {error.strerror}.") from error
            _verify(data, str(path), "Delete it, and it will be downloaded again.")
            return path
    by_hand = f"Download it by hand to {places[0] / 'tiny-shakespeare' / 'input.txt'}."
    try:
        data = _download(TINY_SHAKESPEARE_URL, TINY_SHAKESPEARE_BYTES)
    except (OSError, http.client.HTTPException) as error:
        reason = str(error).strip("<>")
        raise UnavailableError(
            f"{TINY_SHAKESPEARE_URL} can't be downloaded: {reason}.\n{by_hand}"
        ) from error
    _verify(data, f"what came from {TINY_SHAKESPEARE_URL}", by_hand)
    return _keep(data, "tiny-shakespeare", places)


def _python_reference(places: list[Path]) -> Path:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UnavailableError(
            "python-reference can't be had: this Python comes without pydoc_data.\n"
            "Choose another corpus."
        ) from error
    text = "\n".join(topics[key] for key in sorted(topics))
    return _keep(text.encode(), "python-reference", places)


KNOWN = {"tiny-shakespeare": _tiny_shakespeare, "python-reference": _python_reference}


def _download(url: str, size: int) -> bytes:
    data = bytearray()
    with (
        urllib.request.urlopen(url, timeout=TIMEOUT_S) as response,
        tqdm(desc=f"downloading {url}", total=size, unit="B", unit_scale=True) as bar,
    ):
        # One byte too many shows that it is something else; an endless answer ends there.
        while len(data) <= size and (piece := response.read(1 << 16)):
            data += piece
            bar.update(len(piece))
    return bytes(data)


def _verify(data: bytes, what: str, advice: str) -> None:
    digest = hashlib.sha256(data).hexdigest()
    if digest == TINY_SHAKESPEARE_SHA256:
        return
    kind = "a web page, " if data.lstrip()[:1] == b"<" else ""
    raise UnavailableError(
        f"{what} is not tiny-shakespeare: {kind}{len(data):,} bytes with SHA-256 {digest[:12]}..., "
        f"not {TINY_SHAKESPEARE_BYTES:,} bytes with {TINY_SHAKESPEARE_SHA256[:12]}...\n{advice}"
    )


def _keep(data: bytes, name: str, places: list[Path]) -> Path:
    """Write a named text into the first place that can be written, unless it is there."""
    problems = []
    for place in places:
        path = place / name / "input.txt"
        try:
            if not (path.is_file() and path.read_bytes() == data):
                with whole_file(path) as file:
                    file.write(data)
            return path
        except OSError as error:
            problems.append(f"{path} ({error.strerror})")
    raise UnavailableError(_unwritable(name, problems))


def _look_at(path: Path) -> list[dict]:
    """The files of a text as they stand now; when this changes, the text is encoded again."""
    try:
        files = _text_files(path) if os.path.isdir(path) else [path]
        statuses = [os.stat(file) for file in files]
    except OSError as error:
        raise CorpusError(f"{error.filename} can't be read: {error.strerror}.") from error
    if not files:
        raise CorpusError(f"the folder {path} and its sub-folders hold no .txt file.")
    for file, status in zip(files, statuses):
        if not stat.S_ISREG(status.st_mode):
            raise CorpusError(f"{file} is neither a file nor a folder.")
    return [
        {"path": str(file), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
        for file, status in zip(files, statuses)
    ]


def _text_files(folder: Path) -> list[Path]:
    def fail(error: OSError) -> None:
        raise error  # os.walk would leave out what it can't read, without a word

    files = [Path(base, name) for base, _, names in os.walk(folder, onerror=fail) for name in names]
    texts = [file for file in files if file.suffix.lower() == ".txt"]
    return sorted(texts, key=lambda file: file.relative_to(folder).as_posix())


# --- encoding ---------------------------------------------------------------------------------
#
# Two sequential passes, in pieces: the first finds the vocabulary, the second writes the ids.
# Most of most texts is ASCII, where a byte is a character, and `bytes.translate` deletes or looks
# up a thousand of them in a microsecond.


def _encode(path: Path, sources: list[dict], token_files: list[Path]) -> Opened:
    """Write the first of `token_files` that can be written, and open it."""
    total = 2 * sum(source["size"] for source in sources)
    changed = CorpusError(f"{path} changed while it was read.\nStart again when it is complete.")
    problems = []
    with tqdm(desc=f"encoding {path}", total=total, unit="B", unit_scale=True, delay=1) as bar:
        header = _survey(path, sources, bar)
        for token_file in token_files:
            try:
                with whole_file(token_file, header["written_ns"]) as file:
                    _write_tokens(file, header, bar)
                    if _look_at(path) != sources:
                        raise changed
            except UnknownCharacterError as error:
                raise changed from error
            except OSError as error:
                problems.append(f"{token_file} ({error.strerror})")
            # Even after an error: Windows lets nobody replace a file that another process has
            # open, and that file is as good as ours.
            if opened := _open_tokens(token_file, sources):
                return opened
    raise CorpusError(_unwritable("the encoded text", problems))


def _survey(path: Path, sources: list[dict], bar: tqdm) -> dict:
    """The first pass: all about the text but its ids."""
    n_characters, digest = 0, hashlib.sha256()
    seen, seen_ascii = np.zeros(sys.maxunicode + 1, dtype=bool), b""
    for piece in _pieces(sources, bar):
        digest.update(piece)
        n_characters += len(piece) if piece.isascii() else len(piece.decode())
        # Without the ASCII characters seen before, little is left of most texts, and UTF-8 still.
        if rest := piece.translate(None, seen_ascii):
            codes = code_points(rest.decode())
            if not seen.take(codes, mode="clip").all():  # twice as fast as setting what is set
                seen[codes] = True
                seen_ascii = bytes(np.flatnonzero(seen[:128]).tolist())
    characters = "".join(map(chr, np.flatnonzero(seen)))
    if len(characters) < 2:
        found = f"nothing but {characters!r}" if characters else "no text"
        raise CorpusError(f"{path} holds {found}: a model needs two different characters or more.")
    return {
        "format": FORMAT,
        "sources": sources,
        "digest": digest.hexdigest(),
        "tokens": n_characters,
        "characters": characters,
        "dtype": Vocabulary(characters).dtype.newbyteorder("<").str,
        "written_ns": time.time_ns() // 2_000_000_000 * 2_000_000_000,  # FAT keeps even seconds
    }


def _write_tokens(file: BinaryIO, header: dict, bar: tqdm) -> None:
    """The second pass: prefix, header and ids."""
    raw = json.dumps(header).encode()
    file.write(PREFIX.pack(MAGIC, zlib.crc32(raw), len(raw)) + raw)
    file.write(bytes(-file.tell() % ALIGNMENT))
    vocabulary = Vocabulary(header["characters"])
    table = _byte_table(vocabulary)
    for piece in _pieces(header["sources"], bar):
        if table and piece.isascii():
            file.write(piece.translate(table))  # twice as fast
        else:
            file.write(vocabulary.encode(piece.decode()).astype(header["dtype"], copy=False))


def _byte_table(vocabulary: Vocabulary) -> bytes | None:
    """ASCII byte -> id, or None where an id takes more than a byte."""
    if vocabulary.dtype != np.uint8:
        return None
    table = bytearray(256)
    for id, character in enumerate(vocabulary.characters):
        if character.isascii():
            table[ord(character)] = id
    return bytes(table)


def _pieces(sources: list[dict], bar: tqdm) -> Iterator[bytes]:
    """The text in order, in pieces of whole characters in valid UTF-8."""
    for path in (source["path"] for source in sources):
        position, rest = 0, b""  # rest: the start of a character that the next piece completes
        try:
            with open(path, "rb", buffering=0) as file:
                while piece := file.read(PIECE_BYTES):
                    bar.update(len(piece))
                    piece = rest + piece
                    used = len(piece)
                    if not piece.isascii():
                        _, used = codecs.utf_8_decode(piece, "strict", False)
                    yield piece[:used]
                    position, rest = position + used, piece[used:]
            codecs.utf_8_decode(rest, "strict", True)
        except OSError as error:
            raise CorpusError(f"{path} can't be read: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            offset = position + error.start
            raise CorpusError(
                f"{path} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset "
                f"{offset:,} ({error.reason}).\nSave it as UTF-8, or choose a text file."
            ) from error


# --- token files ------------------------------------------------------------------------------


def _open_tokens(token_file: Path, sources: list[dict]) -> Opened | None:
    """Open a token file if it is there, whole, and made from `sources` as they are now."""
    try:
        with open(token_file, "rb") as file:
            header = _read_header(file)
            if header["sources"] != sources:
                return None
            return _map_tokens(file, header)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, struct.error) as error:
        warnings.warn(
            f"the token file {token_file} can't be used and is made again: {error}",
            TokenFileWarning,
            stacklevel=4,
        )
        return None


def _read_header(file: BinaryIO) -> dict:
    magic, checksum, length = PREFIX.unpack(file.read(PREFIX.size))
    if magic != MAGIC or length > os.fstat(file.fileno()).st_size:
        raise ValueError("it is no token file")
    raw = file.read(length)
    if zlib.crc32(raw) != checksum:
        raise ValueError("its header is damaged")
    header = json.loads(raw)
    if header["format"] != FORMAT:
        raise ValueError("another version made it")
    return header


def _map_tokens(file: BinaryIO, header: dict) -> Opened:
    """Map the ids that follow the header.

    Every id of a small file is checked. A large one, for which that would take long, is trusted
    as long as its modification time is the one it was given when it was made: to damage it,
    something has to write to it, and that moves the time.
    """
    vocabulary = Vocabulary(header["characters"])
    status = os.fstat(file.fileno())
    start = file.tell() + -file.tell() % ALIGNMENT
    dtype = np.dtype(header["dtype"])
    if status.st_size != start + header["tokens"] * dtype.itemsize:
        raise ValueError("it has the wrong size")
    tokens = np.memmap(file, dtype, mode="r", offset=start, shape=(header["tokens"],))
    is_trusted = status.st_size > CHECKED_BYTES and status.st_mtime_ns == header["written_ns"]
    if not is_trusted and tokens.max() >= len(vocabulary):
        raise ValueError("it has ids outside its vocabulary")
    return vocabulary, tokens, header["digest"]


def _unwritable(what: str, problems: list[str]) -> str:
    return (
        f"{what} can't be written: {'; '.join(problems)}.\n"
        "Set CHARGPT_DATA_DIR (or data_dir) to a folder that can be written."
    )
