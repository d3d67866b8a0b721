"""training/checkpointing.py: the run folder, moved runs, users' own periodic checkpoints."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import assert_same, last, make_data, make_module, make_trainer

from chargpt.atomic_file import atomic_write
from chargpt.checkpoints import LOGS, read_checkpoint
from chargpt.model import UserError
from chargpt.training import GPTModule
from chargpt.training.checkpointing import RunCheckpoint, localize_paths

RUN = Path(LOGS, "version_0")
RESUME = ("fit", "--ckpt_path=last", "--trainer.max_steps=12")


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A folder with a run of 8 steps, which the test may change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def train(folder: Path, *callbacks, ckpt_path=None, data=None, **settings) -> dict:
    """The checkpoint at the end of a run in `folder`."""
    folder.mkdir(exist_ok=True)
    data = make_data(folder, **data or {})
    make_trainer(folder, *callbacks, **settings).fit(make_module(), data, ckpt_path=ckpt_path)
    return read_checkpoint(last(folder))


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


# ---- the run folder ----


def test_a_second_process_in_the_same_folder_is_refused(run, command):
    """And it changes no file there."""
    with FileLock(run / RUN / ".lock"):
        before = snapshot(run / RUN)
        result = command(run, *RESUME)
        assert result.status == 1
        assert "error: another process is training in" in result.err
        assert snapshot(run / RUN) == before
    result = command(run, *RESUME)
    assert result.status == 0, result.err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_killed_process_leaves_neither_a_lock_nor_a_temporary_file(run, command):
    child = os.fork()
    if child == 0:
        try:
            callback = RunCheckpoint(run / RUN)
            callback.acquire_lock()
            with atomic_write(callback.path("best.ckpt")) as file:
                file.write(b"half")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (run / RUN / ".lock").exists()
    assert len(list(run.rglob("*.tmp"))) == 1
    result = command(run, *RESUME, "--model.lr=1.0")  # no better checkpoint replaces it
    assert result.status == 0, result.err
    assert list(run.rglob("*.tmp")) == []


def test_a_file_system_without_locks_can_be_trained_on(tmp_path, monkeypatch):
    def no_locks(*_, **__):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(FileLock, "acquire", no_locks)
    assert train(tmp_path, max_steps=1)["global_step"] == 1


def test_a_command_that_cannot_resume_does_not_change_the_run(run, command):
    before = snapshot(run / RUN)
    result = command(run, *RESUME, "--data.corpus=none.txt")
    assert (result.status, "there is no text" in result.err) == (1, True), result.err
    assert {path for path in (run / RUN).rglob("*") if path.name != ".lock"} == {
        path for path in before if path.name != ".lock"
    }
    assert (run / RUN / "config.yaml").read_bytes() == before[run / RUN / "config.yaml"]


def test_a_new_run_that_saves_nothing_leaves_no_folder(folder, command):
    result = command(folder, "fit", "--config=tiny.yaml", "--data.block_size=4000")
    assert result.status == 1
    assert not (folder / LOGS).exists()


# ---- runs that were moved ----


@pytest.mark.parametrize("place", [f"{LOGS}/renamed", "elsewhere/renamed"])
def test_a_moved_run_resumes_in_its_folder_and_keeps_its_best(run, command, place):
    curves = len(list((run / RUN).glob("events.out*")))
    (run / place).parent.mkdir(exist_ok=True)
    (run / RUN).rename(run / place)
    path = last(run / place)
    best = path.with_name("best.ckpt")
    before = best.read_bytes()
    # With this learning rate training diverges, so no later score is better.
    result = command(run, "fit", f"--ckpt_path={path}", *RESUME[2:], "--model.lr=1.0")
    assert result.status == 0, result.err
    assert read_checkpoint(path)["global_step"] == 12
    assert best.read_bytes() == before
    assert str(best) in result.err
    assert not list(run.glob(f"{LOGS}/version_*"))
    assert len(list((run / place).glob("events.out*"))) > curves


def test_a_lone_checkpoint_starts_a_run_of_its_own(run, command):
    lone = run / "models" / "last.ckpt"
    lone.parent.mkdir()
    shutil.move(last(run / RUN), lone)
    before = snapshot(run / RUN), lone.read_bytes()
    result = command(run, "fit", f"--ckpt_path={lone}", "--trainer.max_steps=12")
    assert result.status == 0, result.err
    assert (snapshot(run / RUN), lone.read_bytes()) == before
    assert read_checkpoint(last(run / LOGS / "version_1"))["global_step"] == 12
    assert last(run / LOGS / "version_1").with_name("best.ckpt").exists()


@pytest.mark.parametrize("path", ["/far/away/a.ckpt", "..\\up\\a.ckpt", "../../a.ckpt", "a.ckpt"])
def test_paths_in_a_callback_state_become_files_in_its_folder(path):
    state = dict(
        dirpath="/far/away",
        best_model_path=path,
        last_model_path="",
        kth_best_model_path=path,
        best_k_models={path: torch.tensor(1.0)},
    )
    localize_paths(state, "here")
    local = str(Path("here", "a.ckpt"))
    assert state == dict(
        dirpath="here",
        best_model_path=local,
        last_model_path="",
        kth_best_model_path=local,
        best_k_models={local: torch.tensor(1.0)},
    )


# ---- users' own periodic checkpoints ----


@pytest.fixture(scope="module", params=[1, 3])
def saved_at_each_step(request, tmp_path_factory):
    """A run with a checkpoint of each step, its settings and its last checkpoint."""
    folder, settings = tmp_path_factory.mktemp("whole"), dict(accumulate_grad_batches=request.param)
    own = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1, filename="own-{step}")
    return folder, settings, train(folder, own, **settings)


@pytest.mark.parametrize("step", range(1, 12))
def test_a_periodic_checkpoint_is_resumed_exactly_or_refused(tmp_path, saved_at_each_step, step):
    """Validations are due after steps 4 and 8, when `every_n_train_steps` saves before them."""
    folder, settings, whole = saved_at_each_step
    path = last(folder).with_name(f"own-step={step}.ckpt")
    data = dict(corpus=str(folder / "text.txt"))
    again = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1, filename="own-{step}")
    if step in (4, 8):
        with pytest.raises(UserError, match="cannot be resumed exactly"):
            train(tmp_path / "parts", again, ckpt_path=path, data=data, **settings)
        return
    parts = train(tmp_path / "parts", again, ckpt_path=path, data=data, **settings)
    for key in ("global_step", "state_dict", "optimizer_states"):
        assert_same(whole[key], parts[key])
    assert whole["chargpt"]["val_loss"] == parts["chargpt"]["val_loss"]


def test_a_checkpoint_within_an_accumulation_is_refused(tmp_path):
    class Saves(ModelCheckpoint):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            if batch_idx == 7:  # the second of the three batches of step 3
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    train(tmp_path, Saves(save_top_k=0), accumulate_grad_batches=3)
    with pytest.raises(UserError, match="during gradient accumulation"):
        train(tmp_path, ckpt_path=tmp_path / "within.ckpt", accumulate_grad_batches=3)


# ---- runs that could not be resumed are refused at their start ----


def test_the_number_of_sequences_per_step_changes_only_if_it_is_asked_for(run, command):
    checkpoint = read_checkpoint(last(run / RUN))
    checkpoint["chargpt"]["sequences_per_step"] *= 2  # as if it had run on two devices
    torch.save(checkpoint, last(run / RUN))
    result = command(run, *RESUME)
    assert (result.status, "8 sequences per step, but this command" in result.err) == (1, True)
    assert "add --trainer.devices 2" in result.err
    result = command(run, *RESUME, "--data.batch_size=4")
    assert result.status == 0, result.err


def test_the_part_of_the_split_that_is_validated_cannot_be_changed(run, command):
    result = command(run, *RESUME, "--trainer.limit_val_batches=1")
    assert (result.status, "limit_val_batches is None in" in result.err) == (1, True), result.err


def test_accumulation_cannot_be_changed_when_a_run_resumes(run, command):
    result = command(run, *RESUME, "--trainer.accumulate_grad_batches=2")
    assert (result.status, "accumulate_grad_batches is 1" in result.err) == (1, True), result.err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(limit_train_batches=3, accumulate_grad_batches=2), "not a multiple of"),
        (dict(max_epochs=0), "max_epochs is 0"),
        (dict(max_time=60), "is not a duration"),
    ],
)
def test_settings_that_cannot_be_resumed_or_do_nothing_are_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        make_trainer(tmp_path, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        dict(min_steps=2, max_steps=6),
        dict(limit_train_batches=4, check_val_every_n_epoch=2, max_epochs=3, max_steps=-1),
        dict(max_steps=-1, min_steps=2, max_time="00:00:00:01", limit_val_batches=0),
    ],
    ids=str,
)
def test_the_last_checkpoint_of_a_finished_run_can_be_resumed(tmp_path, settings):
    assert train(tmp_path, **settings)["chargpt"]["resumable"] is True


def test_a_run_without_validation_saves_at_the_interval_too(tmp_path):
    class Crash(Callback):
        def on_train_batch_start(self, trainer, *_) -> None:
            if trainer.global_step == 11:
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path, Crash(), limit_val_batches=0)
    assert read_checkpoint(last(tmp_path))["global_step"] == 8


def test_a_second_fit_with_one_trainer_trains_to_its_new_limit(tmp_path):
    trainer, module, data = make_trainer(tmp_path, max_steps=4), make_module(), make_data(tmp_path)
    trainer.fit(module, data)
    trainer.fit_loop.epoch_loop.max_steps = 12
    trainer.fit(module, data, ckpt_path=last(tmp_path))
    assert trainer.global_step == 12


def test_a_damaged_best_checkpoint_is_a_warning_and_is_replaced(tmp_path):
    train(tmp_path, max_steps=4)
    best = last(tmp_path).with_name("best.ckpt")
    best.write_bytes(best.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="best.ckpt"):
        train(tmp_path, ckpt_path=last(tmp_path))
    assert read_checkpoint(best)["chargpt"]["val_loss"] > 0


def test_values_that_could_not_be_read_again_are_refused_at_the_first_checkpoint(tmp_path):
    class Counter(Callback):
        def state_dict(self):
            return {"path": tmp_path}

    with pytest.raises(UserError, match="PosixPath|WindowsPath"):
        train(tmp_path, Counter(), max_steps=4)
    assert not last(tmp_path).exists()


def test_a_network_is_not_used_with_the_vocabulary_of_a_different_text(tmp_path):
    train(tmp_path, max_steps=2)
    module = GPTModule.load_from_checkpoint(last(tmp_path))
    (tmp_path / "other.txt").write_text("ijklmnop \n" * 200)
    other = make_data(tmp_path, corpus=str(tmp_path / "other.txt"))
    with pytest.raises(UserError, match="does not know"):
        make_trainer(tmp_path / "new").validate(module, other, verbose=False)


def test_a_plateau_scheduler_resumes_from_a_validation(tmp_path):
    class Plateau(GPTModule):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            settings = dict(scheduler=scheduler, monitor="val_loss", interval="step", frequency=4)
            return {"optimizer": optimizer, "lr_scheduler": settings}

    def fit(folder, max_steps, **arguments) -> dict:
        folder.mkdir(exist_ok=True)
        trainer = make_trainer(folder, max_steps=max_steps)
        trainer.fit(Plateau(**make_module().hparams), make_data(folder), **arguments)
        return read_checkpoint(last(folder))

    whole = fit(tmp_path / "whole", 12)
    fit(tmp_path / "parts", 8)
    parts = fit(tmp_path / "parts", 12, ckpt_path=last(tmp_path / "parts"))
    assert_same(whole["state_dict"], parts["state_dict"])
    assert_same(whole["lr_schedulers"], parts["lr_schedulers"])


def test_a_checkpoint_in_any_folder_named_checkpoints_does_not_write_beside_it(run, command):
    folder = run / "project" / "checkpoints"
    folder.mkdir(parents=True)
    shutil.copy(run / RUN / "checkpoints" / "last.ckpt", folder / "mine.ckpt")
    (folder.parent / "config.yaml").write_text("mine")
    before = snapshot(folder.parent)
    result = command(run, "fit", f"--ckpt_path={folder / 'mine.ckpt'}", "--trainer.max_steps=9")
    assert result.status == 0, result.err
    assert snapshot(folder.parent) == before


def test_a_callback_state_cannot_delete_a_folder_or_our_checkpoints():
    state = {"best_model_path": "x/..", "best_k_models": {"x/..": 1.0, "a/best.ckpt": 2.0}}
    localize_paths(state, "/run/checkpoints")
    assert state["best_model_path"] == "" and state["best_k_models"] == {}
