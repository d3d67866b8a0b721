"""Token files: a text is encoded once, then memory-mapped, so it may be larger than memory.

A token file is a NumPy array (`.npy`) of ids in the narrowest unsigned integer type, followed by
the vocabulary and the text's digest as JSON. Its name depends on the paths, sizes and modification
times of the text's files: a text that changes gets a new token file, and a run that has started
keeps reading its own. Token files that no run needs may be deleted.
"""

import codecs
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from chargpt.atomic_file import atomic_write
from chargpt.data.texts import TextFile, TextSource
from chargpt.model import UserError
from chargpt.vocabulary import Vocabulary, code_points

CHUNK_BYTES = 1 << 17  # long enough for NumPy, short enough for the CPU's cache


class Tokens(np.memmap):
    """A memory-mapped array of ids, (N,), or a slice of one.

    It pickles as a position in its file: a spawned DataLoader worker gets no copy of the text.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        if self.filename is None or not self.flags.c_contiguous:
            return np.array, (np.asarray(self),)  # a computed array, which is in memory
        whole = self.base if isinstance(self.base, Tokens) else self
        offset = self.offset + self.ctypes.data - whole.ctypes.data
        return Tokens, (self.filename, self.dtype, "r", offset, self.shape)


class Corpus(NamedTuple):
    """A text as ids."""

    source: TextSource
    vocabulary: Vocabulary  # of the whole text
    tokens: Tokens  # ids of all characters, (N,), of `vocabulary.dtype`, read-only
    digest: str  # SHA-256 of the text's bytes, in hexadecimal


def open_corpus(source: TextSource) -> Corpus:
    """Open the token file of a text; encode the text first if there is none."""
    with suppress(OSError, ValueError):  # missing or damaged
        return open_token_file(source)
    encode(source)
    return open_token_file(source)


def open_token_file(source: TextSource) -> Corpus:
    tokens = np.lib.format.open_memmap(source.token_file, mode="r").view(Tokens)
    with open(source.token_file, "rb") as file:
        file.seek(tokens.offset + tokens.nbytes)
        trailer = json.load(file)
    return Corpus(source, Vocabulary(trailer["characters"]), tokens, trailer["digest"])


def encode(source: TextSource) -> None:
    """Write the token file of a text, in two streaming passes over the text."""
    vocabulary, length, digest = scan(source)
    header = {"descr": vocabulary.dtype.str, "fortran_order": False, "shape": (length,)}
    trailer = {"characters": vocabulary.characters, "digest": digest}
    ascii = vocabulary.characters.encode("ascii", "ignore")  # they have the first ids
    table = bytes.maketrans(ascii, bytes(range(len(ascii))))
    with atomic_write(source.token_file) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for data, text in chain.from_iterable(map(read_file, source.files)):
            if vocabulary.dtype == np.uint8 and text.isascii():
                file.write(data.translate(table))  # twice as fast
            else:
                file.write(vocabulary.encode(text).data)
        file.write(json.dumps(trailer).encode())


def scan(source: TextSource) -> tuple[Vocabulary, int, str]:
    """The vocabulary of a text, its number of characters, and its SHA-256."""
    length = 0
    digest = hashlib.sha256()
    seen = np.zeros(sys.maxunicode + 1, dtype=bool)
    seen_ascii = b""
    for data, text in chain.from_iterable(map(read_file, source.files)):
        digest.update(data)
        length += len(text)
        # Deleting ASCII already seen leaves little of most texts, and the rest is valid UTF-8.
        if rest := data.translate(None, seen_ascii):
            seen[code_points(rest.decode())] = True
            seen_ascii = bytes(np.flatnonzero(seen[:128]).tolist())
    characters = "".join(map(chr, np.flatnonzero(seen)))
    if len(characters) < 2:
        raise UserError(
            f"{source.path} has fewer than two different characters\nchoose a different text"
        )
    return Vocabulary(characters), length, digest.hexdigest()


def read_file(file: TextFile) -> Iterator[tuple[bytes, str]]:
    """A file in chunks of whole characters, each as bytes and decoded."""
    offset, data = 0, b""  # data: the beginning of a character that the next chunk completes
    with open(file.path, "rb", buffering=0) as stream:
        while offset < file.size:
            data += stream.read(CHUNK_BYTES)
            status = os.fstat(stream.fileno())  # each time: the file may grow without end
            if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
                raise UserError(f"{file.path} changed while it was read\nstart again")
            try:
                text, used = codecs.utf_8_decode(data, "strict", offset + len(data) == file.size)
            except UnicodeDecodeError as error:
                where = f"byte 0x{data[error.start]:02x} at offset {offset + error.start:,}"
                raise UserError(
                    f"{file.path} is not UTF-8 text: {where}\nsave it as UTF-8"
                ) from error
            yield data[:used], text
            offset, data = offset + used, data[used:]
