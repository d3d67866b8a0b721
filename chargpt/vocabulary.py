"""Vocabulary: the mapping between characters and ids.

A character is a Unicode code point, and nothing is normalized: decoding restores the exact text.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from chargpt.model import UserError

UNKNOWN = -1
MAX_NAMED = 10  # an error names at most this many distinct characters

# Characters that people paste, and their equivalents in old texts, the most likely first.
STAND_INS = dict.fromkeys("‘’′`´", "'") | dict.fromkeys("“”„«»", "\"'")
STAND_INS |= dict.fromkeys("‐‑–—−_", "-") | {"‚": "',", '"': "'", "'": "’", "\t": " ", "\r": "\n"}


@dataclass(unsafe_hash=True)
class Vocabulary:
    """Characters to ids and back: an id is an index into the distinct characters of a text."""

    characters: str  # in the order of their ids: all that a checkpoint has to store

    def __post_init__(self) -> None:
        self._codes = codes = code_points(self.characters)  # id -> code point
        if len(set(self.characters)) < len(codes):
            raise UserError("a vocabulary's characters must be distinct")
        self.dtype = np.min_scalar_type(max(len(codes) - 1, 0))
        # code point -> id; the last entry is for all code points beyond the table
        self._ids = np.full(int(codes.max(initial=0)) + 2, UNKNOWN, dtype=np.int32)
        self._ids[codes] = np.arange(len(codes))

    @classmethod
    def from_text(cls, text: str) -> Vocabulary:
        """The vocabulary of the characters that occur in `text`."""
        return cls("".join(sorted(set(text))))

    def extended(self, other: Vocabulary) -> Vocabulary:
        """This vocabulary, followed by those characters of another that it lacks."""
        return Vocabulary("".join(dict.fromkeys(self.characters + other.characters)))

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, (len(text),) of `self.dtype`; a UserError names unknown characters."""
        ids = self._ids.take(code_points(text), mode="clip")
        if ids.min(initial=0) == UNKNOWN:
            raise UserError(self._describe_unknown(text))
        return ids.astype(self.dtype)

    def decode(self, ids: ArrayLike) -> str:
        """The text of a one-dimensional list, array or tensor of ids, or of a single id."""
        ids = np.asarray(ids.cpu() if hasattr(ids, "cpu") else ids)
        if ids.size == 0:
            return ""
        if ids.dtype.kind not in "iu" or ids.ndim > 1:
            raise TypeError(f"ids must be integers in one dimension, not {ids.dtype} {ids.shape}")
        for id in (ids.min(), ids.max()):
            if not 0 <= id < len(self):
                raise UserError(f"id {id} is outside the vocabulary of {len(self):,} characters")
        return self._codes[ids].tobytes().decode("utf-32-le", "surrogatepass")

    def _describe_unknown(self, text: str) -> str:
        """Which characters of a text are unknown, where each first occurs, and what is similar."""
        known = set(self.characters)
        unknown = [c for c in dict.fromkeys(text) if c not in known]
        named = []
        for c in unknown[:MAX_NAMED]:
            # Candidates: the other letter case, a plain quote or hyphen, the letter without accent.
            bare = unicodedata.normalize("NFKD", c)[0]
            similar = dict.fromkeys([c.swapcase(), *STAND_INS.get(c, ""), bare, bare.swapcase()])
            nearest = " or ".join(repr(s) for s in similar if s in known)
            shown = ascii(c) if unicodedata.combining(c) else repr(c)  # drawn over the quote
            hint = f", nearest known: {nearest}" if nearest else ""
            named.append(f"{shown} (U+{ord(c):04X}) at position {text.index(c)}{hint}")
        if (more := len(unknown) - MAX_NAMED) > 0:
            named.append(f"and {more:,} more")
        message = (
            f"unknown character{'s' * (len(unknown) > 1)} {'; '.join(named)} "
            f"(positions count from 0; the vocabulary has {len(self):,} characters)"
        )
        if "\\" in unknown and "\\n" in text:
            message += "\n\\n is not a newline here; write $'\\n' in bash or zsh"
        return message


def code_points(text: str) -> np.ndarray:
    """The code points of `text`, lone surrogates included: shape (len(text),), uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
