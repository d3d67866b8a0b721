"""Characters and their ids: the first step of text -> ids, and the last of ids -> text.

A character here is a Unicode code point. Nothing is normalised: an `e` followed by a combining
accent is two characters, as it stands in the text, so that decoding gives back what was encoded.
"""

from __future__ import annotations

import unicodedata

import numpy as np
from numpy.typing import ArrayLike

UNKNOWN = -1
MAX_NAMED = 10  # an error names this many different characters ...
MAX_POSITIONS = 3  # ... and this many places of each

# What people paste, and what an old text has in its place, the likeliest first.
STAND_INS = {
    "‘": "'", "’": "'", "‚": "',", "′": "'", "`": "'", "´": "'",
    "“": "\"'", "”": "\"'", "„": "\"'", "«": "\"'", "»": "\"'", '"': "'", "'": "’",
    "‐": "-", "‑": "-", "–": "-", "—": "-", "−": "-", "_": "-",
    "\t": " ", "\r": "\n",
}  # fmt: skip


class UnknownCharacterError(ValueError):
    """A text has characters that the vocabulary lacks. The message says which and where."""


class Vocabulary:
    """A character's id is its place among the sorted distinct characters of a text.

    Weights mean nothing without it: the ids of another text stand for other characters.

    Args:
        characters: the distinct characters in ascending order; the whole vocabulary is this
            string, so that is all a checkpoint has to carry.

    Raises:
        ValueError: the characters are not sorted or not distinct.
    """

    def __init__(self, characters: str):
        codes = code_points(characters)
        if (codes[1:] <= codes[:-1]).any():
            raise ValueError(
                "a vocabulary's characters must be distinct and in ascending order; "
                "Vocabulary.from_text(text) makes them so"
            )
        self.characters = characters
        self.dtype = np.min_scalar_type(max(len(codes) - 1, 0))
        self._codes = codes  # id -> code point
        # code point -> id; the last entry stands for every code point beyond the table
        self._ids = np.full(int(codes.max(initial=0)) + 2, UNKNOWN, dtype=np.int32)
        self._ids[codes] = np.arange(len(codes))

    @classmethod
    def from_text(cls, text: str) -> Vocabulary:
        """The vocabulary of exactly the characters that occur in `text`."""
        return cls("".join(sorted(set(text))))

    def __len__(self) -> int:
        return len(self.characters)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Vocabulary):
            return NotImplemented
        return self.characters == other.characters

    def __hash__(self) -> int:
        return hash(self.characters)

    def __repr__(self) -> str:
        return f"Vocabulary({self.characters!r})"

    def encode(self, text: str) -> np.ndarray:
        """The ids of the characters of `text`: shape (len(text),), of `self.dtype`.

        Raises:
            UnknownCharacterError: `text` has a character that is not in the vocabulary.
        """
        ids = self._ids.take(code_points(text), mode="clip")
        if ids.min(initial=0) == UNKNOWN:
            positions = np.flatnonzero(ids == UNKNOWN)
            raise UnknownCharacterError(self._describe_unknown(text, positions))
        return ids.astype(self.dtype)

    def decode(self, ids: ArrayLike) -> str:
        """The text that `ids` stand for: a list, an array or a tensor (on any device) of
        integers in one dimension, or a single id.

        Raises:
            ValueError: an id lies outside the vocabulary.
            TypeError: `ids` are not integers in one dimension.
        """
        ids = np.asarray(ids.cpu() if hasattr(ids, "cpu") else ids)
        if ids.size == 0:
            return ""
        if ids.dtype.kind not in "iu" or ids.ndim > 1:
            raise TypeError(f"ids must be integers in one dimension, not {ids.dtype} {ids.shape}")
        outside = np.flatnonzero((ids < 0) | (ids >= len(self)))
        if outside.size:
            raise ValueError(
                f"id {ids.flat[outside[0]]} at position {outside[0]} is outside the vocabulary "
                f"of {len(self):,} characters"
            )
        return self._codes[ids].tobytes().decode("utf-32-le", "surrogatepass")

    def _describe_unknown(self, text: str, positions: np.ndarray) -> str:
        places: dict[str, list[int]] = {}
        for position in positions.tolist():
            places.setdefault(text[position], []).append(position)
        named = [self._describe(*entry) for entry in list(places.items())[:MAX_NAMED]]
        if len(places) > MAX_NAMED:
            named.append(f"and {len(places) - MAX_NAMED:,} other characters")
        return (
            f"the vocabulary of {len(self):,} characters has no {'; '.join(named)} "
            "(positions count from 0)"
        )

    def _describe(self, character: str, places: list[int]) -> str:
        where = "position " + ", ".join(map(str, places[:MAX_POSITIONS]))
        if len(places) > MAX_POSITIONS:
            where += f" and {len(places) - MAX_POSITIONS:,} more"
        nearest = " or ".join(map(repr, self._nearest(character)))
        hint = f", nearest known: {nearest}" if nearest else ""
        # a combining mark would sit on the quote before it
        shown = ascii(character) if unicodedata.combining(character) else repr(character)
        return f"{shown} (U+{ord(character):04X}) at {where}{hint}"

    def _nearest(self, character: str) -> list[str]:
        """Known characters that a person would take for `character`: the same letter in the
        other case, without its accent, the plain quote for the typographic one."""
        stand_ins = STAND_INS.get(character, "")
        bare = unicodedata.normalize("NFKD", character)[0]
        candidates = [character.swapcase(), *stand_ins, bare, bare.swapcase()]
        known = set(self.characters)
        return [c for c in dict.fromkeys(candidates) if c in known]


def code_points(text: str) -> np.ndarray:
    """The code points of `text`, lone surrogates included: shape (len(text),), uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
