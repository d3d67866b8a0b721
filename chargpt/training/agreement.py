"""Agreement of ranks on what each hears or measures by itself: a signal, the time."""

import time
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Timer

AGREEMENT_S = 0.5  # ranks ask each other about this often


class Agreement:
    """The largest of the ranks' values, exchanged twice a second: an all-reduce that seldom waits.

    Ranks must do the same at the same step. Asking after each batch would cost a few percent of a
    step, so they ask after a number of batches, the same on all, that takes about AGREEMENT_S.
    """

    def __init__(self) -> None:
        self.value = 0.0
        self.batches = self.asked_batches = self.ask_at = 0
        self.asked_at = time.monotonic()

    def largest(self, trainer: Trainer, value: float) -> float:
        """Of `value` on all ranks, when they last asked; to be called once a batch."""
        self.batches += 1
        if trainer.world_size == 1:
            return value
        return self.ask(trainer, value) if self.batches >= self.ask_at else self.value

    def ask(self, trainer: Trainer, value: float) -> float:
        """The largest value of all ranks now."""
        now = time.monotonic()
        batch_s = (now - self.asked_at) / max(1, self.batches - self.asked_batches)
        state = torch.tensor([value, batch_s], device=trainer.strategy.root_device)
        self.value, batch_s = trainer.strategy.reduce(state, reduce_op="max").tolist()
        self.asked_at, self.asked_batches = now, self.batches
        self.ask_at = self.batches + max(1, int(AGREEMENT_S / max(batch_s, 1e-3)))
        return self.value


class AgreedTimer(Timer):
    """Lightning's Timer, which stops a run of several ranks when their agreed time is up.

    Lightning's own asks all ranks after each batch.
    """

    @property
    def state_key(self) -> str:
        return Timer.__qualname__  # a checkpoint keeps the time under the same name

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        if trainer.world_size == 1 or module.time_share >= 1:
            super().on_train_batch_end(trainer)


def elapsed_share(trainer: Trainer) -> float:
    """Share of `trainer.max_time` that is over on this rank; 0 where there is none."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]
    return max(
        (share_of(timer) for timer in timers if timer.time_remaining() is not None), default=0.0
    )


def share_of(timer: Timer) -> float:
    elapsed = timer.time_elapsed()
    return elapsed / (elapsed + max(timer.time_remaining(), 0.0))
