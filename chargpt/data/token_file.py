"""Encoding a text once into a memory-mapped token file, and opening it.

A token file is a NumPy array on disk, a plain `.npy`: one id per character, in the narrowest
unsigned integer type that holds the vocabulary. The characters and the text's digest follow it as
JSON. Training maps the file instead of reading it, so a text may be larger than memory.

Its name is made from the paths, sizes and modification times of the text's files. So a text that
changed has another token file, and a run that began before goes on reading the former one, which
may be deleted when no run needs it.
"""

import codecs
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from chargpt.atomic_file import atomic_write
from chargpt.data.corpus import CorpusError, Source, Text
from chargpt.vocabulary import Vocabulary, code_points

PIECE_BYTES = 1 << 17  # read at a time: long enough for numpy, short enough for the CPU's cache


class Tokens(np.memmap):
    """A memory-mapped array of ids, (N,), or a slice of one.

    It pickles as its place in the file, so that a DataLoader's worker that is spawned maps the file
    itself, where a plain memmap would pickle as a copy of the text.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        if self.filename is None or not self.flags.c_contiguous:
            return np.array, (np.asarray(self),)  # computed from ids: it lies in memory
        whole = self.base if isinstance(self.base, Tokens) else self
        offset = self.offset + self.ctypes.data - whole.ctypes.data
        return Tokens, (self.filename, self.dtype, "r", offset, self.shape)


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text as ids, open for reading at any place."""

    name: str  # the named text, or the path as it was given
    path: Path  # its file or folder, absolute
    vocabulary: Vocabulary  # of the whole text
    tokens: Tokens  # the ids of its characters, (N,), of `vocabulary.dtype`, read-only
    digest: str  # SHA-256 of its bytes, in hexadecimal


def open_corpus(text: Text) -> Corpus:
    """Open the token file of a text; where there is none, encode the text first."""
    for path in text.token_files:
        if corpus := open_token_file(path, text):
            return corpus
    return encode(text)


def open_token_file(path: Path, text: Text) -> Corpus | None:
    """Map a token file, if it is there and whole."""
    try:
        tokens = np.lib.format.open_memmap(path, mode="r").view(Tokens)
        with open(path, "rb") as file:
            file.seek(tokens.offset + tokens.nbytes)
            trailer = json.load(file)
        vocabulary = Vocabulary(trailer["characters"])
        return Corpus(text.name, text.path, vocabulary, tokens, trailer["digest"])
    except (OSError, ValueError):  # absent, or damaged: it is encoded again
        return None


def encode(text: Text) -> Corpus:
    """Write the token file of a text, in two streaming passes over it, and open it."""
    vocabulary, length, digest = survey(text)
    header = {"descr": vocabulary.dtype.str, "fortran_order": False, "shape": (length,)}
    trailer = {"characters": vocabulary.characters, "digest": digest}
    problems = []
    for path in text.token_files:
        try:
            with atomic_write(path) as file:
                np.lib.format.write_array_header_1_0(file, header)
                write_ids(file, text, vocabulary)
                file.write(json.dumps(trailer).encode())
        except OSError as error:
            problems.append(f"{path} ({error.strerror})")
        # Even after an error: Windows lets nobody replace a file that another process has mapped,
        # and that file is as good as ours.
        if corpus := open_token_file(path, text):
            return corpus
    raise CorpusError(
        f"the token file can't be written: {'; '.join(problems)}\n"
        "set CHARGPT_DATA_DIR (or data_dir) to a folder that can be written"
    )


def survey(text: Text) -> tuple[Vocabulary, int, str]:
    """The first pass: the vocabulary of a text, its number of characters, its SHA-256."""
    length = 0
    digest = hashlib.sha256()
    seen = np.zeros(sys.maxunicode + 1, dtype=bool)
    seen_ascii = b""
    for piece in read_pieces(text):
        digest.update(piece)
        length += len(piece) if piece.isascii() else len(piece.decode())
        # Without the ASCII characters seen before, little is left of most texts, and UTF-8 still.
        if rest := piece.translate(None, seen_ascii):
            codes = code_points(rest.decode())
            if not seen.take(codes, mode="clip").all():  # twice as fast as setting what is set
                seen[codes] = True
                seen_ascii = bytes(np.flatnonzero(seen[:128]).tolist())
    characters = "".join(map(chr, np.flatnonzero(seen)))
    if len(characters) < 2:
        found = f"nothing but {characters!r}" if characters else "no text"
        raise CorpusError(
            f"{text.path} holds {found}\na model needs two different characters or more"
        )
    return Vocabulary(characters), length, digest.hexdigest()


def write_ids(file: BinaryIO, text: Text, vocabulary: Vocabulary) -> None:
    """The second pass: the ids of a text."""
    ascii = vocabulary.characters.encode("ascii", "ignore")  # the first ids, in this order
    table = bytes.maketrans(ascii, bytes(range(len(ascii))))
    for piece in read_pieces(text):
        if vocabulary.dtype == np.uint8 and piece.isascii():
            file.write(piece.translate(table))  # twice as fast
        else:
            file.write(vocabulary.encode(piece.decode()).data)


def read_pieces(text: Text) -> Iterator[bytes]:
    """The bytes of a text in pieces of whole characters, with a bar if that takes long."""
    total = sum(source.size for source in text.sources)
    with tqdm(desc=f"encoding {text.path}", total=total, unit="B", unit_scale=True, delay=1) as bar:
        for source in text.sources:
            for piece in read_source(source):
                yield piece
                bar.update(len(piece))


def read_source(source: Source) -> Iterator[bytes]:
    """The bytes of one file, in pieces of whole characters of valid UTF-8."""
    position, rest = 0, b""  # rest: the start of a character that the next piece completes
    try:
        with open(source.path, "rb", buffering=0) as file:
            while piece := read_unchanged(file, source):
                piece = rest + piece
                used = len(piece) if piece.isascii() else codecs.utf_8_decode(piece)[1]
                yield piece[:used]
                position, rest = position + used, piece[used:]
        codecs.utf_8_decode(rest, "strict", True)
    except OSError as error:
        raise CorpusError(f"{source.path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        byte, offset = error.object[error.start], position + error.start
        raise CorpusError(
            f"{source.path} is not UTF-8 text: byte 0x{byte:02x} at offset {offset:,} "
            f"({error.reason})\nsave it as UTF-8, or choose a text file"
        ) from error


def read_unchanged(file: FileIO, source: Source) -> bytes:
    """The next piece of a file, if it still is as it was found: one that grows might never end."""
    piece = file.read(PIECE_BYTES)
    status = os.fstat(file.fileno())
    if (status.st_size, status.st_mtime_ns) != (source.size, source.mtime_ns):
        raise CorpusError(
            f"{source.path} changed while it was read\nstart again when it is complete"
        )
    return piece
