"""The KV cache: keys, values and ids of the characters so far, kept while text is generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .config import UserError
from .rotary import rotary_angles

if TYPE_CHECKING:
    from .gpt import GPT


class LayerCache(NamedTuple):
    """The KV cache of one attention layer, cut to the S slots that a step reads."""

    keys: Tensor  # (B, H, S, D)
    values: Tensor
    new: tuple[Tensor, ...] | None  # index of the T new slots; None if they are the last

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values, (B, H, T, D) each; returns all, (B, H, S, D) each."""
        T = k.size(2)
        for stored, new in ((self.keys, k), (self.values, v)):
            if self.new is None:
                stored.narrow(2, -T, T).copy_(new)  # faster than an indexed assignment
            else:
                stored[self.new] = new.type_as(stored)  # autocast may compute in half precision
        return self.keys, self.values


class CacheStep(NamedTuple):
    """What the network needs for T new characters of each row."""

    positions: Tensor  # (T,), or (B, T) where rows have different lengths
    angles: Tensor | None  # rotary angles of these positions
    mask: Tensor | None  # (1 or B, 1, T, S), true: attention allowed; None: unneeded, or causal
    ids: Tensor  # (B, ngram_context + T): the new ids and those before them
    layers: Sequence[LayerCache | None]


class KVCache:
    """The keys and values that attention has computed, a slot per position.

    They stay valid because attention is causal: later characters don't change them. A new character
    then costs one position instead of a pass over all of them. Rows may have different lengths.
    Capacity, in characters, is at most block_size, the default.
    """

    def __init__(self, gpt: GPT, rows: int, capacity: int | None = None) -> None:
        config = gpt.config
        self.capacity = min(config.block_size if capacity is None else capacity, config.block_size)
        self.lengths = [0] * rows
        self.ngram_context = config.ngram_context
        # Zeros, not empty: masked slots are still multiplied by 0, and 0 * nan is nan.
        zeros = gpt.token_embedding.weight.new_zeros
        shape = (config.n_layer, 2, rows, config.n_head, self.capacity, config.head_size)
        self.memory = zeros(shape)  # keys and values of each layer
        self.ids = zeros((rows, self.ngram_context + self.capacity), dtype=torch.long)
        self.slots = torch.arange(self.capacity, device=self.memory.device)
        learned = config.position == "learned"
        self.angles = None if learned else rotary_angles(self.slots, config.head_size)

    def append(self, ids: Tensor) -> CacheStep:
        """Append ids (B, T) to the rows; the network then stores their keys and values."""
        (B, T), device, context = ids.shape, ids.device, self.ngram_context
        start, S = min(self.lengths), max(self.lengths) + T
        if self.capacity < S:
            raise UserError(f"{S} positions requested, but the cache has {self.capacity} slots")
        rows: Any = slice(None)
        starts: Any = start
        slots: Any = slice(start, S)
        new = None
        if ragged := start + T < S:  # otherwise slices are enough, and faster
            rows = torch.arange(B, device=device)[:, None]  # (B, 1)
            heads = torch.arange(self.memory.size(3), device=device)[:, None]  # (H, 1)
            starts = torch.tensor(self.lengths, device=device)[:, None]  # (B, 1)
            slots = starts + self.slots[:T]  # (B, T)
            new = (rows[:, None], heads, slots[:, None])  # broadcast to (B, H, T)
        positions, angles, mask = self.slots[slots], None, None
        if context:  # the n-grams of the new ids begin with those before them
            self.ids[:, context:][rows, slots] = ids
            ids = self.ids.unfold(1, context + T, 1)[rows, starts].flatten(1)
        if self.angles is not None:
            angles = self.angles[slots].unsqueeze(-3)  # the same for all heads
        if ragged or (T > 1 and start > 0):
            mask = (self.slots[:S] <= positions.unsqueeze(-1)).view(-1, 1, T, S)
        self.lengths = [length + T for length in self.lengths]
        # The keys of the first layer, its values, the keys of the second, and so on.
        parts = self.memory[..., :S, :].flatten(0, 1).unbind()
        layers = [LayerCache(k, v, new) for k, v in zip(parts[::2], parts[1::2])]
        return CacheStep(positions, angles, mask, ids, layers)

    def copy_row(self, source: KVCache, source_row: int, rows: Sequence[int]) -> None:
        """Overwrite rows with a row of a different cache, which may have a smaller capacity."""
        S = source.lengths[source_row]
        self.memory[:, :, rows, :, :S] = source.memory[:, :, [source_row], :, :S]
        self.ids[rows, : self.ngram_context + S] = source.ids[source_row, : self.ngram_context + S]
        for row in rows:
            self.lengths[row] = S

    def select_rows(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        self.memory = self.memory[:, :, rows]
        self.ids = self.ids[rows]
        self.lengths = [self.lengths[row] for row in rows]
