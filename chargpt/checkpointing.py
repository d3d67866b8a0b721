"""Nothing lost: checkpoints that are whole or absent, the last step, and stopping on a signal."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from chargpt.runs import BEST_NAME, LAST_NAME, CheckpointError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, waits for the disk, then renames: a reader sees old or new, never half."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:  # torch wraps some errors of the disk
            raise CheckpointError(
                f"could not write checkpoint {path.absolute()}: {plain_reason(error)}\n"
                "checkpoints written before are whole; make room, then go on with --ckpt_path last"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)


def plain_reason(error: BaseException) -> str:
    """What the operating system said, behind whatever wraps it."""
    while not isinstance(error, OSError) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def best_checkpoint_callback() -> ModelCheckpoint:
    """Keeps the checkpoint of lowest validation loss."""
    return ModelCheckpoint(filename=BEST_NAME, monitor="val_loss", save_top_k=1, auto_insert_metric_name=False)


class LastCheckpoint(Checkpoint):
    """Saves `last.ckpt` after each validation, at the end, and when Ctrl-C or SIGTERM asks to stop.

    A signal only sets a flag: stopping between two steps leaves nothing half done. All ranks stop
    at the same step. The process ends with status 130 or 143, as a scheduler expects.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.saved_step = -1
        self.handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.received = None
        if threading.current_thread() is threading.main_thread():
            self.handlers = {s: signal.signal(s, self.receive) for s in SIGNALS}

    def receive(self, signum: int, frame: Any) -> None:
        self.received = signum
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C stops at once

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
        self.handlers = {}

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True  # lets Lightning validate the final step as well
        self.stop_if_asked(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        # Ranks have different numbers of blocks, so several cannot agree in here.
        if trainer.world_size == 1 and not trainer.sanity_checking:
            self.stop_if_asked(trainer)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.save(trainer)
            self.stop_if_asked(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.saved_step != trainer.global_step:
            self.save(trainer)

    def stop_if_asked(self, trainer: Trainer) -> None:
        asked = self.received is not None
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked:
            self.save(trainer)
            self.say_how_to_go_on(trainer)
            raise SystemExit(128 + (self.received or signal.SIGTERM))

    def save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.path(trainer))
        self.saved_step = trainer.global_step

    @staticmethod
    def path(trainer: Trainer) -> Path:
        return Path(trainer.checkpoint_callback.dirpath, f"{LAST_NAME}.ckpt")

    @rank_zero_only
    def say_how_to_go_on(self, trainer: Trainer) -> None:
        print(
            f"\nstopped after step {trainer.global_step}; saved {self.path(trainer)}\n"
            "go on with the same command and --ckpt_path last"
        )
