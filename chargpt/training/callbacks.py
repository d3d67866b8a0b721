"""Callbacks that show a run: a summary, a progress bar, the throughput, text samples, the score."""

import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from chargpt.text_generator import TextGenerator

LONG_RUN_S = 30 * 60  # a run without a GPU that takes longer is worth a word
TIMED_STEPS = 3
SAMPLE_CHARS = 300


class ProgressBar(TQDMProgressBar):
    """Progress bar of steps; reads the metrics, which waits for the device, only now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.pause_s = 0.5 if sys.stderr.isatty() else 10.0  # a log file needs fewer lines
        self.shown = {"training": 0.0, "validation": 0.0}

    @property
    def total_train_batches(self) -> int | float:
        steps = self.trainer.max_steps
        return steps * self.trainer.accumulate_grad_batches if steps > 0 else float("inf")

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description("training")

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self.is_due("training") or trainer.global_step == trainer.max_steps:
            super().on_train_batch_end(trainer, *args)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.shown["validation"] = time.monotonic()
        super().on_validation_start(trainer, module)

    def on_validation_batch_end(self, *args: Any) -> None:
        if self.is_due("validation"):
            super().on_validation_batch_end(*args)

    def on_exception(
        self, trainer: Trainer, module: LightningModule, exception: BaseException
    ) -> None:
        with suppress(TypeError):  # there is none yet
            self.train_progress_bar.close()  # what is said next begins on a line of its own

    def is_due(self, bar: str) -> bool:
        now = time.monotonic()
        if due := now - self.shown[bar] >= self.pause_s:
            self.shown[bar] = now
        return due

    def get_metrics(self, *args: Any) -> dict[str, Any]:
        metrics = super().get_metrics(*args)
        metrics.pop("v_num", None)
        return metrics


class Summary(Callback):
    """Says at the start what is trained on what, and where it is kept.

    Args:
        folder: of the run, if it leaves one.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        data, device = trainer.datamodule, trainer.strategy.root_device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        sequences = data.hparams.batch_size * trainer.world_size * trainer.accumulate_grad_batches
        parameters = sum(p.numel() for p in module.parameters())
        print(
            f"model    {parameters:,} parameters\n"
            f"corpus   {data.corpus.path}: {len(data.corpus.tokens):,} characters, "
            f"{len(data.vocabulary)} different; {len(data.train_tokens):,} to train, "
            f"{len(data.val_tokens):,} to validate\n"
            f"step     {sequences} sequences of {data.hparams.block_size} characters "
            f"({data.hparams.batch_size} per device x {trainer.world_size} devices"
            f" x {trainer.accumulate_grad_batches} accumulated)\n"
            f"device   {name}, precision {trainer.precision}\n"
            f"run      {self.folder or 'leaves nothing behind'}"
        )
        if sequences > data.hparams.batch_size:
            print(
                f"         with another number of devices, keep this product of {sequences}: the "
                "learning rate was chosen for it"
            )
        if trainer.global_step:
            print(f"resumes  after step {trainer.global_step}")
        if (
            device.type == "cpu"
            and "bf16" in str(trainer.precision)
            and (slower := slowdown_of_bf16()) > 2
        ):
            warnings.warn(
                f"bf16 will crawl: this processor multiplies matrices {slower:.0f} times slower "
                "in bf16 than in float32; leave out --trainer.precision (and configs/gpu.yaml)",
                stacklevel=1,
            )


def slowdown_of_bf16() -> float:
    """How much longer a matrix product takes than in float32: no flag of the processor says it."""

    def seconds(dtype: torch.dtype) -> float:
        a = torch.randn(256, 256).to(dtype)
        a @ a
        start = time.perf_counter()
        a @ a
        return time.perf_counter() - start

    return seconds(torch.bfloat16) / seconds(torch.float32)


class Throughput(Callback):
    """Logs `chars_per_second` over all devices, validation and checkpoints left out.

    Where no GPU is at hand and the run would take long, it says so after a few timed steps.
    """

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.first_batch: int | None = None
        self.warm = 0.0  # when the first step was over
        self.batches = 0
        self.start = self.paused = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.start += time.perf_counter() - self.paused

    def on_train_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        outputs: Any,
        batch: torch.Tensor,
        batch_idx: int,
    ) -> None:
        self.batches += 1
        if self.first_batch is None:  # the first step warms up, or compiles
            self.first_batch, self.batches = batch_idx, 0
            self.start = self.warm = time.perf_counter()
        elif batch_idx == self.first_batch + TIMED_STEPS:
            self.warn_if_long(trainer)
        every = trainer.log_every_n_steps
        if every and trainer.global_step % every == 0 and self.batches:
            now = time.perf_counter()
            characters = self.batches * batch.size(0) * (batch.size(1) - 1) * trainer.world_size
            module.log("chars_per_second", characters / (now - self.start), prog_bar=True)
            self.start, self.batches = now, 0

    @rank_zero_only
    def warn_if_long(self, trainer: Trainer) -> None:
        seconds = (time.perf_counter() - self.warm) / TIMED_STEPS * trainer.accumulate_grad_batches
        left = seconds * (trainer.max_steps - trainer.global_step)
        limited = any(
            isinstance(c, Timer) and c.time_remaining() is not None for c in trainer.callbacks
        )
        if trainer.strategy.root_device.type == "cpu" and not limited and left > LONG_RUN_S:
            print(
                f"\nthis run will take about {left / 3600:.1f} hours on this machine, "
                f"which has no GPU in use ({seconds:.1f} s a step)\n"
                "--config cpu is made for a processor and takes minutes"
            )


class TextSamples(Callback):
    """Writes on from the same beginning at each validation, for TensorBoard's text page."""

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if trainer.state.fn != "fit" or trainer.sanity_checking or not boards:
            return
        generator = TextGenerator(module.gpt, module.vocabulary)  # type: ignore[arg-type]
        text = generator.complete(max_new_chars=SAMPLE_CHARS, seed=module.hparams.seed)
        indented = "\n".join("    " + line for line in text.splitlines())  # Markdown: as it is
        for board in boards:
            board.experiment.add_text("sample", indented, trainer.global_step)


class FinalScore(Callback):
    """Says at the end what came of the run, and puts it beside the hyperparameters in TensorBoard.

    Args:
        best: the callback that keeps the best checkpoint.
    """

    def __init__(self, best: ModelCheckpoint) -> None:
        self.best = best

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        score = self.best.best_model_score
        if score is None:
            return
        print(f"\nbest validation loss {score:.4f}: {self.best.best_model_path}")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                hparams = {**trainer.datamodule.hparams, **module.hparams}
                logger.log_hyperparams(
                    hparams, {"best_val_loss": score.item()}, step=trainer.global_step
                )
