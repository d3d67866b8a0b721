"""Resume: stopping on a signal with a checkpoint, and where a run resumes from one.

What Lightning's counters are set to stands in this file. The rest is a function of the step: which
sequences are read (`data/blocks.py`), dropout and the learning rate (`training/module.py`).
"""

import re
import signal
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from chargpt.checkpoints import LAST_NAME
from chargpt.training.agreement import Agreement

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class LastCheckpoint(Checkpoint):
    """Saves `last.ckpt` before each validation, at the end, and when a signal asks to stop.

    Ctrl-C and SIGTERM only set a flag: a run stops between two steps or two batches of a
    validation, all ranks at the same one, which leaves nothing half done. The process ends with
    status 130 or 143, as a scheduler expects.

    Args:
        best: keeps the best checkpoint, and has found a folder for it; ours lies beside.
    """

    def __init__(self, best: ModelCheckpoint) -> None:
        self.best = best
        self.received = 0
        self.received_at = 0.0
        self.saved_step: int | None = None
        self.validated_step = 0  # the last one after which there was a validation
        self.agreement = Agreement()

    # ---- what a checkpoint of ours holds beside Lightning's, and what resuming makes of it ----

    def on_save_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["validated_step"] = self.validated_step
        checkpoint["limit_val_batches"] = (
            trainer.limit_val_batches
        )  # 1.0: scores are of the whole split

    def on_load_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        restart_after_last_step(checkpoint, trainer)
        state = checkpoint["callbacks"].get(self.best.state_key)
        follow_moved_run(state, self.best.dirpath, trainer)
        self.validated_step = checkpoint["validated_step"]

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        keep_order_of_sums(trainer)

    # ---- stopping ----

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
        self.stop_if_asked(trainer, self.agreement.largest(trainer, self.received))

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.save(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        # Nothing is saved in here, where weight averaging has its averages in the network's place.
        # Ranks have different numbers of batches, so that several cannot agree to stop.
        if self.received and trainer.world_size == 1:
            self.stop(trainer, self.received)

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.validated_step = trainer.global_step

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            # Its score is not in what was saved before; a killed run scores this step again.
            self.saved_step = None
            self.stop_if_asked(trainer, self.agreement.ask(trainer, self.received))

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        # The end of the run. In on_train_end weight averaging has already replaced the weights.
        if self.saved_step != trainer.global_step:
            self.save(trainer)

    def stop_if_asked(self, trainer: Trainer, signum: float) -> None:
        """Stop for a signal that any rank has received, which hears of it at a moment of its own.

        Args:
            signum: its number, the largest where there are several; 0 for none.
        """
        if signum:
            if self.saved_step != trainer.global_step:
                self.save(trainer)
            self.stop(trainer, int(signum))

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


def keep_order_of_sums(trainer: Trainer) -> None:
    """Let DistributedDataParallel add the gradients of three or more ranks in one order.

    After its first step it puts them in other buckets, and a sum of three is rounded by the place
    in a bucket, so that a resumed run, whose first step is another one, would end with other bits.
    While it looks for unused parameters it leaves the buckets as they are. Lightning takes that
    setting where a strategy is made, before the number of ranks is known.
    """
    if isinstance(trainer.strategy, DDPStrategy) and trainer.world_size > 2:
        trainer.strategy._ddp_kwargs.setdefault("find_unused_parameters", True)


def follow_moved_run(state: dict[str, Any] | None, folder: str | Path, trainer: Trainer) -> None:
    """Let ModelCheckpoint find its files again where a run was moved or renamed.

    It keeps their absolute paths, and forgets the best score where its folder is another one.
    """

    def moved(path: str) -> str:
        return str(Path(folder, re.split(r"[\\/]", path)[-1])) if path else path

    # Where machines share no disk, rank 0's has the file, and all must keep the same.
    found = state is not None and Path(moved(state["best_model_path"])).is_file()
    if not trainer.strategy.broadcast(found):
        return  # there is no best one yet, or this is a new run
    state["dirpath"] = str(folder)
    for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
        state[name] = moved(state[name])
    state["best_k_models"] = {moved(path): score for path, score in state["best_k_models"].items()}


def restart_after_last_step(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Set Lightning's counters in a checkpoint to where the last optimizer step ended.

    It may stem from the middle of an accumulation, whose gradients it does not hold, from before
    or within a validation, or from the end of a run that now gets more steps. In every case
    training resumes with the micro-batch after the last step, in the one endless epoch; before it
    comes the validation of that step, where one is due and has not been done.

    These counters and what they mean are not documented; lightning/pytorch/loops/progress.py,
    fit_loop.py and training_epoch_loop.py of 2.6 are where they are read.
    """
    loops = checkpoint["loops"]["fit_loop"]
    step = checkpoint["global_step"]
    batches = step * trainer.accumulate_grad_batches
    interval = trainer.val_check_interval
    due = trainer.enable_validation and isinstance(interval, int) and batches % interval == 0
    pending = due and checkpoint["validated_step"] != step

    # The epoch has begun and is not done.
    loops["epoch_progress"].update(total=counts(1, done=0), current=counts(1, done=0))
    # The micro-batches read so far; the loader begins after them by itself.
    loops["epoch_loop.batch_progress"].update(
        total=counts(batches), current=counts(batches), is_last_batch=False
    )
    # One started and none done is how Lightning knows a validation that was interrupted.
    loops["epoch_loop.val_loop.batch_progress"].update(
        total=counts(1, done=0) if pending else counts(0), current=counts(0), is_last_batch=False
    )
    # The logger's step. Where a validation is due Lightning counts on after it, done or skipped.
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1 if due else step


def counts(started: int, done: int | None = None) -> dict[str, int]:
    done = started if done is None else done
    return dict(ready=started, started=started, processed=done, completed=done)
