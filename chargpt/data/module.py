"""The LightningDataModule: one text, split, served in batches of ids (B, T + 1)."""

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from chargpt.data.datasets import EpochSequences, EvaluationSequences, RandomSequences
from chargpt.data.texts import TextSource, resolve_corpus
from chargpt.data.token_file import Corpus, open_corpus
from chargpt.model import UserError
from chargpt.model.config import FRACTION, check
from chargpt.vocabulary import Vocabulary

ORDERS = {"random": RandomSequences, "epochs": EpochSequences}


class TrainedText(NamedTuple):
    """The text that a checkpoint was trained on."""

    size: int  # bytes of all its files
    digest: str
    train_characters: int  # length of its training split
    required: bool  # whether no other text may be used instead


class CharDataModule(LightningDataModule):
    """Batches of one text: its first part for training, the rest for validation and testing.

    Args:
        corpus: tiny-shakespeare, python-reference, a text file, or a folder of .txt files.
        data_dir: folder of named texts and token files; default $CHARGPT_DATA_DIR or the cache.
        fallback_corpus: named text to use, with a warning, if a named text is unavailable.
        block_size: maximum context in characters; the model's follows from it.
        batch_size: sequences in a batch, on each device.
        val_fraction: fraction of the text for validation, after the training part.
        test_fraction: fraction of the text for testing, at its end.
        order: random positions, or epochs: each character once before any is read again, which is
            better for a text that is read several times.
        num_workers: processes that load batches; loading is so cheap that 0 is usually fastest,
            and where processes are spawned each has a copy of the text in memory.
        seed: chooses the sequences; the command line fills in seed_everything.
    """

    corpus: Corpus  # set by `prepare_data` or `setup`
    vocabulary: Vocabulary  # of the text, or of the network (`use_vocabulary`)

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
        self.save_hyperparameters()
        h = self.hparams
        check(h, "block_size batch_size", "at least 1", lambda n: n >= 1)
        check(h, "num_workers seed", "at least 0", lambda n: n >= 0)
        check(h, "val_fraction test_fraction", *FRACTION)
        check(h, "test_fraction", "less than 1 - val_fraction", lambda x: x + val_fraction < 1)
        check(h, "order", " or ".join(ORDERS), lambda order: order in ORDERS)
        # Set by the command line from a checkpoint before the text is opened, which then rejects
        # a changed text and any split that would evaluate on training data.
        self.trained_text: TrainedText | None = None
        self.ids: np.ndarray | None = None  # of the text in the vocabulary of a network

    def prepare_data(self) -> None:
        """Open and split the text, which is downloaded and encoded if that was not done before.

        Lightning calls this in one process per machine, before a logger writes to disk.
        """
        if hasattr(self, "corpus"):
            return
        h, trained = self.hparams, self.trained_text
        try:
            source = resolve_corpus(h["corpus"], h["data_dir"], h["fallback_corpus"])
            if trained and trained.required and source.size != trained.size:
                raise other_text(source)  # before anything of it is read
            self.corpus = open_corpus(source)
            self.vocabulary = self.corpus.vocabulary
        except OSError as error:
            raise UserError(
                f"cannot access {error.filename}: {error.strerror}\n"
                "check permissions and space, or set CHARGPT_DATA_DIR or --data.data_dir"
            ) from error
        if trained and trained.required and self.corpus.digest != trained.digest:
            raise other_text(source)
        N = len(self.corpus.tokens)
        test_start = int(N * (1 - h["test_fraction"]))
        val_start = int(N * (1 - h["val_fraction"] - h["test_fraction"]))
        parts = np.split(self.corpus.tokens, [val_start, test_start])
        self.train_tokens, self.val_tokens, self.test_tokens = parts
        self.check_lengths()
        if trained and self.corpus.digest == trained.digest:
            n_trained = trained.train_characters
            if val_start < n_trained - 1:  # a sum of fractions may round differently
                raise UserError(
                    f"the first {n_trained:,} characters of {source.path} were trained on, but "
                    f"this split trains on {val_start:,} and scores the rest\n"
                    "use a smaller --data.val_fraction or --data.test_fraction"
                )

    def setup(self, stage: str | None = None) -> None:
        """Open the text in all processes, and record it in the hyperparameters."""
        self.prepare_data()
        source, _, _, digest = self.corpus
        if self.trainer and self.trainer.strategy.broadcast(digest) != digest:
            raise UserError(f"{source.path} differs between machines\ncopy it to all of them again")
        texts = dict(corpus=str(source.path), corpus_name=source.name, corpus_digest=digest)
        sizes = dict(corpus_bytes=source.size, train_characters=len(self.train_tokens))
        self.save_hyperparameters(texts | sizes)

    def check_lengths(self) -> None:
        h = self.hparams
        for use, part, minimum in (
            ("training", self.train_tokens, max(h["block_size"] + 1, h["batch_size"])),
            ("validation", self.val_tokens, 2),
            ("testing", self.test_tokens, 2 if h["test_fraction"] else 0),
        ):
            if len(part) < minimum:
                raise UserError(
                    f"{use} needs {minimum:,} characters, but {self.corpus.source.path} leaves "
                    f"{len(part):,}\nuse a longer text, or a smaller --data.block_size or "
                    "--data.batch_size, or other fractions"
                )

    def use_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Serve ids of a network's vocabulary, which must contain all characters of the text."""
        characters = self.corpus.vocabulary.characters
        if unknown := sorted(set(characters) - set(vocabulary.characters)):
            raise UserError(
                f"{self.corpus.source.path} has characters that the network does not know: "
                f"{unknown[:5]}\nuse a different text, or start a new run with fit --init_from"
            )
        self.vocabulary = vocabulary
        self.ids = None if characters == vocabulary.characters else vocabulary.encode(characters)

    def train_dataloader(self) -> DataLoader:
        # Lightning has restored global_step: resume with the micro-batch that comes next.
        h, trainer = self.hparams, self.trainer
        start_batch = trainer.global_step * trainer.accumulate_grad_batches if trainer else 0
        dataset = ORDERS[h["order"]]
        return self.loader(dataset, self.train_tokens, seed=h["seed"], start_batch=start_batch)

    def val_dataloader(self) -> DataLoader:
        return self.loader(EvaluationSequences, self.val_tokens)

    def test_dataloader(self) -> DataLoader:
        if len(self.test_tokens) == 0:
            raise UserError(
                "there is no test split\nset --data.test_fraction for `fit`, or `validate`"
            )
        return self.loader(EvaluationSequences, self.test_tokens)

    def loader(self, dataset: type[Any], tokens: np.ndarray, **settings: int) -> DataLoader:
        h, trainer = self.hparams, self.trainer
        if trainer:
            settings |= dict(rank=trainer.global_rank, world_size=trainer.world_size)
        return DataLoader(
            dataset(tokens, h["block_size"], h["batch_size"], ids=self.ids, **settings),
            batch_size=None,  # the dataset yields whole batches
            num_workers=h["num_workers"],
            pin_memory=torch.cuda.is_available(),
        )


def other_text(source: TextSource) -> UserError:
    return UserError(
        f"{source.path} is not the text this checkpoint was trained on, or it has changed since\n"
        "restore it; or name a text with --data.corpus to score it, or omit --ckpt_path to train"
    )
