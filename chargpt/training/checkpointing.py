"""Checkpointing: files that are whole or absent, and the checkpoint of lowest validation loss."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from chargpt.atomic_file import atomic_write
from chargpt.checkpoints import BEST_NAME, CheckpointError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically: beside the target, synced, then renamed.

    Lightning's own moves a file out of the temporary folder, which may end in half a checkpoint.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
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
    while not isinstance(error, OSError) and (cause := error.__cause__ or error.__context__):
        error = cause
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def best_checkpoint_callback(folder: Path | None = None) -> ModelCheckpoint:
    """Keeps the checkpoint of lowest validation loss; in the trainer's folder unless given."""
    return ModelCheckpoint(
        dirpath=folder,
        filename=BEST_NAME,
        monitor="val_loss",
        save_top_k=1,
        auto_insert_metric_name=False,
        enable_version_counter=False,  # a validation repeated after a kill writes the same file
    )
