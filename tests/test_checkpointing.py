"""Runs that are stopped anywhere and go on, and checkpoints that are whole or absent."""

import signal
from contextlib import suppress

import pytest
from lightning import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging

from chargpt.runs import read_checkpoint
from tiny import MUON, assert_same, last, make_data, make_module, make_trainer


class Killed(BaseException):
    """What kill -9 leaves is what had been written before."""


class StopAt(Callback):
    """Stops the run in a hook, the `nth` time that it is called: by a signal, or dead."""

    def __init__(self, hook: str, nth: int, by: int | None) -> None:
        self.calls, self.nth, self.by = 0, nth, by
        setattr(self, hook, self.stop)

    def stop(self, *_) -> None:
        self.calls += 1
        if self.calls == self.nth:
            if self.by is None:
                raise Killed
            signal.raise_signal(self.by)


class Scores(Callback):
    """Each validation's step, as the logger counts, and loss."""

    def __init__(self) -> None:
        self.seen = []

    def on_validation_end(self, trainer, module) -> None:
        self.seen.append((trainer.fit_loop.epoch_loop._batches_that_stepped, trainer.callback_metrics["val_loss"].item()))


def run(folder, *callbacks, ckpt_path=None, model=None, **settings):
    """Train in `folder`; what was scored, and the checkpoint at the end."""
    scores = Scores()
    trainer = make_trainer(folder, scores, *callbacks, **settings)
    trainer.fit(make_module(**model or {}), make_data(folder), ckpt_path=ckpt_path, weights_only=True)
    return scores.seen, read_checkpoint(last(folder))


def assert_same_end(a, b) -> None:
    (scores_a, end_a), (scores_b, end_b) = a, b
    for key in ("global_step", "state_dict", "optimizer_states", "vocabulary", "current_model_state"):
        assert_same(end_a.get(key), end_b.get(key))
    assert scores_b == scores_a[-len(scores_b) :]
    best_a, best_b = (
        next(state for name, state in end["callbacks"].items() if name.startswith("ModelCheckpoint"))
        for end in (end_a, end_b)
    )
    assert best_a["best_model_score"] == best_b["best_model_score"]


INTERRUPTIONS = [
    # hook, nth call, signal, the validations that are left (of 3, after steps 4, 8 and 12)
    ("on_train_batch_start", 1, signal.SIGINT, 3),
    ("on_train_batch_start", 6, signal.SIGTERM, 2),
    ("on_train_batch_end", 8, signal.SIGINT, 2),  # a validation is due
    ("on_validation_start", 2, signal.SIGTERM, 2),
    ("on_validation_batch_start", 12, signal.SIGINT, 2),
    ("on_validation_end", 2, signal.SIGINT, 1),
    ("on_train_batch_start", 7, None, 2),
    ("on_validation_batch_start", 12, None, 2),
]


@pytest.mark.parametrize("hook, nth, by, left", INTERRUPTIONS)
@pytest.mark.parametrize("averaging", [False, True])
def test_a_stopped_run_goes_on_exactly(tmp_path, hook, nth, by, left, averaging):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    model = MUON if averaging else {}

    def train(folder, *callbacks, **settings):
        average = [EMAWeightAveraging(decay=0.5)] if averaging else []
        return run(folder, *average, *callbacks, model=model, **settings)

    with suppress(Killed):
        with pytest.raises(SystemExit) as stopped:
            train(parts, StopAt(hook, nth, by))
        assert stopped.value.code == 128 + by
    rest = train(parts, ckpt_path=last(parts))
    assert_same_end(train(whole), rest)
    assert len(rest[0]) == left
