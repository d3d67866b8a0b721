"""The datasets: which characters are read, in which order, on which rank.

All yield whole batches (B, T + 1) of ids in the narrowest type: the first T of a sequence are the
inputs, the last T the targets. They are widened on the device, so that little travels.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info


@dataclass(eq=False)
class RandomBlocks(IterableDataset[Tensor]):
    """Random sequences to train on, without end: batch k is a pure function of (seed, k).

    All ranks draw the same global batch of `world_size * batch_size` sequences, no two alike
    where the text has enough, and each takes its slice. So one, two or eight devices with the same
    global batch read the same characters, and a run that resumes at batch k reads what an
    uninterrupted one would have read.
    """

    tokens: np.ndarray  # ids of the training split, (N,)
    block_size: int  # T, the most characters of context
    batch_size: int  # B, sequences in the batch of one rank
    seed: int  # chooses among all orders
    rank: int = 0  # which slice of the global batch is ours
    world_size: int = 1  # how many slices there are
    first: int = 0  # k of the first batch

    def starts(self, k: int) -> np.ndarray:
        """Where the sequences of the global batch k begin, (world_size * B,)."""
        n_starts = len(self.tokens) - self.block_size
        size = self.world_size * self.batch_size
        random = np.random.default_rng((self.seed, k))
        return random.choice(n_starts, size, replace=size > n_starts)  # twice only if it must be

    def __getitem__(self, k: int) -> Tensor:
        ours = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        return read_sequences(self.tokens, self.starts(k)[ours], self.block_size + 1)

    def __iter__(self) -> Iterator[Tensor]:
        offset, stride = worker_share()
        return (self[k] for k in itertools.count(self.first + offset, stride))


@dataclass(eq=False)
class EpochBlocks(RandomBlocks):
    """Sequences to train on by epochs: no character is a target twice in one.

    A random offset below block_size cuts the split into sequences (at its ends less than two are
    left over, until another epoch), a permutation orders them, and the next epoch draws both anew.
    Batch k is a pure function of (seed, k) here too. Orders take 16 bytes of memory for each
    sequence.
    """

    def starts(self, k: int) -> np.ndarray:
        n_sequences = max(1, len(self.tokens) // self.block_size - 1)  # wherever they begin
        size = self.world_size * self.batch_size
        epochs, places = np.divmod(np.arange(k * size, (k + 1) * size), n_sequences)
        offsets = min(self.block_size, len(self.tokens) - n_sequences * self.block_size)
        starts = []
        for epoch in np.unique(epochs).tolist():
            offset, order = draw_epoch(self.seed, epoch, offsets, n_sequences)
            starts.append(offset + self.block_size * order[places[epochs == epoch]])
        return np.concatenate(starts)


@lru_cache(maxsize=2)  # a batch may lie in two epochs
def draw_epoch(seed: int, epoch: int, offsets: int, n_sequences: int) -> tuple[int, np.ndarray]:
    """Where the first sequence of an epoch begins, and the order of all."""
    random = np.random.default_rng((seed, epoch))
    return int(random.integers(offsets)), random.permutation(n_sequences)


@dataclass(eq=False)
class EvaluationBlocks(IterableDataset[Tensor]):
    """Consecutive sequences that predict characters 2 to N of a split exactly once each.

    The last sequence is as short as it needs to be and a batch of its own: nothing is padded.
    Ranks take sequences in turn; one for which none is left reads a batch of none, since all must
    take part in a validation.
    """

    tokens: np.ndarray  # ids of a split, (N,)
    block_size: int  # T
    batch_size: int  # B
    rank: int = 0
    world_size: int = 1

    def starts(self) -> list[np.ndarray]:
        """Where the sequences of each batch of this rank begin."""
        n_whole, tail = divmod(len(self.tokens) - 1, self.block_size)
        ours = np.arange(self.rank, n_whole, self.world_size) * self.block_size
        batches = [ours[i : i + self.batch_size] for i in range(0, len(ours), self.batch_size)]
        if tail and n_whole % self.world_size == self.rank:
            batches.append(np.array([n_whole * self.block_size]))
        return batches or [ours]  # which is empty then: a batch of none

    def __len__(self) -> int:
        return len(self.starts())

    def __iter__(self) -> Iterator[Tensor]:
        offset, stride = worker_share()
        for starts in self.starts()[offset::stride]:
            length = min(self.block_size + 1, len(self.tokens) - starts.max(initial=0))
            yield read_sequences(self.tokens, starts, length)


def read_sequences(tokens: np.ndarray, starts: np.ndarray, length: int) -> Tensor:
    """Copy the sequences of `length` ids that begin at `starts`, (B, length)."""
    return torch.from_numpy(tokens[starts[:, None] + np.arange(length)])


def worker_share() -> tuple[int, int]:
    """The first batch of a DataLoader's worker, and its stride."""
    worker = get_worker_info()  # the loader takes from its workers in turn, which keeps the order
    return (worker.id, worker.num_workers) if worker else (0, 1)
