"""Callbacks that show a run: a report of the run, its throughput, and the progress bar."""

import sys
import time
import warnings
from contextlib import suppress
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from chargpt.checkpoints import BEST
from chargpt.text_generator import TextGenerator
from chargpt.training.checkpointing import RunCheckpoint, sequences_per_step
from chargpt.training.module import GPTModule, callbacks_of, datamodule_of

LONG_RUN_S = 30 * 60  # on a CPU, a longer run gets a hint
TIMED_BATCHES = 3
SAMPLE_CHARS = 300


class StepProgressBar(TQDMProgressBar):
    """Progress bar of steps; it reads metrics, which waits for the device, only when drawn."""

    def init_train_tqdm(self) -> Any:
        bar = with_interval(super().init_train_tqdm())
        bar.total = self.trainer.max_steps if self.trainer.max_steps > 0 else None
        bar.n = bar.initial = self.trainer.global_step  # of the checkpoint, when a run is resumed
        bar.refresh()
        return bar

    def init_validation_tqdm(self) -> Any:
        return with_interval(super().init_validation_tqdm())

    def on_train_epoch_start(self, *args: Any) -> None:
        """Lightning would count the batches of this epoch."""

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        bar = self.train_progress_bar
        if bar.update(trainer.global_step - bar.n):  # tqdm has drawn it
            bar.set_postfix(self.get_metrics(trainer))

    def on_validation_batch_end(self, *args: Any) -> None:
        self.val_progress_bar.update()

    def on_exception(self, *args: Any) -> None:
        with suppress(TypeError):  # there is no bar yet
            self.train_progress_bar.close()  # a message that follows starts on a new line

    def get_metrics(self, trainer: Trainer, *args: Any) -> dict[str, Any]:
        return dict(trainer.progress_bar_metrics)  # without the version of the run


def with_interval(bar: Any) -> Any:
    bar.mininterval = 0.5 if sys.stderr.isatty() else 10.0  # a log file needs fewer lines
    return bar


class RunReport(Callback):
    """Prints what is trained on what, and the best score; logs a text sample per validation."""

    def __init__(self, run: RunCheckpoint | None) -> None:
        self.run = run

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        data, device = datamodule_of(trainer), trainer.strategy.root_device
        corpus, files = data.corpus, len(data.corpus.source.files)
        network = getattr(module, "gpt", module)  # without the second head
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        print(
            f"model    {sum(p.numel() for p in network.parameters()):,} parameters\n"
            f"corpus   {corpus.source.path}: {len(corpus.tokens):,} characters"
            f"{f' in {files:,} files' if files > 1 else ''}, {len(data.vocabulary)} distinct; "
            f"{len(data.train_tokens):,} for training, {len(data.val_tokens):,} for validation\n"
            f"batch    {sequences_per_step(trainer)} sequences of {data.hparams['block_size']} "
            f"characters ({data.hparams['batch_size']} per device x {trainer.world_size} "
            f"device{'s' * (trainer.world_size > 1)} x {trainer.accumulate_grad_batches} "
            f"accumulation step{'s' * (trainer.accumulate_grad_batches > 1)})\n"
            f"device   {name}, precision {trainer.precision}\n"
            f"run      {self.run.folder if self.run else 'not saved'}"
        )
        if trainer.global_step:
            print(f"resumed  after step {trainer.global_step}")
        if device.type == "cpu" and "bf16" in str(trainer.precision):
            warnings.warn("bf16 is slower than float32 on many CPUs", stacklevel=1)

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        boards = tensorboards(trainer)
        if trainer.state.fn == "fit" and not trainer.sanity_checking and boards:
            assert isinstance(module, GPTModule)
            generator = TextGenerator(module.gpt, module.vocabulary)
            text = generator.complete(max_new_chars=SAMPLE_CHARS, seed=module.config.seed)
            indented = "\n".join("    " + line for line in text.splitlines())  # Markdown: verbatim
            for board in boards:
                board.experiment.add_text("sample", indented, trainer.global_step)

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        for stopping in trainer.early_stopping_callbacks:
            if stopping.stopping_reason_message:
                print(f"\nEarlyStopping stopped the run: {stopping.stopping_reason_message}")
        if self.run and self.run.best:
            print(f"\nbest validation loss {self.run.best.loss:.4f}: {self.run.path(BEST)}")
            for board in tensorboards(trainer):
                hparams = {**datamodule_of(trainer).hparams, **module.hparams}
                scores = {"best_val_loss": self.run.best.loss}
                board.log_hyperparams(hparams, scores, step=trainer.global_step)


def tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


class Throughput(Callback):
    """Logs `chars_per_second` over all devices, and announces a long run on a CPU.

    The first batch (which warms up, or compiles) and those after a validation are not timed.
    """

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.ended_at: float | None = None
        self.batches, self.seconds, self.hinted = 0, 0.0, False

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.ended_at = None

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: torch.Tensor, *_: Any
    ) -> None:
        now = time.perf_counter()
        if self.ended_at is not None:
            self.batches += 1
            self.seconds += now - self.ended_at
        self.ended_at = now
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        logs = self.batches > 0 and every > 0 and trainer.global_step % every == 0
        if not self.hinted and (logs or self.batches == TIMED_BATCHES):
            self.hinted = True
            warn_if_long(trainer, self.seconds / self.batches)
        if logs:
            characters = self.batches * batch.size(0) * (batch.size(1) - 1) * trainer.world_size
            module.log("chars_per_second", characters / self.seconds, prog_bar=True)
            self.batches, self.seconds = 0, 0.0


@rank_zero_only
def warn_if_long(trainer: Trainer, seconds_per_batch: float) -> None:
    seconds = seconds_per_batch * trainer.accumulate_grad_batches
    left = seconds * (trainer.max_steps - trainer.global_step)
    timed = callbacks_of(trainer, Timer)
    if trainer.strategy.root_device.type == "cpu" and not timed and left > LONG_RUN_S:
        print(
            f"\nthis run will take about {left / 3600:.1f} hours on this CPU "
            f"({seconds:.1f} s per step)\n--config cpu is made for CPUs and takes minutes"
        )
