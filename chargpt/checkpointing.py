"""Nothing lost: checkpoints that are whole or absent, the last step, and stopping on a signal."""

import signal
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from chargpt.atomic_file import atomic_write
from chargpt.runs import BEST_NAME, LAST_NAME, CheckpointError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's own moves a file out of the temporary folder, which may end in half a checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        try:
            with atomic_write(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch wraps some errors of the disk
            raise CheckpointError(
                f"could not write checkpoint {path.absolute()}: {plain_reason(error)}\n"
                "checkpoints written before are whole; make room, then go on with --ckpt_path last"
            ) from error


def plain_reason(error: BaseException) -> str:
    """What the operating system said, behind whatever wraps it."""
    while not isinstance(error, OSError) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def best_checkpoint_callback() -> ModelCheckpoint:
    """Keeps the checkpoint of lowest validation loss."""
    return ModelCheckpoint(
        filename=BEST_NAME,
        monitor="val_loss",
        save_top_k=1,
        auto_insert_metric_name=False,
        enable_version_counter=False,  # a validation that is repeated after a kill writes the same file
    )


class LastCheckpoint(Checkpoint):
    """Saves `last.ckpt` before each validation, at the end, and when a signal asks to stop.

    Ctrl-C and SIGTERM only set a flag: a run stops between two steps or two blocks of a validation,
    all ranks at the same one, which leaves nothing half done. The process ends with status 130 or
    143, as a scheduler expects.

    Args:
        best: keeps the best checkpoint, and has found a folder for it; ours lies beside.
    """

    def __init__(self, best: ModelCheckpoint) -> None:
        self.best = best
        self.received = 0
        self.received_at = 0.0
        self.saved_step = -1

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        # Lightning puts the handlers back that were there before. It keeps a SIGTERM in mind that
        # came while the run was being set up.
        self.received = signal.SIGTERM if trainer.received_sigterm else 0
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                signal.signal(signum, self.receive)

    def receive(self, signum: int, frame: Any) -> None:
        now = time.monotonic()
        # Asked again, we stop at once; but torchrun hands on a Ctrl-C that we have already seen.
        if self.received and signum == signal.SIGINT and now - self.received_at > 1:
            raise KeyboardInterrupt
        self.received, self.received_at = signum, now

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True  # lets Lightning validate the final step as well
        self.stop_if_asked(trainer)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.save(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        # Nothing is saved in here, where weight averaging has its averages in the network's place.
        # Ranks have different numbers of blocks, so that several cannot agree to stop.
        if self.received and trainer.world_size == 1:
            self.stop(trainer, self.received)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            # Its score is not in what was saved before; a run that is killed scores this step again.
            self.saved_step = -1
            self.stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        # The end of the run. In on_train_end weight averaging has already replaced the weights.
        if self.saved_step != trainer.global_step:
            self.save(trainer)

    def stop_if_asked(self, trainer: Trainer) -> None:
        signum = self.received
        if trainer.world_size > 1:  # each rank hears of it at a moment of its own
            received = torch.tensor(signum, device=trainer.strategy.root_device)
            signum = int(trainer.strategy.reduce(received, reduce_op="max"))
        if signum:
            if self.saved_step != trainer.global_step:
                self.save(trainer)
            self.stop(trainer, signum)

    def stop(self, trainer: Trainer, signum: int) -> NoReturn:
        if trainer.is_global_zero:
            print(
                f"\nstopped after step {trainer.global_step}; saved {self.path}\n"
                "go on with the same command and --ckpt_path last"
            )
        raise SystemExit(128 + signum)

    def save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self.saved_step = trainer.global_step

    @property
    def path(self) -> Path:
        return Path(self.best.dirpath, f"{LAST_NAME}.ckpt")
