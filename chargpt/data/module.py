"""The LightningDataModule: a text, split, or two texts, served in batches of ids (B, T + 1)."""

from collections.abc import Container
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from chargpt.data.datasets import EpochSequences, EvaluationSequences, RandomSequences
from chargpt.data.texts import resolve_corpus
from chargpt.data.token_file import Corpus, open_corpus
from chargpt.model import UserError
from chargpt.model.config import check
from chargpt.vocabulary import Vocabulary

ORDERS = {"random": RandomSequences, "epochs": EpochSequences}


class CharDataModule(LightningDataModule):
    """Batches of a text: its first part for training, the rest for validation and testing.

    Args:
        corpus: tiny-shakespeare, python-reference, a text file, or a folder of .txt files.
        data_dir: folder of named texts and token files; default $CHARGPT_DATA_DIR or the cache.
        fallback_corpus: named text to use, with a warning, if a named text is unavailable.
        block_size: maximum context in characters; the command line sets the model's to the same.
        batch_size: sequences in a batch, on each device.
        val_corpus: a text to validate on, instead of a fraction of the corpus.
        val_fraction: fraction of the corpus for validation, after the training part.
        test_fraction: fraction of the corpus for testing, at its end.
        order: random positions, or epochs: each character at most once per pass over the text,
            which is better if there are several.
        num_workers: processes that load batches; loading is so cheap that 0 is usually fastest,
            and where processes are spawned each has a copy of the text in memory.
        seed: chooses the sequences; the command line fills in seed_everything.
    """

    corpus: Corpus  # `prepare_data` sets these three
    val_corpus: Corpus  # the same text, unless there is one of its own
    vocabulary: Vocabulary  # of the corpus

    def __init__(
        self,
        corpus: str = "tiny-shakespeare",
        data_dir: str | None = None,
        fallback_corpus: str | None = None,
        val_corpus: str | None = None,
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
        check(h, "val_fraction", "from 0 to 1", lambda fraction: 0 <= fraction <= 1)
        rule = "from 0 to 1 - val_fraction"
        check(h, "test_fraction", rule, lambda x: x >= 0 and x + val_fraction <= 1)
        check(h, "order", " or ".join(ORDERS), lambda order: order in ORDERS)
        # The record (see `setup`) of the run that was trained, if any: its texts must not have
        # changed, except those that the user has named instead, "corpus" or "val_corpus".
        self.trained: dict[str, Any] = {}
        self.other_texts: Container[str] = ()

    def prepare_data(self) -> None:
        """Open and split the texts. Lightning calls this once per machine, before it logs."""
        if hasattr(self, "vocabulary"):
            return
        h = self.hparams
        self.corpus = self.val_corpus = self.open_text("corpus", h["fallback_corpus"])
        val_fraction = 0.0 if h["val_corpus"] else h["val_fraction"]
        N = len(self.corpus.tokens)
        val_start = int(N * (1 - val_fraction - h["test_fraction"]))
        parts = np.split(self.corpus.tokens, [val_start, int(N * (1 - h["test_fraction"]))])
        self.train_tokens, self.val_tokens, self.test_tokens = parts
        if h["val_corpus"]:
            self.val_corpus = self.open_text("val_corpus")
            self.val_tokens = self.val_corpus.tokens
        self.check_split()
        self.vocabulary = self.corpus.vocabulary

    def open_text(self, name: str, fallback: str | None = None) -> Corpus:
        record = {} if name in self.other_texts else self.trained
        try:
            source = resolve_corpus(self.hparams[name], self.hparams["data_dir"], fallback)
            check_unchanged(record, f"{name}_bytes", source.size, source.path)  # before it is read
            text = open_corpus(source)
        except OSError as error:
            reason = f"cannot access {error.filename}: {error.strerror}"
            advice = "check permissions and space, or set CHARGPT_DATA_DIR or --data.data_dir"
            raise UserError(f"{reason}\n{advice}") from error
        check_unchanged(record, f"{name}_digest", text.digest, source.path)
        if "\r" in text.vocabulary.characters:
            rank_zero_warn(f"{source.path} has carriage returns (CR LF line endings of Windows?)")
        return text

    def check_split(self) -> None:
        h = self.hparams
        trains = self.trainer is None or self.trainer.state.fn == "fit"
        # Sequences of a batch start at different positions.
        n_train = max(h["block_size"] + 1, h["batch_size"]) if trains else 0
        for use, corpus, part, minimum in (
            ("training", self.corpus, self.train_tokens, n_train),
            ("validation", self.val_corpus, self.val_tokens, 2),
            ("testing", self.corpus, self.test_tokens, 2 if h["test_fraction"] else 0),
        ):
            if len(part) < minimum:
                raise UserError(
                    f"{use} needs {minimum:,} characters, but {corpus.source.path} leaves "
                    f"{len(part):,}\nuse a longer text, other fractions, or a smaller "
                    "--data.block_size or --data.batch_size"
                )
        n_trained = self.trained.get("train_characters")
        same_text = self.trained.get("corpus_digest") == self.corpus.digest
        # A sum of fractions may round differently.
        if same_text and type(n_trained) is int and len(self.train_tokens) < n_trained - 1:
            n_trained = min(n_trained, len(self.corpus.tokens))
            raise UserError(
                f"the first {n_trained:,} characters of {self.corpus.source.path} were trained on, "
                f"but this split trains on {len(self.train_tokens):,} and scores the rest\n"
                "use a smaller --data.val_fraction or --data.test_fraction"
            )

    def setup(self, stage: str | None = None) -> None:
        """Open the texts in all processes, and record them in the hyperparameters."""
        self.prepare_data()
        record: dict[str, Any] = dict(train_characters=len(self.train_tokens))
        for name in ("corpus", "val_corpus") if self.hparams["val_corpus"] else ("corpus",):
            source, _, _, digest = getattr(self, name)
            if self.trainer and self.trainer.strategy.broadcast(digest) != digest:
                raise UserError(f"{source.path} differs between machines\ncopy it to all of them")
            record |= {name: str(source.path), f"{name}_name": source.name}
            record |= {f"{name}_bytes": source.size, f"{name}_digest": digest}
        self.save_hyperparameters(record)

    def train_dataloader(self) -> DataLoader:
        # Lightning has restored global_step: resume with the micro-batch that comes next.
        h, trainer = self.hparams, self.trainer
        start_batch = trainer.global_step * trainer.accumulate_grad_batches if trainer else 0
        settings = dict(seed=h["seed"], start_batch=start_batch)
        return self.loader(ORDERS[h["order"]], self.corpus, self.train_tokens, **settings)

    def val_dataloader(self) -> DataLoader:
        return self.loader(EvaluationSequences, self.val_corpus, self.val_tokens)

    def test_dataloader(self) -> DataLoader:
        if len(self.test_tokens) == 0:
            raise UserError("there is no test split\ntrain with --data.test_fraction, or validate")
        return self.loader(EvaluationSequences, self.corpus, self.test_tokens)

    def loader(self, dataset: Any, text: Corpus, tokens: np.ndarray, **settings: Any) -> DataLoader:
        h, trainer = self.hparams, self.trainer
        network = trainer.lightning_module if trainer else None
        known: Vocabulary = getattr(network, "vocabulary", self.vocabulary)  # its ids are served
        for corpus in (text, self.val_corpus):  # now, not at the first validation
            if unknown := set(corpus.vocabulary.characters) - set(known.characters):
                raise UserError(
                    f"{corpus.source.path} has characters that the network does not know: "
                    f"{sorted(unknown)[:5]}\nuse a text without them; or add those of a training "
                    "text to the network, in a new run with fit --init_from"
                )
        if text.vocabulary != known:
            settings["ids"] = known.encode(text.vocabulary.characters)
        if trainer:
            settings |= dict(rank=trainer.global_rank, world_size=trainer.world_size)
        return DataLoader(
            dataset(tokens, h["block_size"], h["batch_size"], **settings),
            batch_size=None,  # the dataset yields whole batches
            num_workers=h["num_workers"],
            pin_memory=torch.cuda.is_available(),
        )


def check_unchanged(record: dict[str, Any], key: str, value: int | str, path: Path) -> None:
    """Refuse a text of a different size or digest than recorded; the record may be untrusted."""
    recorded = record.get(key, value)
    if type(recorded) is not type(value) or recorded != value:
        raise UserError(
            f"{path} is not the text that the checkpoint records, or it has changed since\n"
            "restore it, score another with --data.corpus, or omit --ckpt_path to train on it"
        )
