"""The datasets: which sequences are read, in which order, on which rank.

All yield whole batches (B, T + 1) of ids: the first T of a sequence are the inputs, the last T the
targets. Ids keep their narrow type until they are on the device.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info


@dataclass(eq=False)
class Sequences(IterableDataset[Tensor]):
    """What all datasets need to read their sequences."""

    tokens: np.ndarray  # ids of the split, (N,)
    block_size: int  # T, the maximum context
    batch_size: int  # B, sequences in the batch of one rank
    rank: int = 0
    world_size: int = 1
    ids: np.ndarray | None = None  # maps the ids in `tokens` to those of a different vocabulary

    def read(self, starts: np.ndarray) -> Tensor:
        """The sequences from these positions; the one that ends the split may be shorter."""
        length = min(self.block_size + 1, len(self.tokens) - starts.max(initial=0))
        sequences = self.tokens[starts[:, None] + np.arange(length)]
        return torch.from_numpy(sequences if self.ids is None else self.ids[sequences])


@dataclass(eq=False, kw_only=True)
class RandomSequences(Sequences):
    """Random training sequences without end: batch k is a pure function of (seed, k).

    All ranks draw the same global batch of `world_size * batch_size` sequences, without repetition
    if the text is long enough, and each takes its slice.
    """

    seed: int
    start_batch: int = 0  # k of the first batch

    def starts(self, k: int) -> np.ndarray:
        """First positions of the sequences in the global batch k, (world_size * B,)."""
        n_starts = len(self.tokens) - self.block_size
        size = self.world_size * self.batch_size
        random = np.random.default_rng((self.seed, k))
        return random.choice(n_starts, size, replace=size > n_starts)

    def __getitem__(self, k: int) -> Tensor:
        local = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        return self.read(self.starts(k)[local])

    def __iter__(self) -> Iterator[Tensor]:
        return (self[k] for k in worker_share(itertools.count(self.start_batch)))


class EpochSequences(RandomSequences):
    """Training sequences by epochs: in an epoch each character is a target at most once.

    Each epoch draws an offset below block_size at which the split is cut into sequences (what is
    left over at its ends is less than two), and a random order of them, 8 bytes per sequence.
    """

    def starts(self, k: int) -> np.ndarray:
        n_sequences = max(1, len(self.tokens) // self.block_size - 1)  # for any offset
        n_offsets = min(self.block_size, len(self.tokens) - n_sequences * self.block_size)
        size = self.world_size * self.batch_size
        epochs, positions = np.divmod(np.arange(k * size, (k + 1) * size), n_sequences)
        starts = []
        for epoch in np.unique(epochs).tolist():
            offset, order = draw_epoch(self.seed, epoch, n_offsets, n_sequences)
            starts.append(offset + self.block_size * order[positions[epochs == epoch]])
        return np.concatenate(starts)


@lru_cache(maxsize=2)  # a batch may span two epochs
def draw_epoch(seed: int, epoch: int, n_offsets: int, n_sequences: int) -> tuple[int, np.ndarray]:
    """The first position of an epoch, and the order of its sequences."""
    random = np.random.default_rng((seed, epoch))
    return int(random.integers(n_offsets)), random.permutation(n_sequences)


class EvaluationSequences(Sequences):
    """Consecutive sequences whose targets are characters 2 to N of a split, each exactly once.

    Nothing is padded: a shorter last sequence is a batch of its own. The ranks take sequences in
    turn; one without any yields an empty batch, since all must take part in a validation.
    """

    def starts(self) -> list[np.ndarray]:
        """First positions of the sequences, for each batch of this rank."""
        n_full, tail = divmod(len(self.tokens) - 1, self.block_size)
        local = np.arange(self.rank, n_full, self.world_size) * self.block_size
        batches = [local[i : i + self.batch_size] for i in range(0, len(local), self.batch_size)]
        if tail and n_full % self.world_size == self.rank:
            batches.append(np.array([n_full * self.block_size]))
        return batches or [local]  # one empty batch

    def __len__(self) -> int:
        return len(self.starts())

    def __iter__(self) -> Iterator[Tensor]:
        return (self.read(starts) for starts in worker_share(self.starts()))


def worker_share(batches: Iterable[Any]) -> Iterable[Any]:
    """The batches of this DataLoader worker; the loader reads its workers in turn."""
    worker = get_worker_info()
    return itertools.islice(batches, worker.id, None, worker.num_workers) if worker else batches
