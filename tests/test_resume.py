"""Resuming: a run that was stopped at any time ends with the same bits; checkpoints are atomic."""

import errno
import math
import os
import signal
import sys
import time
from contextlib import suppress

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from tiny import MUON, assert_same, last, make_data, make_module, make_trainer

from chargpt.checkpoints import read_checkpoint
from chargpt.model import UserError
from chargpt.training.checkpointing import RunCheckpoint


class Killed(BaseException):
    """Stands for kill -9: nothing is written after it."""


class StopAt(Callback):
    """Stops the run at the `nth` call of a hook, by a signal or as kill -9 does."""

    def __init__(self, hook: str, nth: int, by: int | None) -> None:
        self.calls, self.nth, self.by = 0, nth, by
        setattr(self, hook, self.stop)

    def stop(self, trainer, *_) -> None:
        self.calls += 1
        if self.calls == self.nth:
            self.step = trainer.global_step
            if self.by is None:
                raise Killed
            signal.raise_signal(self.by)


class Scores(Callback):
    """The step (as loggers count) and loss of each validation."""

    def __init__(self) -> None:
        self.seen = []

    def on_validation_end(self, trainer, module) -> None:
        self.seen.append(
            (
                trainer.fit_loop.epoch_loop._batches_that_stepped,
                trainer.callback_metrics["val_loss"].item(),
            )
        )


def run(folder, *callbacks, ckpt_path=None, model=None, data=None, **settings):
    """Train in `folder`; returns the scores and the last checkpoint."""
    folder.mkdir(exist_ok=True)
    scores = Scores()
    trainer = make_trainer(folder, scores, *callbacks, **settings)
    trainer.fit(make_module(**model or {}), make_data(folder, **data or {}), ckpt_path=ckpt_path)
    return scores.seen, read_checkpoint(last(folder))


def assert_same_end(a, b) -> None:
    (scores_a, end_a), (scores_b, end_b) = a, b
    for key in (
        "global_step",
        "state_dict",
        "optimizer_states",
        "vocabulary",
        "current_model_state",
    ):
        assert_same(end_a.get(key), end_b.get(key))
    assert scores_b == scores_a[-len(scores_b) :]
    assert end_a["chargpt"]["val_loss"] == end_b["chargpt"]["val_loss"]


INTERRUPTIONS = [
    # hook, nth call, signal, remaining validations (of 3, after steps 4, 8 and 12)
    ("on_train_batch_start", 1, signal.SIGINT, 3),
    ("on_train_batch_start", 6, signal.SIGTERM, 2),
    ("on_train_batch_end", 8, signal.SIGINT, 1),  # a validation is due and runs first
    ("on_validation_start", 2, signal.SIGTERM, 1),
    ("on_validation_batch_start", 12, signal.SIGINT, 1),
    ("on_validation_end", 2, signal.SIGINT, 1),
    ("on_train_batch_start", 7, None, 2),  # killed: the steps since the last validation are lost
    ("on_validation_batch_start", 12, None, 2),
]


RECIPES = {
    "adamw": {},
    "muon, averaged": dict(model=MUON | dict(schedule="constant", warmup_steps=5), average=True),
    "accumulated": dict(accumulate_grad_batches=3, gradient_clip_val=0.5),
}


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request, tmp_path_factory):
    """A function that trains in a folder, and the result of an uninterrupted run."""
    settings = dict(RECIPES[request.param])
    average = settings.pop("average", False)

    def train(folder, *callbacks, **more):
        averaging = [EMAWeightAveraging(decay=0.5)] if average else []
        return run(folder, *averaging, *callbacks, **settings, **more)

    return (
        train,
        train(tmp_path_factory.mktemp("whole")),
        settings.get("accumulate_grad_batches", 1),
    )


@pytest.mark.parametrize("hook, nth, by, left", INTERRUPTIONS)
def test_a_stopped_run_resumes_exactly(tmp_path, recipe, hook, nth, by, left):
    train, whole, accumulate = recipe
    if hook.startswith("on_train") and nth > 1:
        nth = (nth - 1) * accumulate + min(2, accumulate)  # in the middle of an accumulation
    with suppress(Killed):
        with pytest.raises(SystemExit) as stopped:
            train(tmp_path, stop := StopAt(hook, nth, by))
        assert stopped.value.code == 128 + by
    if by:  # no step is lost
        assert read_checkpoint(last(tmp_path))["global_step"] >= stop.step
    rest = train(tmp_path, ckpt_path=last(tmp_path))
    assert_same_end(whole, rest)
    assert len(rest[0]) == left
    assert {path.name for path in last(tmp_path).parent.iterdir()} == {"last.ckpt", "best.ckpt"}


# Settings that depend on the progress of the run, so that a run of more steps is another run.
CPU = dict(
    model=MUON
    | dict(ngrams={2: 9, 4: 30}, ngram_dropout=0.3, second_target=0.5, schedule="linear")
    | dict(position="rotary", norm="plain", bias=False, short_contexts={4: 0.5}, dropout=0.0),
    data=dict(order="epochs", batch_size=20),  # in 12 steps, more than an epoch
)


@pytest.fixture(scope="module")
def whole_cpu(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"), **CPU)


@pytest.mark.parametrize("hook, nth, by, left", INTERRUPTIONS[1:3] + INTERRUPTIONS[6:7])
def test_the_recipe_of_cpu_yaml_resumes_exactly(tmp_path, whole_cpu, hook, nth, by, left):
    with suppress(Killed, SystemExit):
        run(tmp_path, StopAt(hook, nth, by), **CPU)
    rest = run(tmp_path, ckpt_path=last(tmp_path), **CPU)
    assert_same_end(whole_cpu, rest)
    assert len(rest[0]) == left


def test_a_finished_run_continues_with_more_steps(tmp_path, recipe):
    train, whole, accumulate = recipe
    train(tmp_path, max_steps=7)  # validates after its last step, unlike the whole run
    _, end = train(tmp_path, ckpt_path=last(tmp_path))
    assert_same_end(whole, (whole[0][-2:], end))


@pytest.mark.parametrize(
    "hook, nth, by", [("on_train_batch_start", 7, 2), ("on_validation_start", 2, 15)]
)
def test_a_run_that_counts_epochs_resumes_exactly(tmp_path, hook, nth, by):
    settings = dict(limit_train_batches=3, max_epochs=4, max_steps=-1, val_check_interval=2)
    whole = run(tmp_path / "whole", **settings)
    with pytest.raises(SystemExit):
        run(tmp_path / "parts", StopAt(hook, nth, by), **settings)
    assert_same_end(whole, run(tmp_path / "parts", ckpt_path=last(tmp_path / "parts"), **settings))


def test_a_run_without_validation_ends_with_its_last_step(tmp_path, recipe):
    train, whole, _ = recipe
    train(tmp_path, max_steps=7, limit_val_batches=0)
    _, end = train(tmp_path, ckpt_path=last(tmp_path), limit_val_batches=0)
    for key in ("global_step", "state_dict", "optimizer_states", "current_model_state"):
        assert_same(whole[1].get(key), end.get(key))


def test_a_run_resumes_from_its_best_checkpoint(tmp_path, recipe):
    train, whole, _ = recipe
    train(tmp_path, max_steps=8)
    assert_same_end(whole, train(tmp_path, ckpt_path=last(tmp_path).with_name("best.ckpt")))


def test_validating_alone_saves_nothing(tmp_path):
    with pytest.raises(Killed):  # after Lightning's sanity check
        run(tmp_path, StopAt("on_train_start", 1, None), num_sanity_val_steps=1)
    assert not list(tmp_path.rglob("*.ckpt"))
    run(tmp_path, max_steps=4)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.ckpt")}
    trainer, begin = make_trainer(tmp_path), dict(ckpt_path=last(tmp_path))
    trainer.validate(make_module(), make_data(tmp_path), verbose=False, **begin)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.ckpt")} == before


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    callback = RunCheckpoint(None)
    clock = iter([10.0, 10.1, 12.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    callback.receive(signal.SIGINT, None)
    callback.receive(signal.SIGINT, None)  # the first one, passed on by torchrun
    with pytest.raises(KeyboardInterrupt):
        callback.receive(signal.SIGINT, None)


# ---- atomic checkpoints ----


def test_a_full_disk_costs_the_checkpoint_being_written_and_no_other(tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run(tmp_path, max_steps=4)
    before = last(tmp_path).read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        run(tmp_path, ckpt_path=last(tmp_path))
    assert last(tmp_path).read_bytes() == before
    assert [path.suffix for path in (tmp_path / "checkpoints").iterdir()] == [
        ".ckpt"
    ] * 2  # no partial file


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_limit_on_the_size_of_files_is_a_full_disk_too(tmp_path):
    import resource

    run(tmp_path, max_steps=4)
    before = last(tmp_path).read_bytes()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(UserError, match="File too large"):
            run(tmp_path, ckpt_path=last(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert last(tmp_path).read_bytes() == before
    run(tmp_path, ckpt_path=last(tmp_path))


class Boom:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("where", ["optimizer_states", "hyper_parameters", "callbacks", "extra"])
def test_resuming_does_not_run_code_in_a_checkpoint(tmp_path, where):
    run(tmp_path, max_steps=4)
    checkpoint = read_checkpoint(last(tmp_path))
    checkpoint[where] = Boom(tmp_path / "executed")
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    with pytest.raises(Exception, match="not code"):
        run(tmp_path, ckpt_path=tmp_path / "bad.ckpt")
    assert not (tmp_path / "executed").exists()


# ---- a loss that is not a number ----


class Poison(Callback):
    """Makes a weight NaN before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, module, *_) -> None:
        if trainer.global_step == self.step:
            next(module.gpt.parameters()).data[:] = math.nan


@pytest.mark.parametrize("log_every, step", [(1, 6), (100, 8)])
def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path, log_every, step):
    """NaN is found when the loss is logged, or before the next checkpoint."""
    with pytest.raises(UserError, match=f"nan at step {step}"):
        run(tmp_path, Poison(5), log_every_n_steps=log_every)
    checkpoint = read_checkpoint(last(tmp_path))
    assert checkpoint["global_step"] == 4
    assert all(w.isfinite().all() for w in checkpoint["state_dict"].values())


def test_ctrl_c_saves_no_nan(tmp_path):
    with pytest.raises(UserError, match="not finite at step 6"):
        run(
            tmp_path,
            Poison(5),
            StopAt("on_train_batch_end", 6, signal.SIGINT),
            log_every_n_steps=100,
        )
    assert read_checkpoint(last(tmp_path))["global_step"] == 4


def test_a_signal_before_min_steps_stops_a_run_that_was_asked_to_stop_early(tmp_path):
    """Lightning does not validate before min_steps, so there is no validation to wait for."""

    class StopsEarly(Callback):
        def on_train_batch_start(self, trainer, *_) -> None:
            trainer.should_stop = True

    late = dict(min_steps=10, val_check_interval=100)
    with pytest.raises(SystemExit):
        run(tmp_path, StopsEarly(), StopAt("on_train_batch_start", 3, signal.SIGTERM), **late)
    assert read_checkpoint(last(tmp_path))["global_step"] == 3


def test_a_time_limit_within_an_accumulation_waits_for_the_optimizer_step(tmp_path):
    """A run that gets more time then resumes exactly."""

    class Limit(Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            trainer.should_stop |= trainer.fit_loop.total_batch_idx == 10  # of step 4, the second

    settings = dict(accumulate_grad_batches=3, val_check_interval=100)
    whole = run(tmp_path / "whole", **settings)
    _, end = run(tmp_path / "parts", Limit(), **settings)
    assert (end["global_step"], end["chargpt"]["resumable"]) == (4, True)
    rest = run(tmp_path / "parts", ckpt_path=last(tmp_path / "parts"), **settings)
    assert_same_end(whole, (whole[0][-1:], rest[1]))
