"""The LightningDataModule: a text, split, or two texts, served in batches of ids (B, T + 1)."""

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from chargpt.data.datasets import EpochSequences, EvaluationSequences, RandomSequences
from chargpt.data.texts import TextSource, resolve_corpus
from chargpt.data.token_file import Corpus, open_corpus
from chargpt.model import UserError
from chargpt.model.config import FRACTION, check
from chargpt.vocabulary import Vocabulary

ORDERS = {"random": RandomSequences, "epochs": EpochSequences}


class TrainedText(NamedTuple):
    """A text that a checkpoint was trained or validated on."""

    size: int  # bytes of all its files
    digest: str
    train_characters: int  # length of its training split
    required: bool  # whether no other text may be used instead


class CharDataModule(LightningDataModule):
    """Batches of a text: its first part for training, the rest for validation and testing.

    Args:
        corpus: tiny-shakespeare, python-reference, a text file, or a folder of .txt files.
        data_dir: folder of named texts and token files; default $CHARGPT_DATA_DIR or the cache.
        fallback_corpus: named text to use, with a warning, if a named text is unavailable.
        block_size: maximum context in characters; the model's follows from it.
        batch_size: sequences in a batch, on each device.
        val_corpus: a text to validate on, instead of a fraction of the corpus.
        val_fraction: fraction of the corpus for validation, after the training part.
        test_fraction: fraction of the corpus for testing, at its end.
        order: random positions, or epochs: each character once before any is read again, which is
            better for a text that is read several times.
        num_workers: processes that load batches; loading is so cheap that 0 is usually fastest,
            and where processes are spawned each has a copy of the text in memory.
        seed: chooses the sequences; the command line fills in seed_everything.
    """

    corpus: Corpus  # these three are set by `prepare_data` or `setup`
    val_corpus: Corpus  # the same text, unless there is one of its own
    vocabulary: Vocabulary  # of the corpus, or of the network (`use_vocabulary`)

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
        check(h, "test_fraction", *FRACTION)
        check(h, "test_fraction", "at most 1 - val_fraction", lambda x: x + val_fraction <= 1)
        check(h, "order", " or ".join(ORDERS), lambda order: order in ORDERS)
        # Set by the command line from a checkpoint before the texts are opened, which then rejects
        # a changed text and any split that would evaluate on training data.
        self.trained_text: TrainedText | None = None
        self.validated_text: TrainedText | None = None  # val_corpus

    def prepare_data(self) -> None:
        """Open and split the text, which is downloaded and encoded if that was not done before.

        Lightning calls this in one process per machine, before a logger writes to disk.
        """
        if hasattr(self, "corpus"):
            return
        h, trained = self.hparams, self.trained_text
        self.corpus = self.open_text(h["corpus"], h["fallback_corpus"], trained)
        self.val_corpus, self.vocabulary = self.corpus, self.corpus.vocabulary
        val_fraction = 0.0 if h["val_corpus"] else h["val_fraction"]
        N = len(self.corpus.tokens)
        test_start = int(N * (1 - h["test_fraction"]))
        val_start = int(N * (1 - val_fraction - h["test_fraction"]))
        parts = np.split(self.corpus.tokens, [val_start, test_start])
        self.train_tokens, self.val_tokens, self.test_tokens = parts
        if h["val_corpus"]:
            self.val_corpus = self.open_text(h["val_corpus"], None, self.validated_text)
            self.val_tokens = self.val_corpus.tokens
        self.check_lengths()
        if trained and self.corpus.digest == trained.digest:
            n_trained = trained.train_characters
            if val_start < n_trained - 1:  # a sum of fractions may round differently
                raise UserError(
                    f"the first {n_trained:,} characters of {self.corpus.source.path} were trained "
                    f"on, but this split trains on {val_start:,} and scores the rest\n"
                    "use a smaller --data.val_fraction or --data.test_fraction"
                )

    def open_text(self, corpus: str, fallback: str | None, trained: TrainedText | None) -> Corpus:
        required = trained if trained and trained.required else None
        try:
            source = resolve_corpus(corpus, self.hparams["data_dir"], fallback)
            if required and source.size != required.size:
                raise other_text(source)  # before anything of it is read
            opened = open_corpus(source)
        except OSError as error:
            raise UserError(
                f"cannot access {error.filename}: {error.strerror}\n"
                "check permissions and space, or set CHARGPT_DATA_DIR or --data.data_dir"
            ) from error
        if required and opened.digest != required.digest:
            raise other_text(source)
        if "\r" in opened.vocabulary.characters:
            rank_zero_warn(
                f"{source.path} has carriage returns (CR LF line endings, as on Windows?), which "
                "are treated like any other character; a stop string with \\n matches CR LF too"
            )
        return opened

    def setup(self, stage: str | None = None) -> None:
        """Open the texts in all processes, and record them in the hyperparameters."""
        self.prepare_data()
        digests = [self.corpus.digest, self.val_corpus.digest]
        if self.trainer and self.trainer.strategy.broadcast(digests) != digests:
            paths = {str(self.corpus.source.path), str(self.val_corpus.source.path)}
            names = " or ".join(sorted(paths))
            raise UserError(f"{names} differs between machines\ncopy it to all of them again")
        record: dict[str, Any] = dict(train_characters=len(self.train_tokens))
        for name in ("corpus", "val_corpus") if self.hparams["val_corpus"] else ("corpus",):
            source, _, _, digest = getattr(self, name)
            record |= {name: str(source.path), f"{name}_name": source.name}
            record |= {f"{name}_bytes": source.size, f"{name}_digest": digest}
        self.save_hyperparameters(record)

    def check_lengths(self) -> None:
        h = self.hparams
        trains = self.trainer is None or self.trainer.state.fn == "fit"
        for use, corpus, part, minimum in (
            # Sequences of a batch start at different positions.
            ("training", self.corpus, self.train_tokens, max(h["block_size"] + 1, h["batch_size"])),
            ("validation", self.val_corpus, self.val_tokens, 2),
            ("testing", self.corpus, self.test_tokens, 2 if h["test_fraction"] else 0),
        ):
            if len(part) < minimum and (trains or use != "training"):
                raise UserError(
                    f"{use} needs {minimum:,} characters, but {corpus.source.path} leaves "
                    f"{len(part):,}\nuse a longer text, or a smaller --data.block_size or "
                    "--data.batch_size, or other fractions"
                )

    def use_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Serve ids of a network's vocabulary, which must contain all characters of the texts."""
        for corpus in (self.corpus, self.val_corpus):
            if unknown := set(corpus.vocabulary.characters) - set(vocabulary.characters):
                raise UserError(
                    f"{corpus.source.path} has characters that the network does not know: "
                    f"{sorted(unknown)[:5]}\nuse a text without them; or add those of a training "
                    "text to the network, in a new run with fit --init_from"
                )
        self.vocabulary = vocabulary

    def train_dataloader(self) -> DataLoader:
        # Lightning has restored global_step: resume with the micro-batch that comes next.
        h, trainer = self.hparams, self.trainer
        start_batch = trainer.global_step * trainer.accumulate_grad_batches if trainer else 0
        dataset = ORDERS[h["order"]]
        settings = dict(seed=h["seed"], start_batch=start_batch)
        return self.loader(dataset, self.corpus, self.train_tokens, **settings)

    def val_dataloader(self) -> DataLoader:
        return self.loader(EvaluationSequences, self.val_corpus, self.val_tokens)

    def test_dataloader(self) -> DataLoader:
        if len(self.test_tokens) == 0:
            raise UserError(
                "there is no test split\ntrain with --data.test_fraction, or run `validate` instead"
            )
        return self.loader(EvaluationSequences, self.corpus, self.test_tokens)

    def loader(
        self, dataset: type[Any], corpus: Corpus, tokens: np.ndarray, **settings: Any
    ) -> DataLoader:
        h, trainer = self.hparams, self.trainer
        if corpus.vocabulary != self.vocabulary:
            settings["ids"] = self.vocabulary.encode(corpus.vocabulary.characters)
        if trainer:
            settings |= dict(rank=trainer.global_rank, world_size=trainer.world_size)
        return DataLoader(
            dataset(tokens, h["block_size"], h["batch_size"], **settings),
            batch_size=None,  # the dataset yields whole batches
            num_workers=h["num_workers"],
            pin_memory=torch.cuda.is_available(),
        )


def other_text(source: TextSource) -> UserError:
    return UserError(
        f"{source.path} is not the text this checkpoint was trained on, or it has changed since\n"
        "restore it; or name a text with --data.corpus to score it, or omit --ckpt_path to train"
    )
