"""What a run shows: lines in a log file, the same lines above a progress bar in a terminal."""

import contextlib
import io
import itertools
import math
import re
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback
from lightning.pytorch.loggers import CSVLogger
from tiny import last, make_data, make_module, make_trainer

from chargpt.text_generator import TextGenerator, load
from chargpt.training import GPTModule, display


class Terminal(io.StringIO):
    """A stream that says that it is a terminal, or a file."""

    def __init__(self, isatty: bool) -> None:
        super().__init__()
        self.terminal = isatty

    def isatty(self) -> bool:
        return self.terminal


def shown(folder, *callbacks, terminal=False, module=None, ckpt_path=None, **settings) -> str:
    """What a run prints."""
    folder.mkdir(exist_ok=True)
    trainer = make_trainer(folder, *callbacks, **dict(enable_progress_bar=True) | settings)
    module, data = module or make_module(), make_data(folder)
    with contextlib.redirect_stdout(Terminal(terminal)) as out:
        trainer.fit(module, data, ckpt_path=ckpt_path)
    return out.getvalue()


class Losses(GPTModule):
    """Its validation losses are given."""

    losses: list[float]

    def on_validation_epoch_end(self) -> None:
        self.log("val_loss", torch.tensor(self.losses.pop(0), dtype=torch.float64))


def with_losses(*losses: float, **settings) -> Losses:
    module = Losses(**make_module(**settings).hparams)
    module.losses = list(losses)
    return module


# ---- lines ----


def test_each_validation_is_a_line_with_its_scores_and_the_best_is_marked(tmp_path):
    out = shown(tmp_path, module=with_losses(2.0, 1.5, 1.75))
    lines = [line for line in out.splitlines() if "  val_loss" in line]
    pattern = r"step (\d+)/12  val_loss (\S+?)([* ]) \((\S+) bits\)  train \S+  \S+ chars/s  0:\d\d"
    found = [re.fullmatch(pattern, line).groups() for line in lines]
    assert found == [
        ("4", "2.000", "*", f"{2.0 / math.log(2):.2f}"),
        ("8", "1.500", "*", f"{1.5 / math.log(2):.2f}"),
        ("12", "1.750", " ", f"{1.75 / math.log(2):.2f}"),
    ]


def test_a_run_ends_with_its_best_loss_and_the_command_that_generates_from_it(tmp_path):
    folder = tmp_path / "a run"
    end = shown(folder, module=with_losses(2.0, 1.5, 1.75)).splitlines()[-3:]
    assert end[0] == "best validation loss 1.5000 (marked *), after step 8"
    assert end[1].startswith("steps since then: 4;")
    path = folder / "checkpoints" / "best.ckpt"
    assert end[2] == f"generate from it: python -m chargpt predict --ckpt_path '{path}'"
    improving = shown(tmp_path / "improving", module=with_losses(2.0, 1.5, 1.25))
    assert "since then" not in improving


class First(Callback):
    """The losses of the micro-batches of the first step."""

    def __init__(self) -> None:
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, *_) -> None:
        self.losses.append(outputs["loss"].item())


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_first_step_is_shown_beside_random_guessing_and_logged(tmp_path, accumulate):
    first, logger = First(), CSVLogger(tmp_path, name="", version="csv")
    settings = dict(log_every_n_steps=4, logger=logger, accumulate_grad_batches=accumulate)
    out = shown(tmp_path, first, **settings)
    (line,) = [line for line in out.splitlines() if "guessing" in line]
    loss = first.losses[accumulate - 1] * accumulate  # Lightning divides it
    guess = f"ln 10 = {math.log(10):.3f}"
    assert line == f"step 1/12  train_loss {loss:.3f}  (random guessing: {guess})"
    assert f"{loss:.5f}"[:-1] in (tmp_path / "csv" / "metrics.csv").read_text()
    again = shown(tmp_path, ckpt_path=last(tmp_path), max_steps=16, **settings)
    assert "guessing" not in again and "resumed  after step 12" in again


def test_a_log_file_has_lines_and_nothing_else(tmp_path):
    """Seven validations; `fit --config cpu` has five."""
    out = shown(tmp_path, max_steps=28)
    lines = out.splitlines()
    assert len(lines) <= 25
    assert sum("val_loss" in line for line in lines) == 7
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out)  # escapes, carriage returns
    assert not [line for line in lines if not line or "%|" in line]


# ---- the progress bar ----


def test_the_bar_of_a_resumed_run_has_its_step_its_limit_and_the_time_left(tmp_path, monkeypatch):
    shown(tmp_path, max_steps=8)
    monkeypatch.setattr(display, "REDRAW_S", -1.0)
    out = shown(tmp_path, terminal=True, ckpt_path=last(tmp_path), max_steps=16)
    bars = re.findall(r"(\d+)%\|[^|]*\| step (\d+)/16, (\S+) left, train_loss=\d", out)
    assert bars[0] == ("50", "9", "?")
    assert bars[-1][1] == "16" and re.fullmatch(r"\d\d:\d\d", bars[-1][2])
    assert "v_num" not in out


def test_the_bar_of_a_run_with_a_time_limit_follows_the_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(display, "REDRAW_S", -1.0)
    now = [100.0]

    class Clock(Callback):  # a second for each step
        def on_train_batch_end(self, *_) -> None:
            now[0] += 1.0

    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time.monotonic", lambda: now[0])
    limits = dict(max_steps=-1, max_time=dict(seconds=8))
    out = shown(tmp_path, Clock(), terminal=True, **limits)
    bars = re.findall(r"(\d+)%\|[^|]*\| step (\d+), ", out)
    assert {(round(100 * k / 8), k + 1) for k in range(8)} <= {(int(p), int(s)) for p, s in bars}


def test_metrics_are_read_only_when_the_bar_is_drawn(tmp_path, monkeypatch):
    """Reading them waits for the device."""
    reads = []
    read = display.StepProgressBar.get_metrics
    monkeypatch.setattr(
        display.StepProgressBar, "get_metrics", lambda *a: (reads.append(1), read(*a))[1]
    )
    now = itertools.count(100, 1e-6)
    monkeypatch.setattr(display, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    shown(tmp_path, terminal=True, limit_val_batches=0)
    assert len(reads) == 2  # at the first step, and by Lightning at the end


# ---- samples ----


def test_samples_are_shown_in_a_terminal_if_asked_for(tmp_path):
    settings = dict(max_steps=4, show_samples=True)
    out = shown(tmp_path, terminal=True, **settings)
    sample = load(last(tmp_path)).complete(max_new_chars=display.SAMPLE_CHARS, seed=1)
    assert "\n".join(f"    {line}" for line in sample.splitlines()) in out
    assert "    " + sample.splitlines()[-1] not in shown(tmp_path / "file", **settings)


def test_a_sample_looks_at_no_more_than_the_context_in_use(tmp_path, monkeypatch):
    """As the checkpoint does; see test_module.py for that."""
    monkeypatch.setattr(display, "SAMPLE_CHARS", 300)
    module = make_module(short_contexts={2: 1.0}, position="rotary")
    out = shown(tmp_path, terminal=True, max_steps=4, show_samples=True, module=module)

    def indented(generator: TextGenerator) -> str:
        text = generator.complete(max_new_chars=300, seed=1)
        return "\n".join(f"    {line}" for line in text.splitlines())

    assert indented(load(last(tmp_path))) in out
    assert indented(TextGenerator(module.gpt, module.vocabulary)) not in out  # of 8 characters


# ---- bfloat16 on a CPU ----


@pytest.mark.parametrize("multiplies_bf16", [True, False])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_bf16_is_offered_where_the_cpu_multiplies_it_and_warned_about_elsewhere(
    tmp_path, monkeypatch, recwarn, precision, multiplies_bf16
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict(amx_bf16=multiplies_bf16))
    out = shown(tmp_path, max_steps=1, precision=precision, limit_val_batches=0)
    warned = any("bf16 is slower" in str(warning.message) for warning in recwarn)
    assert ("bf16-mixed may be faster" in out) == (multiplies_bf16 and precision == "32-true")
    assert warned == (not multiplies_bf16 and precision == "bf16-mixed")
