"""Several ranks (gloo) train like one with a larger batch, and stop together."""

import os
import signal
import sys
import time

import numpy as np
import pytest
import torch
from lightning import Callback
from test_resume import StopAt
from tiny import (
    MUON,
    assert_same,
    last,
    make_data,
    make_module,
    make_trainer,
    open_text,
    write_text,
)

from chargpt.checkpoints import read_checkpoint
from chargpt.data.texts import NAMED_TEXTS, UnavailableError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")

TWO = dict(strategy="ddp_fork", devices=2)


class Record(Callback):
    """Saves the batches and losses in a file per rank."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.seen = dict(batches=[], own=[], train=[], val=[])

    def on_train_batch_end(self, trainer, module, outputs, batch, *_) -> None:
        self.seen["batches"].append(batch)
        self.seen["own"].append(outputs["loss"].item())
        self.seen["train"].append(trainer.callback_metrics["train_loss"].item())

    def on_validation_end(self, trainer, module) -> None:
        self.seen["val"].append(trainer.callback_metrics["val_loss"].item())
        torch.save(self.seen, self.folder / f"rank{trainer.global_rank}.pt")


def train(folder, *callbacks, data=None, model=None, ckpt_path=None, **settings):
    folder.mkdir(exist_ok=True)
    trainer = make_trainer(folder, Record(folder), *callbacks, **settings)
    data = make_data(folder, **data or {})
    trainer.fit(
        make_module(**{"dropout": 0.0} | (model or {})),
        data,
        ckpt_path=ckpt_path,
        weights_only=True,
    )
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("rank*.pt"))]


@pytest.mark.parametrize("model", [{}, MUON])
def test_two_ranks_train_as_one_does_with_twice_the_batch(tmp_path, model):
    first, second = train(tmp_path / "two", model=model, max_steps=20, **TWO)
    (alone,) = train(tmp_path / "one", model=model, max_steps=20, data=dict(batch_size=8))
    for a, b, both in zip(first["batches"], second["batches"], alone["batches"]):
        assert torch.equal(torch.cat((a, b)), both)
        assert not {tuple(row) for row in a.tolist()} & {tuple(row) for row in b.tolist()}
    assert first["train"] == pytest.approx(alone["train"], abs=1e-4)
    assert first["train"] == second["train"]
    assert first["val"] == second["val"]
    assert first["val"] == pytest.approx(alone["val"], abs=1e-4)


def test_each_rank_draws_its_own_dropout(tmp_path):
    """All sequences are the same and the weights do not change: only the masks differ."""
    (tmp_path / "text.txt").write_text("ab" * 900 + "c" * 200)
    settings = dict(model=dict(dropout=0.5, lr=1e-12, position="rotary"), data=dict(batch_size=1))
    first, second = train(tmp_path, max_steps=3, **settings, **TWO)
    assert len({*first["own"], *second["own"]}) == 6


def test_ranks_agree_on_the_elapsed_fraction(tmp_path, monkeypatch):
    """The clock of the second rank runs 50 times as fast; both use the larger fraction."""
    seen = []

    class Progress(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            seen.append(module.progress)
            torch.save(seen, tmp_path / f"progress{trainer.global_rank}.pt")

    monotonic = time.monotonic
    ahead = lambda: monotonic() * (50 if int(os.environ.get("LOCAL_RANK", 0)) else 1)
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time.monotonic", ahead)
    train(tmp_path, Progress(), max_steps=-1, max_time=dict(seconds=4), **TWO)
    first, second = (torch.load(tmp_path / f"progress{rank}.pt") for rank in (0, 1))
    assert first == second == sorted(first)
    assert 0 < len(set(first)) <= 8 and first[-1] <= 1


@pytest.mark.parametrize("characters", [2, 10, 149])
def test_one_checkpoint_scores_the_same_on_any_number_of_ranks(tmp_path, characters):
    """One rank without a sequence; a rank with 8 and one with 1 character; 10 and 9 sequences."""
    data = dict(corpus=str(write_text(tmp_path, 1000)), val_fraction=characters / 1000 + 1e-9)
    scores = []
    for settings in (dict(devices=1), TWO):
        folder = tmp_path / str(len(scores))
        record = train(folder, data=data, model=dict(lr=1e-9), max_steps=1, **settings)
        scores.append(record[0]["val"][0])
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


@pytest.mark.parametrize(
    "hook, nth, by, ranks",
    [
        ("on_train_batch_start", 7, signal.SIGINT, 2),
        ("on_validation_batch_start", 2, signal.SIGTERM, 2),
        ("on_train_batch_start", 5, signal.SIGTERM, 3),  # whose sums depend on their order
    ],
)
def test_a_signal_to_one_rank_stops_all_and_they_resume_exactly(tmp_path, hook, nth, by, ranks):
    class StopSecondRank(StopAt):
        def setup(self, trainer, *_, **__):
            self.nth = self.nth if trainer.global_rank == 1 else None

    settings = dict(accumulate_grad_batches=2, model=dict(dropout=0.2), **TWO)
    settings["devices"] = ranks
    train(tmp_path / "whole", **settings)
    with pytest.raises(Exception, match=f"exit code {128 + by}"):
        train(tmp_path / "parts", StopSecondRank(hook, nth, by), **settings)
    assert read_checkpoint(last(tmp_path / "parts"))["global_step"] < 12
    train(tmp_path / "parts", ckpt_path=last(tmp_path / "parts"), **settings)
    whole, parts = (read_checkpoint(last(tmp_path / name)) for name in ("whole", "parts"))
    for key in ("global_step", "state_dict", "optimizer_states"):
        assert_same(whole[key], parts[key])


def test_all_ranks_use_the_fallback_text_that_rank_0_chose(tmp_path, monkeypatch):
    def unavailable(folders):
        (tmp_path / "requested").touch()
        raise UnavailableError("no network")

    monkeypatch.setitem(NAMED_TEXTS, "tiny-shakespeare", unavailable)
    fallback = dict(
        corpus="tiny-shakespeare", fallback_corpus="python-reference", val_fraction=0.001
    )
    first, second = train(tmp_path, data=fallback, max_steps=2, **TWO)
    assert (tmp_path / "requested").exists()
    text = open_text("python-reference", tmp_path / "cache").tokens
    windows = np.lib.stride_tricks.sliding_window_view(text, 9)
    for record in (first, second):
        sequence = record["batches"][0][0].numpy()
        assert (windows == sequence).all(1).any()
