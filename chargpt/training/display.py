"""Callbacks that show a run: a summary, a line per validation, throughput, a progress bar."""

import math
import shlex
import sys
import time
from contextlib import suppress
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from tqdm import tqdm

from chargpt.checkpoints import BEST
from chargpt.text_generator import TextGenerator
from chargpt.training.checkpointing import RunCheckpoint, sequences_per_step, validation_of
from chargpt.training.module import datamodule_of

write = rank_zero_only(tqdm.write)  # above a progress bar, if there is one
REDRAW_S = 0.5
SAMPLE_CHARS = 300


class StepProgressBar(TQDMProgressBar):
    """Progress bar of the run, with the step and the time left, in terminals and notebooks only.

    It reads metrics, which synchronizes with the device, only when it is drawn.
    """

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        super().setup(trainer, module, stage)
        if not sys.stdout.isatty() and not hasattr(sys, "ps1"):  # notebooks have a prompt
            self.disable()

    def init_train_tqdm(self) -> Any:
        self.drawn_at: float | None = None
        bar = super().init_train_tqdm()
        bar.bar_format = "{percentage:3.0f}%|{bar}| {desc}, {remaining} left{postfix}"
        bar.leave = False
        bar.set_description_str(step_of(self.trainer), refresh=False)
        bar.reset(total=1.0)  # the whole run, in steps or in time, whichever limits it
        return bar

    def on_train_epoch_start(self, *args: Any) -> None:
        """Do nothing: Lightning would reset the bar to count the batches of this epoch."""

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        bar, now = self.train_progress_bar, time.perf_counter()
        if self.drawn_at is None:
            bar.initial = module.progress  # above 0 when a run is resumed
        if self.drawn_at is None or now - self.drawn_at > REDRAW_S:
            bar.n, self.drawn_at = module.progress, now
            bar.set_description_str(step_of(trainer), refresh=False)
            bar.set_postfix(self.get_metrics(trainer))

    def on_exception(self, *args: Any) -> None:
        with suppress(TypeError):  # there is no bar yet
            self.train_progress_bar.close()  # or an error message would start on its line

    def get_metrics(self, trainer: Trainer, *args: Any) -> dict[str, Any]:
        return dict(trainer.progress_bar_metrics)  # without Lightning's v_num


class RunReport(Callback):
    """Prints a summary of the run and a line per validation; logs text samples."""

    def __init__(self, run: RunCheckpoint | None, show_samples: bool = False) -> None:
        self.run, self.show_samples = run, show_samples

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self.started_at = time.perf_counter()
        data, precision, device = datamodule_of(trainer), str(trainer.precision), module.device
        on_cpu, bf16 = device.type == "cpu", "bf16" in precision
        amx = on_cpu and torch.cpu.get_capabilities().get("amx_bf16", False)
        hint = " (--trainer.precision bf16-mixed may be faster)" if amx and not bf16 else ""
        if on_cpu and bf16 and not amx:
            rank_zero_warn("bf16 is slower than float32 on most CPUs without AMX")
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        source, files = data.corpus.source, len(data.corpus.source.files)
        split = f"{len(data.train_tokens):,} for training, {len(data.val_tokens):,} for validation"
        length = data.hparams["block_size"]
        write(
            f"model    {sum(p.numel() for p in module.gpt.parameters()):,} parameters\n"
            f"corpus   {source.path}{f' ({files:,} files)' if files > 1 else ''}\n"
            f"         {len(data.corpus.tokens):,} characters, {len(data.vocabulary)} distinct\n"
            f"         {split}\n"
            f"batch    {sequences_per_step(trainer)} sequences of {length} characters\n"
            f"device   {name}, precision {precision}{hint}\n"
            f"run      {self.run.folder if self.run else 'not saved'}"
        )
        if trainer.global_step:
            write(f"resumed  after step {trainer.global_step}")

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        batches = trainer.fit_loop.total_batch_idx + 1
        first = trainer.global_step == 1 and batches == trainer.accumulate_grad_batches
        if first and "train_loss" in trainer.callback_metrics:
            loss, V = trainer.callback_metrics["train_loss"].item(), len(module.vocabulary)
            guess = f"random guessing: ln {V} = {math.log(V):.3f}"
            write(f"{step_of(trainer)}  train_loss {loss:.3f}  ({guess})")
            every = trainer.log_every_n_steps  # type: ignore[attr-defined]
            for logger in trainer.loggers if every > 1 else ():
                logger.log_metrics({"train_loss": loss}, 0)  # before Lightning's first log

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        new, metrics = validation_of(trainer, module), trainer.callback_metrics
        best = "*" if self.run and new.is_better_than(self.run.best) else " "
        bits = new.loss / math.log(2)
        line = f"{step_of(trainer)}  val_loss {new.loss:.3f}{best} ({bits:.2f} bits)"
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if "train_loss" in metrics and trainer.global_step >= every:  # not that of the first step
            line += f"  train {metrics['train_loss']:.2f}"
        if "chars_per_second" in metrics:
            line += f"  {tqdm.format_sizeof(metrics['chars_per_second'].item())} chars/s"
        elapsed = tqdm.format_interval(time.perf_counter() - self.started_at)
        write(f"{line}  {elapsed.removeprefix('0')}")
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if boards or self.show_samples:
            gpt = copy(module.gpt)
            gpt.config = replace(gpt.config, block_size=module.context)  # what it has seen
            generator = TextGenerator(gpt, module.vocabulary)
            text = generator.complete(max_new_chars=SAMPLE_CHARS, seed=module.config.seed)
            indented = "\n".join("    " + line for line in text.splitlines())  # Markdown: verbatim
            for board in boards:
                board.experiment.add_text("sample", indented, trainer.global_step)
            if self.show_samples and sys.stdout.isatty():
                write(indented)

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        for stopping in trainer.early_stopping_callbacks:
            if stopping.stopping_reason_message:
                write(f"EarlyStopping stopped the run: {stopping.stopping_reason_message}")
        if self.run and (best := self.run.best):
            write(f"best validation loss {best.loss:.4f} (marked *), after step {best.step}")
            if more := trainer.global_step - best.step:
                why = "if val_loss rose while train_loss fell, the network is overfitting"
                write(f"steps since then: {more}; {why}")
            path = shlex.quote(str(self.run.path(BEST)))
            write(f"generate from it: python -m chargpt predict --ckpt_path {path}")


def step_of(trainer: Trainer) -> str:
    total = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
    return f"step {trainer.global_step}{total}"


class Throughput(Callback):
    """Logs `chars_per_second` across all devices.

    The first batch (which warms up, or compiles) and the first after a validation are not timed.
    """

    def restart(self, *_: Any, **__: Any) -> None:
        self.started_at: float | None = None

    on_train_start = on_validation_start = restart

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: torch.Tensor, *_: Any
    ) -> None:
        now, every = time.perf_counter(), trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.started_at is None:
            self.started_at, self.batches = now, 0
            return
        self.batches += 1
        if every > 0 and trainer.global_step % every == 0:
            characters = self.batches * batch.size(0) * (batch.size(1) - 1) * trainer.world_size
            module.log("chars_per_second", characters / (now - self.started_at))
            self.started_at, self.batches = now, 0
