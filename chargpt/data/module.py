"""The LightningDataModule: one text, split, served in batches of ids (B, T + 1)."""

from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from chargpt.data.blocks import EpochBlocks, EvaluationBlocks, RandomBlocks
from chargpt.data.corpus import CorpusError, find_text
from chargpt.data.token_file import open_corpus
from chargpt.vocabulary import Vocabulary

ORDERS = {"random": RandomBlocks, "epochs": EpochBlocks}


class CharDataModule(LightningDataModule):
    """Batches of one text: the first part to train on, the rest to validate and to test on.

    Args:
        corpus: a named text (tiny-shakespeare, python-reference), a text file, or a folder of
            .txt files.
        data_dir: folder of named texts and token files; by default $CHARGPT_DATA_DIR or the
            user's cache folder.
        fallback_corpus: named text to train on, with a warning, where the one asked for cannot
            be had; null refuses.
        block_size: the most characters of context; given here, it reaches the model.
        batch_size: sequences in a batch, on each device.
        val_fraction: share of the text to validate on, after the part to train on.
        test_fraction: share of the text to test on, at its end.
        order: random trains on sequences that begin anywhere; epochs reads each character once
            before any is read again, which learns more from a text that is read several times.
        num_workers: processes that read ahead; reading is so cheap that 0 is usually fastest.
        seed: chooses the sequences; the command line fills in seed_everything.

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
        order: Literal[tuple(ORDERS)] = "random",  # type: ignore[valid-type]
        num_workers: int = 0,
        seed: int = 1337,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("block_size", block_size, 1),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            if type(value) is not int or value < least:
                raise ValueError(f"{name} is {value!r}; it must be a whole number from {least} on")
        if order not in ORDERS:
            raise ValueError(f"order is {order!r}; it must be one of {', '.join(ORDERS)}")
        if min(val_fraction, test_fraction) < 0 or not val_fraction + test_fraction < 1:
            raise ValueError(
                f"val_fraction {val_fraction} and test_fraction {test_fraction} must not be "
                "negative, and together leave something to train on"
            )
        self.save_hyperparameters()
        self.expected_digest: str | None = None  # of the text that a checkpoint was trained on

    def prepare_data(self) -> None:
        """Find, download and encode the text: Lightning calls this on one process of a machine."""
        h = self.hparams
        self.corpus = open_corpus(find_text(h["corpus"], h["data_dir"], h["fallback_corpus"]))

    def setup(self, stage: str | None = None) -> None:
        """Open the token file and split it."""
        if self.trainer is not None:
            self.follow_rank_zero(self.trainer)
        elif not hasattr(self, "corpus"):
            self.prepare_data()
        name, path, digest = self.corpus.name, str(self.corpus.path), self.corpus.digest
        if self.expected_digest not in (None, digest):
            raise CorpusError(
                f"{path} has changed since the checkpoint was trained on it: "
                "losses would be of two texts\n"
                "bring the old one back, or name a text with --data.corpus to use it as it is"
            )
        self.save_hyperparameters(dict(corpus=path, corpus_name=name, corpus_digest=digest))
        self.train_tokens, self.val_tokens, self.test_tokens = self.split()

    def follow_rank_zero(self, trainer: Trainer) -> None:
        """Open on every rank the text that rank 0 has opened, a fallback too."""
        corpus = getattr(self, "corpus", None)  # only one process of a machine has prepared it
        ours: Any = corpus and (corpus.name, corpus.digest)
        name, digest = theirs = trainer.strategy.broadcast(ours)
        if ours != theirs:
            self.corpus = open_corpus(find_text(name, self.hparams["data_dir"]))
        if self.corpus.digest != digest:
            raise CorpusError(
                f"{self.corpus.path} is not the same text on every machine\ncopy it anew"
            )

    def split(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The tokens to train, to validate and to test on."""
        tokens, h = self.corpus.tokens, self.hparams
        val_start = int(len(tokens) * (1 - h["val_fraction"] - h["test_fraction"]))
        test_start = int(len(tokens) * (1 - h["test_fraction"]))
        train, val, test = np.split(tokens, [val_start, test_start])
        for part, use, least, advice in (
            (train, "train", h["block_size"] + 1, "smaller --data.block_size"),
            (val, "validate", 2, "larger --data.val_fraction"),
            (test, "test", 2 if h["test_fraction"] else 0, "larger --data.test_fraction"),
        ):
            if len(part) < least:
                raise CorpusError(
                    f"{self.corpus.path} leaves {len(part):,} characters to {use} on, but that "
                    f"needs at least {least}\ntake a longer text or a {advice}"
                )
        return train, val, test

    @property
    def vocabulary(self) -> Vocabulary:
        return self.corpus.vocabulary

    @property
    def rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_dataloader(self) -> DataLoader:
        # Lightning has restored global_step by now: resume with the micro-batch that comes next.
        trainer, h = self.trainer, self.hparams
        first = trainer.global_step * trainer.accumulate_grad_batches if trainer else 0
        sizes = h["block_size"], h["batch_size"]
        Blocks = ORDERS[h["order"]]
        return self.loader(
            Blocks(self.train_tokens, *sizes, h["seed"], *self.rank_and_world_size, first)
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
        sizes = self.hparams["block_size"], self.hparams["batch_size"]
        return self.loader(EvaluationBlocks(tokens, *sizes, *self.rank_and_world_size))

    def loader(self, blocks: IterableDataset[Tensor]) -> DataLoader:
        return DataLoader(
            blocks,
            batch_size=None,  # the dataset yields whole batches
            num_workers=self.hparams["num_workers"],
            pin_memory=torch.cuda.is_available(),
        )
