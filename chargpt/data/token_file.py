"""Token files: a text is encoded once, then memory-mapped, so it may be larger than memory.

A token file is a NumPy array (`.npy`) of ids in the narrowest unsigned integer type, followed by
the vocabulary and the text's digest as JSON. Its name depends on the paths, sizes and modification
times of the text's files: a text that changes gets a new token file, and a run keeps its own.
"""

import codecs
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from chargpt.atomic_file import atomic_write
from chargpt.data.texts import TextFile, TextSource
from chargpt.model import UserError
from chargpt.vocabulary import Vocabulary, code_points

CHUNK = 1 << 17  # bytes


class Corpus(NamedTuple):
    """A text as ids."""

    source: TextSource
    vocabulary: Vocabulary  # of the whole text
    tokens: np.memmap  # ids of all characters, (N,), of `vocabulary.dtype`, read-only
    digest: str  # SHA-256 of the text in UTF-8, in hexadecimal


def open_corpus(source: TextSource) -> Corpus:
    """Open the token file of a text; encode the text first if there is none."""
    with suppress(OSError, ValueError):  # missing or damaged
        return open_token_file(source)
    encode(source)
    return open_token_file(source)


def open_token_file(source: TextSource) -> Corpus:
    tokens = np.lib.format.open_memmap(source.token_file, mode="r")
    with open(source.token_file, "rb") as file:
        file.seek(tokens.offset + tokens.nbytes)
        trailer = json.load(file)
    return Corpus(source, Vocabulary(trailer["characters"]), tokens, trailer["digest"])


def encode(source: TextSource) -> None:
    """Write the token file of a text, in two streaming passes over the text."""
    vocabulary, length, digest = scan(source)
    header = {"descr": vocabulary.dtype.str, "fortran_order": False, "shape": (length,)}
    with atomic_write(source.token_file) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for text in read_text(source):
            file.write(vocabulary.encode(text).data)
        file.write(json.dumps({"characters": vocabulary.characters, "digest": digest}).encode())


def scan(source: TextSource) -> tuple[Vocabulary, int, str]:
    """The vocabulary of a text, its number of characters, and its SHA-256."""
    length, digest = 0, hashlib.sha256()
    seen = np.zeros(sys.maxunicode + 1, dtype=bool)
    for text in read_text(source):
        length += len(text)
        digest.update(text.encode())
        seen[code_points(text)] = True
    characters = "".join(map(chr, np.flatnonzero(seen)))
    if len(characters) < 2:
        raise UserError(f"{source.path} has fewer than two different characters\nchoose another")
    return Vocabulary(characters), length, digest.hexdigest()


def read_text(source: TextSource) -> Iterator[str]:
    """The characters of a text in chunks; files are separated by a newline if they lack one."""
    end = "\n"
    for file in source.files:
        if end != "\n":
            yield "\n"
        for text in read_file(file):
            yield text
            end = text[-1:] or end


def read_file(file: TextFile) -> Iterator[str]:
    """The characters of a file in chunks, without a byte order mark; line endings are kept."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(file.path, "rb") as data:
        if data.read(3) == codecs.BOM_UTF8:
            warnings.warn(f"{file.path}: the byte order mark (BOM) is left out", stacklevel=2)
        else:
            data.seek(0)
        chunk = b"not at the end"
        while chunk:
            chunk = data.read(CHUNK)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                offset = data.tell() - len(error.object) + error.start
                where = f"byte 0x{error.object[error.start]:02x} at offset {offset:,}"
                raise UserError(
                    f"{file.path} is not UTF-8 text: {where}\nsave it as UTF-8"
                ) from error
            status = os.fstat(data.fileno())  # each time: the file may grow without end
            if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
                raise UserError(f"{file.path} changed while it was being read\nstart again")
            yield text
