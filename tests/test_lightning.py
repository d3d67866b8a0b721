"""Lightning's features by flag: limits, loggers, profilers, callbacks."""

from pathlib import Path

import pytest
import torch

from chargpt.checkpoints import LOGS
from chargpt.cli.train import TrainingCLI
from chargpt.data.datasets import RandomSequences

RUN = Path(LOGS, "version_0")


def fit(command, folder: Path, *flags: str):
    return command(
        folder, "fit", "--config=tiny.yaml", "--trainer.enable_progress_bar=false", *flags
    )


def read(folder: Path) -> dict:
    return torch.load(folder / RUN / "checkpoints" / "last.ckpt", weights_only=True)


# ---- limits: 1 is one batch, 1.0 is all of them ----

LIMITS = [f"limit_{split}_batches" for split in ("train", "val", "test")]
LIMITS += ["overfit_batches", "val_check_interval"]


@pytest.mark.parametrize("value", ["1", "1.0"])
def test_a_limit_keeps_its_type(folder, monkeypatch, value):
    monkeypatch.setattr(TrainingCLI, "instantiate_classes", lambda self: None)
    monkeypatch.chdir(folder)
    kind = int if value == "1" else float
    lines = ", ".join(f"{name}: {value}" for name in LIMITS)
    (folder / "limit.yaml").write_text(f"trainer: {{{lines}}}\n")
    joined = [f"--trainer.{name}={value}" for name in LIMITS]
    apart = [part for name in LIMITS for part in (f"--trainer.{name}", value)]
    for args in (joined, apart, ["-c=limit.yaml"]):
        config = TrainingCLI("fit", ["--config=tiny.yaml", *args]).config.trainer
        for name in LIMITS:
            assert (config[name], type(config[name])) == (1, kind), name


def test_a_limit_of_one_is_one_batch(folder, trained, command, monkeypatch):
    seen = []
    step = "chargpt.training.module.GPTModule.{}_step"
    for split in ("validation", "test"):
        monkeypatch.setattr(step.format(split), lambda self, batch, i: seen.append(i))
    for hook in ("on_validation_epoch_end", "on_test_epoch_end"):
        monkeypatch.setattr(f"chargpt.training.module.GPTModule.{hook}", lambda self: None)
    monkeypatch.setattr("chargpt.cli.train.TrainingCLI.print_score", lambda self: None)
    for name, split in (("validate", "val"), ("test", "test")):
        for limit, batches in (("1", [0]), ("3", [0, 1, 2])):
            assert command(trained, name, f"--trainer.limit_{split}_batches={limit}").status == 0
            assert seen == batches
            seen.clear()
        assert command(trained, name, f"--trainer.limit_{split}_batches=1.0").status == 0
        assert len(seen) > 3
        seen.clear()


def test_a_limited_validation_is_recorded_in_the_checkpoint(folder, command):
    assert fit(command, folder, "--trainer.limit_val_batches=1").status == 0
    assert read(folder)["chargpt"]["trainer"]["limit_val_batches"] == 1


def test_an_epoch_continues_where_the_previous_one_ended(folder, command, monkeypatch):
    read = RandomSequences.__getitem__
    seen = []
    monkeypatch.setattr(
        RandomSequences, "__getitem__", lambda self, k: (seen.append(k), read(self, k))[1]
    )
    flags = ["--trainer.limit_train_batches=3", "--trainer.max_epochs=2", "--trainer.max_steps=-1"]
    result = fit(command, folder, *flags)
    assert result.status == 0, result.err
    assert sorted(set(seen)) == [0, 1, 2, 3, 4, 5]


# ---- loggers: every run is saved in lightning_logs ----

LOGGERS = {
    "none": ["--trainer.logger=false"],
    "CSV": ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=elsewhere"],
}


@pytest.mark.parametrize("flags", LOGGERS.values(), ids=LOGGERS)
def test_a_run_is_found_with_any_logger(folder, command, flags):
    result = fit(command, folder, *flags)
    assert result.status == 0, result.err
    assert {path.name for path in (folder / RUN).iterdir()} >= {"checkpoints", "config.yaml"}
    assert {path.name for path in folder.iterdir()} - {"elsewhere"} == {
        "text.txt",
        "tiny.yaml",
        LOGS,
    }
    assert command(folder, "predict", "--generate.max_new_chars=3").status == 0
    assert command(folder, "validate").status == 0
    result = command(folder, "fit", "--ckpt_path=last", "--trainer.max_steps=12")
    assert result.status == 0, result.err
    assert [path.name for path in (folder / LOGS).iterdir()] == ["version_0"]
    assert read(folder)["global_step"] == 12
    config = folder / RUN / "config.yaml"
    assert "version_0" not in config.read_text()  # the second `fit` starts another run
    again = command(folder, "fit", f"--config={config}", "--trainer.max_steps=1")
    assert again.status == 0, again.err
    assert (folder / LOGS / "version_1" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("name", ["WandbLogger", "MLFlowLogger"])
def test_a_logger_without_its_package_is_refused(folder, command, monkeypatch, name):
    from lightning.pytorch.loggers import mlflow, wandb

    module, package = {"WandbLogger": (wandb, "wandb"), "MLFlowLogger": (mlflow, "mlflow")}[name]
    monkeypatch.setattr(module, f"_{package.upper()}_AVAILABLE", Missing(package))
    result = fit(command, folder, f"--trainer.logger={name}")
    assert result.status == 1
    assert result.err == f"error: {package} is missing\n"
    assert not (folder / LOGS).exists()


class Missing(str):
    def __new__(cls, package: str):
        return super().__new__(cls, f"{package} is missing")

    def __bool__(self) -> bool:
        return False


# ---- profilers and callbacks ----


@pytest.mark.parametrize("profiler", ["simple", "advanced"])
def test_a_profiler_prints_its_table(folder, command, caplog, monkeypatch, profiler):
    import logging

    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    result = fit(command, folder, f"--trainer.profiler={profiler}", "--trainer.max_steps=2")
    assert result.status == 0, result.err
    assert "run_training_batch" in caplog.text


CALLBACKS = {
    "EarlyStopping": ["monitor=val_loss", "patience=1", "min_delta=9.0"],
    "EMAWeightAveraging": ["decay=0.9"],
    "DeviceStatsMonitor": [],
    "ThroughputMonitor": ["batch_size_fn=torch.Tensor.__len__", "window_size=2"],
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks_by_flag(folder, command, name):
    if name == "DeviceStatsMonitor":
        pytest.importorskip("psutil", reason="psutil is not installed")
    settings = [f"--trainer.callbacks.{setting}" for setting in CALLBACKS[name]]
    flags = (
        "--trainer.logger=CSVLogger",
        "--trainer.logger.save_dir=csv",
        "--trainer.max_steps=16",
    )
    result = fit(command, folder, f"--trainer.callbacks+={name}", *settings, *flags)
    assert result.status == 0, result.err
    checkpoint, metrics = read(folder), next(folder.rglob("metrics.csv")).read_text()
    assert checkpoint["global_step"] == (8 if name == "EarlyStopping" else 16)
    assert ("current_model_state" in checkpoint) == (name == "EMAWeightAveraging")
    assert ("cpu_percent" in metrics) == (name == "DeviceStatsMonitor")
    assert ("samples_per_sec" in metrics) == (name == "ThroughputMonitor")
    assert command(folder, "predict", "--generate.max_new_chars=3").status == 0


def test_a_callback_without_its_package_is_refused(folder, command, monkeypatch):
    from lightning.pytorch.accelerators import cpu

    monkeypatch.setattr(cpu, "_PSUTIL_AVAILABLE", False)
    monkeypatch.setattr("lightning.pytorch.callbacks.device_stats_monitor._PSUTIL_AVAILABLE", False)
    result = fit(command, folder, "--trainer.callbacks+=DeviceStatsMonitor")
    assert (result.status, "Traceback" in result.err, "psutil" in result.err) == (1, False, True)
    assert not (folder / LOGS).exists()
