"""A text, a network and a trainer for runs that take less than a second."""

import random
from pathlib import Path

import torch
from lightning import Trainer

from chargpt.data import CharDataModule
from chargpt.data.texts import resolve_corpus
from chargpt.data.token_file import Corpus, open_corpus
from chargpt.training import GPTModule
from chargpt.training import make_trainer as make_any_trainer
from chargpt.training.checkpointing import RunCheckpoint

MUON = dict(optimizer="muon", muon_lr=0.02, muon_weight_decay=0.1)


def write_text(folder: Path, length: int = 2000, alphabet: str = "abcdefgh \n") -> Path:
    path = folder / "text.txt"
    if not path.exists():  # a new file would be encoded again
        path.write_text(
            alphabet + "".join(random.Random(0).choices(alphabet, k=length - len(alphabet)))
        )
    return path


def write(path: Path, text: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def open_text(corpus: str, data_dir: Path | None = None, fallback: str | None = None) -> Corpus:
    return open_corpus(resolve_corpus(corpus, data_dir, fallback))


def token_files(folder: Path) -> list[Path]:
    """All token files in a folder and its subfolders, partial ones too."""
    return sorted(folder.rglob("*.npy*"))


def expected_ids(text: str) -> list[int]:
    ids = {character: id for id, character in enumerate(sorted(set(text)))}
    return [ids[character] for character in text]


def make_data(folder: Path, **settings) -> CharDataModule:
    settings = dict(block_size=8, batch_size=4, seed=1) | settings
    corpus = settings.pop("corpus", None) or str(write_text(folder))
    return CharDataModule(corpus, data_dir=str(folder / "cache"), **settings)


def make_module(**settings) -> GPTModule:
    sizes = dict(block_size=8, n_embd=16, n_head=2, n_layer=2, dropout=0.2, lr=1e-2, seed=1)
    return GPTModule(**sizes | settings)


def make_trainer(folder: Path, *callbacks, **settings) -> Trainer:
    """A Trainer whose run is `folder`."""
    defaults = dict(
        max_steps=12,
        val_check_interval=4,
        log_every_n_steps=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
    )
    return make_any_trainer(callbacks=[*callbacks, RunCheckpoint(folder)], **defaults | settings)


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def assert_same(a, b) -> None:
    """Assert that nested dicts and lists of tensors and plain values are bit-identical."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b
