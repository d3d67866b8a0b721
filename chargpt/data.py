"""Which characters are read, in which order, on which rank.

A batch is a tensor (B, T + 1) of ids in the narrowest type: the first T of a row are the inputs,
the last T the targets. It is widened on the device, so that little travels.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from chargpt.corpus import Corpus, CorpusError, open_corpus
from chargpt.vocabulary import Vocabulary


def read_blocks(tokens: np.ndarray, starts: np.ndarray, length: int) -> Tensor:
    """Copy the blocks of `length` ids that begin at `starts` out of the mapped file."""
    return torch.from_numpy(tokens[starts[:, None] + np.arange(length)])


class TrainingBatches(IterableDataset):
    """Random blocks, without end: batch k is a pure function of (seed, k).

    All ranks draw the same global batch of `world_size * batch_size` blocks, no two alike, and
    each takes its slice. So one, two or eight devices with the same global batch read the same
    characters, and a run that goes on at batch k reads what an uninterrupted one would have read.

    Args:
        tokens: ids of the training split, (N,).
        block_size: T; a block has T + 1 ids.
        batch_size: B, blocks in the batch of one rank.
        seed: chooses among all orders.
        rank: which slice of the global batch is ours.
        world_size: how many slices there are.
        first: k of the first batch.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        block_size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        first: int = 0,
    ) -> None:
        self.tokens = tokens
        self.block_size = block_size
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.first = first

    def starts(self, k: int) -> np.ndarray:
        """Where the blocks of the global batch k begin, (world_size * B,)."""
        places = len(self.tokens) - self.block_size
        size = self.world_size * self.batch_size
        random = np.random.default_rng((self.seed, k))
        return random.choice(
            places, size, replace=size > places
        )  # twice the same only if it must be

    def __getitem__(self, k: int) -> Tensor:
        ours = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        return read_blocks(self.tokens, self.starts(k)[ours], self.block_size + 1)

    def __iter__(self) -> Iterator[Tensor]:
        worker = (
            get_worker_info()
        )  # the loader takes from its workers in turn, which keeps the order
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        return (self[k] for k in itertools.count(self.first + offset, stride))


class EvaluationBatches(IterableDataset):
    """Consecutive blocks that predict characters 2 to N of a split exactly once each.

    The last block is as short as it needs to be and stands in a batch of its own: nothing is
    padded. Ranks take blocks in turn; one for which none is left reads a batch of none, since all
    must take part in a validation.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        block_size: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.tokens = tokens
        self.block_size = block_size
        whole, self.tail = divmod(len(tokens) - 1, block_size)
        ours = np.arange(rank, whole, world_size) * block_size
        self.batches = [ours[i : i + batch_size] for i in range(0, len(ours), batch_size)]
        if self.tail and whole % world_size == rank:
            self.batches.append(np.array([whole * block_size]))
        self.batches = self.batches or [ours]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for starts in self.batches[offset::stride]:
            length = min(self.block_size + 1, len(self.tokens) - starts.max(initial=0))
            yield read_blocks(self.tokens, starts, length)


class CharDataModule(LightningDataModule):
    """Blocks of characters of one text: the first part to train on, the rest to validate and test.

    Args:
        corpus: a named text (tiny-shakespeare, python-reference), a text file, or a folder of
            .txt files.
        data_dir: folder of named texts and encoded files; by default $CHARGPT_DATA_DIR or the
            user's cache folder.
        fallback_corpus: named text to train on, with a warning, where the one asked for cannot
            be had; null refuses.
        block_size: characters that the model looks at, at most; given here, it reaches the model.
        batch_size: blocks in a batch, on each device.
        val_fraction: share of the text to validate on, after the part to train on.
        test_fraction: share of the text to test on, at its end.
        num_workers: processes that read ahead; reading is so cheap that 0 is usually fastest.
        seed: chooses the blocks; the command line fills in seed_everything.

    Raises:
        ValueError: a size or share that cannot be.
        CorpusError: in `setup`, where the text cannot be had or is too short.
    """

    def __init__(
        self,
        corpus: str = "tiny-shakespeare",
        data_dir: str | None = None,
        fallback_corpus: str | None = None,
        block_size: int = 256,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        num_workers: int = 0,
        seed: int = 1337,
    ) -> None:
        super().__init__()
        for name, size in (("block_size", block_size), ("batch_size", batch_size)):
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1")
        if num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}; it cannot be negative")
        if min(val_fraction, test_fraction) < 0 or not val_fraction + test_fraction < 1:
            raise ValueError(
                f"val_fraction {val_fraction} and test_fraction {test_fraction} must not be negative, "
                "and together leave something to train on"
            )
        self.save_hyperparameters()
        self.corpus: Corpus | None = None

    def prepare_data(self) -> None:
        """Find, download and encode the text: Lightning calls this on one process of a machine."""
        self.corpus = open_corpus(
            self.hparams.corpus, self.hparams.data_dir, self.hparams.fallback_corpus
        )

    def setup(self, stage: str | None = None) -> None:
        """Open the encoded text and check that its splits are long enough."""
        if self.corpus is None and self.trainer is None:
            self.prepare_data()
        if self.trainer is not None:
            self.agree()
        self.save_hyperparameters(
            {"corpus": str(self.corpus.path), "corpus_name": self.corpus.name}
        )
        self.train_tokens, self.val_tokens, self.test_tokens = self.split()

    def agree(self) -> None:
        """Read the text that the first of all processes reads, a fallback too, on every machine."""
        ours = self.corpus and (self.corpus.name, self.corpus.digest)
        name, digest = self.trainer.strategy.broadcast(ours)
        if ours != (name, digest):
            self.corpus = open_corpus(name, self.hparams.data_dir)
        if self.corpus.digest != digest:
            raise CorpusError(
                f"{self.corpus.path} is not the same text on every machine\ncopy it anew"
            )

    def split(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens, hparams = self.corpus.tokens, self.hparams
        val_start = int(len(tokens) * (1 - hparams.val_fraction - hparams.test_fraction))
        test_start = int(len(tokens) * (1 - hparams.test_fraction))
        train, val, test = np.split(tokens, [val_start, test_start])
        if len(train) <= hparams.block_size:
            raise CorpusError(
                f"{self.corpus.path} leaves {len(train):,} characters to train on, but block_size "
                f"{hparams.block_size} needs at least {hparams.block_size + 1}\n"
                "take a longer text or a smaller --data.block_size"
            )
        if len(val) < 2:
            raise CorpusError(
                f"{self.corpus.path} leaves {len(val)} characters to validate on; at least 2 are needed\n"
                "take a longer text or a larger --data.val_fraction"
            )
        if hparams.test_fraction > 0 and len(test) < 2:
            raise CorpusError(
                f"{self.corpus.path} leaves {len(test)} characters to test on; at least 2 are needed\n"
                "take a longer text or a larger --data.test_fraction"
            )
        return train, val, test

    @property
    def vocabulary(self) -> Vocabulary:
        return self.corpus.vocabulary

    def train_dataloader(self) -> DataLoader:
        # Lightning has restored global_step by now: go on with the micro-batch that comes next.
        trainer = self.trainer
        first = trainer.global_step * trainer.accumulate_grad_batches if trainer else 0
        return self.loader(
            TrainingBatches(
                self.train_tokens,
                self.hparams.block_size,
                self.hparams.batch_size,
                self.hparams.seed,
                *self.place(),
                first,
            )
        )

    def val_dataloader(self) -> DataLoader:
        return self.evaluation_loader(self.val_tokens)

    def test_dataloader(self) -> DataLoader:
        if len(self.test_tokens) == 0:
            raise CorpusError(
                "there is no test split: --data.test_fraction is 0\n"
                "train with one, e.g. --data.test_fraction 0.05, or use `validate`"
            )
        return self.evaluation_loader(self.test_tokens)

    def evaluation_loader(self, tokens: np.ndarray) -> DataLoader:
        hparams = self.hparams
        return self.loader(
            EvaluationBatches(tokens, hparams.block_size, hparams.batch_size, *self.place())
        )

    def loader(self, batches: IterableDataset) -> DataLoader:
        return DataLoader(
            batches,
            batch_size=None,  # the dataset yields whole batches
            num_workers=self.hparams.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def place(self) -> tuple[int, int]:
        """Our rank, and the number of ranks."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
