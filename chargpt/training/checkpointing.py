"""The checkpoints of a run, last.ckpt and best.ckpt, and stopping on a signal.

They are written only where Lightning's own loop state resumes exactly: after an optimizer
step with no validation due, after a validation, and at the end of the epoch. The rest follows from
the step (with max_time, also from the time): which sequences are read (`data/datasets.py`), dropout
and the learning rate (`training/module.py`).
"""

import inspect
import math
import shutil
import signal
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple, NoReturn

import torch
from filelock import FileLock, Timeout
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, Timer, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from chargpt.checkpoints import (
    BEST,
    FOLDER,
    LAST,
    check_weights,
    read_checkpoint,
    read_tensors_and_plain_values,
    write_checkpoint,
)
from chargpt.model import UserError

# Windows lacks the last two.
SIGNALS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, and reads tensors and plain values only."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        if Path(path).name == ".temp.ckpt":  # weights only: what ddp_fork returns from rank 0
            return read_tensors_and_plain_values(Path(path))
        return read_checkpoint(path)


class Validation(NamedTuple):
    """The result of a validation."""

    step: int  # optimizer step of the weights
    context: int  # length of the sequences
    loss: float

    def is_better_than(self, other: "Validation | None") -> bool:
        """A longer context wins; at the same context, where losses are comparable, a lower loss."""
        return other is None or (self.context, -self.loss) > (other.context, -other.loss)


class RunCheckpoint(Checkpoint):
    """Saves `last.ckpt` and `best.ckpt` of a run, and stops the run on a signal.

    Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP only set a flag. All ranks stop after the same optimizer
    step, or after the validation that is due then, with status 128 plus the signal's number.
    Ctrl-C more than a second after the first signal stops at once, without saving.

    Args:
        folder: The run folder on rank 0; None on other ranks, which get it from rank 0.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.is_new = folder is not None and not any(folder.glob("*"))
        self.lock: FileLock | None = None
        self.received = 0  # the number of the signal
        self.received_at = 0.0
        self.settings: dict[str, Any] = {}  # of the trainer, to be stored in checkpoints
        self.should_stop = False  # at the end of the optimizer step
        self.saved_step: int | None = None
        self.validated_batch: int | None = None  # after which validation last ran
        self.best: Validation | None = None  # of best.ckpt
        self.restored: Validation | None = None  # of the weights of the checkpoint that is resumed

    def path(self, name: str) -> Path:
        return Path(self.folder or ".", FOLDER, name)

    # ---- the folder ----

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.folder = trainer.strategy.broadcast(self.folder)
        fix_reduction_order(trainer)
        if trainer.is_global_zero:
            self.acquire_lock()
            if self.path(BEST).is_file():
                try:
                    self.best = validation_in(read_checkpoint(self.path(BEST)))
                except UserError as error:
                    reason = str(error).splitlines()[0]
                    warnings.warn(f"{reason}; the next validation will replace it", stacklevel=2)

    @rank_zero_only
    def acquire_lock(self) -> None:
        """Only one process may train in a folder; if it is killed, the system releases the lock."""
        if self.lock or not self.folder:
            return
        self.path(LAST).parent.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.folder / ".lock")
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"another process is training in {self.folder}\n"
                "wait until it has ended, or start a new run, without --ckpt_path"
            ) from None
        except OSError:
            pass  # a file system without locks
        for partial in self.path(LAST).parent.glob(".*.tmp"):  # of a process that was killed
            partial.unlink(missing_ok=True)

    def unlock(self, *_: Any, **__: Any) -> None:
        if self.lock:
            self.lock.release()
            self.lock = None

    on_exception = unlock  # loggers still write to the folder

    def release(self, *_: Any, **__: Any) -> None:
        """Unlock the folder; remove it if it is new and no checkpoint was saved in it."""
        self.unlock()
        if self.is_new and self.folder and not any(self.folder.glob(f"{FOLDER}/**/*.ckpt")):
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # lightning_logs, unless it contains others
                self.folder.parent.rmdir()

    teardown = release

    # ---- stopping ----

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        # Lightning notes a SIGTERM that arrives during setup, and restores the handlers at the end.
        self.received = signal.SIGTERM if trainer.received_sigterm else 0
        self.should_stop, self.validated_batch = False, None
        if self.restored:  # for schedulers that monitor it
            trainer.callback_metrics["val_loss"] = torch.tensor(self.restored.loss)
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                    signal.signal(signum, self.receive)

    def receive(self, signum: int, frame: Any) -> None:
        now = time.monotonic()
        if not self.received:
            self.received_at = now
        elif signum == signal.SIGINT and now - self.received_at > 1:
            raise KeyboardInterrupt  # an earlier one is torchrun's copy of the first
        self.received = signum

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        # Lightning validates before it stops. A time limit waits for a complete accumulation.
        self.should_stop |= trainer.should_stop or trainer.global_step == trainer.max_steps
        batches = trainer.fit_loop.batch_idx + 1
        trainer.should_stop = self.should_stop and batches % trainer.accumulate_grad_batches == 0
        signum = self.agreed_signal(trainer)
        total, interval = trainer.fit_loop.total_batch_idx + 1, trainer.val_check_batch or 1
        unvalidated = not trainer.enable_validation and total % interval == 0
        if (signum or unvalidated) and self.is_resumable(trainer):
            self.save_last(trainer)
            if signum:
                self.stop(trainer, signum)

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.validated_batch = trainer.fit_loop.total_batch_idx

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        new = validation_of(trainer, module)
        if trainer.strategy.broadcast(new.is_better_than(self.best)):
            trainer.save_checkpoint(self.path(BEST))
            self.best = new
        self.save_last(trainer)
        if signum := self.agreed_signal(trainer):
            self.stop(trainer, signum)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        # Not in on_train_end, where weight averaging has already replaced the weights.
        if self.saved_step != trainer.global_step:
            self.save_last(trainer)

    def agreed_signal(self, trainer: Trainer) -> int:
        """The signal that any rank has received: all must stop at the same step."""
        if trainer.world_size == 1:
            return self.received
        signum = torch.tensor(self.received, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(signum, reduce_op="max"))

    def stop(self, trainer: Trainer, signum: int) -> NoReturn:
        if trainer.is_global_zero:
            print(
                f"\nstopped after step {trainer.global_step}; saved {self.path(LAST)}\n"
                "to resume, repeat the command with --ckpt_path last"
            )
        raise SystemExit(128 + signum)

    def save_last(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.path(LAST))
        self.saved_step = trainer.global_step

    # ---- the contents of a checkpoint, and resuming from one ----

    def on_save_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        validated = self.validated_batch == trainer.fit_loop.total_batch_idx
        val_loss = trainer.callback_metrics.get("val_loss") if validated else None
        checkpoint["chargpt"] = dict(
            resumable=self.is_resumable(trainer),
            val_loss=None if val_loss is None else val_loss.item(),
            trainer=self.settings,
            sequences_per_step=sequences_per_step(trainer),
        )

    def is_resumable(self, trainer: Trainer) -> bool:
        """Whether Lightning would resume exactly from a checkpoint written now.

        It would after an optimizer step, unless a validation that is due then has not run yet.
        """
        loop, batches = trainer.fit_loop.epoch_loop, trainer.fit_loop.total_batch_idx + 1
        stepped = 0 < batches == trainer.global_step * trainer.accumulate_grad_batches
        if trainer.val_check_batch is None or not stepped:  # None: before the first step
            return False
        due = loop._should_check_val_fx(None)  # type: ignore[arg-type]  # unused if data is endless
        return not due or self.validated_batch == batches - 1

    def on_load_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != "fit":
            checkpoint.pop("loops", None)  # an evaluation starts at its first batch
            return
        check_resumable(trainer, checkpoint)
        check_weights(checkpoint.get("current_model_state") or {}, "the checkpoint")
        self.saved_step = checkpoint["global_step"]
        self.restored = validation_in(checkpoint)
        adapt_callback_states(trainer, checkpoint)


def validation_of(trainer: Trainer, module: Any) -> Validation:
    """The validation that has just ended."""
    loss = trainer.callback_metrics["val_loss"].item()
    return Validation(trainer.global_step, module.context, loss)


def validation_in(checkpoint: dict[str, Any]) -> Validation | None:
    """The validation of a checkpoint's weights, if there was one."""
    loss, context = (checkpoint["chargpt"].get(name) for name in ("val_loss", "context"))
    valid = type(loss) is float and math.isfinite(loss) and type(context) is int
    return Validation(checkpoint["global_step"], context, loss) if valid else None


def sequences_per_step(trainer: Trainer) -> int:
    """Sequences per optimizer step, across all devices."""
    per_device = trainer.datamodule.hparams["batch_size"]  # type: ignore[attr-defined]
    return per_device * trainer.world_size * trainer.accumulate_grad_batches


def check_resumable(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Raise a UserError for a checkpoint that this Trainer would not resume exactly."""
    callbacks, loops, optimizers = map(checkpoint.get, ("callbacks", "loops", "optimizer_states"))
    has_state = callbacks is not None and "fit_loop" in (loops or ()) and len(optimizers or ()) == 1
    if not (has_state and checkpoint["chargpt"].get("resumable")):
        raise UserError(
            "the checkpoint cannot be resumed exactly: it was written just before a validation "
            "or during gradient accumulation, or has no optimizer state\nresume from the run's "
            "last.ckpt, or start a new run from these weights with --init_from"
        )
    before = (checkpoint["chargpt"].get("trainer") or {}).get("accumulate_grad_batches")
    if before not in (None, trainer.accumulate_grad_batches):  # Lightning counts batches, not steps
        raise UserError(
            f"accumulate_grad_batches is {before} in the checkpoint and cannot be changed when a "
            "run resumes\nchange --data.batch_size instead"
        )
    known = {callback.state_key for callback in trainer.callbacks} | {Timer.__qualname__}  # type: ignore[attr-defined]
    missing = [str(key).partition("{")[0] for key in callbacks or () if key not in known]
    averages = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if "current_model_state" in checkpoint and not averages:
        missing.append("WeightAveraging")
    if missing:
        raise UserError(
            f"the run was started with the callback {missing[0]}, which this command lacks\n"
            "repeat the command that started the run, with --ckpt_path last"
        )


def adapt_callback_states(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Keep the saved counters of callbacks, but neither their settings nor their paths.

    Settings come from the command; paths become files in the callback's folder: a run may move.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        state = checkpoint.get("callbacks", {}).get(callback.state_key)
        if not isinstance(state, dict):
            continue
        for name in inspect.signature(type(callback)).parameters:
            if name in state and hasattr(callback, name):
                state[name] = getattr(callback, name)
        if isinstance(callback, ModelCheckpoint):
            localize_paths(state, str(callback.dirpath))


def localize_paths(state: dict[str, Any], folder: str) -> None:
    """Replace the paths in a ModelCheckpoint's state with files of the same name in its folder."""

    def local(path: Any) -> str:
        name = PureWindowsPath(str(path)).name  # after the last slash or backslash
        own = name.endswith(".ckpt") and name.lower() not in (LAST, BEST)
        return str(Path(folder, name)) if own else ""

    for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
        state[name] = local(state.get(name))
    best_k_models = dict(state.get("best_k_models") or {})
    state["best_k_models"] = {local(p): score for p, score in best_k_models.items() if local(p)}
    state["dirpath"] = folder


def fix_reduction_order(trainer: Trainer) -> None:
    """Make DistributedDataParallel add the gradients of three or more ranks in a fixed order.

    After the first step DDP rebuilds its gradient buckets, which changes the order, and so the
    rounding, of sums over three or more ranks: a resumed run would no longer be bit-identical.
    find_unused_parameters=True prevents this. Only now is the number of ranks known.
    """
    if isinstance(trainer.strategy, DDPStrategy) and trainer.world_size > 2:
        trainer.strategy._ddp_kwargs.setdefault("find_unused_parameters", True)
