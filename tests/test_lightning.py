"""What users of Lightning expect by flag: it works, or says why not."""

import csv
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.tuner import Tuner
from tiny import make_data, make_module, make_trainer

from chargpt.checkpoints import LOGS
from chargpt.cli.train import TrainingCLI
from chargpt.data.blocks import RandomBlocks

RUN = Path(LOGS, "version_0")


def fit(command, folder: Path, *flags: str):
    return command(
        folder, "fit", "--config=tiny.yaml", "--trainer.enable_progress_bar=false", *flags
    )


def read(folder: Path) -> dict:
    return torch.load(folder / RUN / "checkpoints" / "last.ckpt", weights_only=True)


# ---- limits: a number stays the type that is typed ----

LIMITS = [f"limit_{split}_batches" for split in ("train", "val", "test")]
LIMITS += ["overfit_batches", "val_check_interval"]


@pytest.mark.parametrize("typed", ["1", "1.0"])
@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_stays_the_type_that_is_typed(folder, monkeypatch, name, typed):
    monkeypatch.setattr(TrainingCLI, "instantiate_classes", lambda self: None)
    monkeypatch.chdir(folder)
    kind = int if typed == "1" else float
    (folder / "limit.yaml").write_text(f"trainer: {{{name}: {typed}}}\n")
    for args in ([f"--trainer.{name}={typed}"], [f"--trainer.{name}", typed], ["-c=limit.yaml"]):
        config = TrainingCLI("fit", ["--config=tiny.yaml", *args]).config.trainer
        assert (config[name], type(config[name])) == (1, kind)


def test_a_limit_of_one_is_one_batch(folder, trained, command, monkeypatch):
    seen = []
    step = "chargpt.training.module.GPTModule.{}_step"
    for split in ("validation", "test"):
        monkeypatch.setattr(step.format(split), lambda self, batch, i: seen.append(i))
    monkeypatch.setattr("chargpt.training.module.GPTModule.log_means", lambda self, split: None)
    for name, split in (("validate", "val"), ("test", "test")):
        for limit, batches in (("1", [0]), ("3", [0, 1, 2])):
            assert command(trained, name, f"--trainer.limit_{split}_batches={limit}").status == 0
            assert seen == batches
            seen.clear()
        assert command(trained, name, f"--trainer.limit_{split}_batches=1.0").status == 0
        assert len(seen) > 3
        seen.clear()


def test_a_limited_validation_is_kept_in_mind(folder, command):
    assert fit(command, folder, "--trainer.limit_val_batches=1").status == 0
    assert read(folder)["limit_val_batches"] == 1


def test_an_epoch_goes_on_where_the_one_before_it_stopped(folder, command, monkeypatch):
    read = RandomBlocks.__getitem__
    seen = []
    monkeypatch.setattr(
        RandomBlocks, "__getitem__", lambda self, k: (seen.append(k), read(self, k))[1]
    )
    flags = ["--trainer.limit_train_batches=3", "--trainer.max_epochs=2", "--trainer.max_steps=-1"]
    result = fit(command, folder, *flags, "--trainer.val_check_interval=null")
    assert result.status == 0, result.err
    assert sorted(set(seen)) == [0, 1, 2, 3, 4, 5]


# ---- loggers: a run lies in lightning_logs, whatever logs it ----

LOGGERS = {
    "none": ["--trainer.logger=false"],
    "CSV": ["--trainer.logger", "CSVLogger"],
    "CSV, in full": ["--trainer.logger=lightning.pytorch.loggers.CSVLogger"],
    "two": ["--trainer.logger+=TensorBoardLogger", "--trainer.logger+=CSVLogger"],
    "elsewhere": ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=elsewhere"],
}


@pytest.mark.parametrize("flags", LOGGERS.values(), ids=LOGGERS)
def test_a_run_is_found_whatever_logs_it(folder, command, flags):
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
    assert "version_0" not in config.read_text()  # it makes another run, not the same again
    again = command(folder, "fit", f"--config={config}", "--trainer.max_steps=1")
    assert again.status == 0, again.err
    assert (folder / LOGS / "version_1" / "checkpoints" / "last.ckpt").exists()


def losses(path: Path) -> list[str]:
    with open(path, newline="") as file:
        return [row["val_loss"] for row in csv.DictReader(file) if row.get("val_loss")]


def test_metrics_in_a_table_outlive_going_on(folder, command):
    assert fit(command, folder, "--trainer.logger=CSVLogger").status == 0
    before = losses(folder / RUN / "metrics.csv")
    assert len(before) == 2
    assert command(folder, "fit", "--ckpt_path=last", "--trainer.max_steps=12").status == 0
    (kept,) = (folder / RUN).glob("metrics-until-*.csv")
    assert losses(kept) == before
    assert len(losses(folder / RUN / "metrics.csv")) == 1


def test_a_logger_in_a_configuration_file(folder, command):
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": "."}}
    (folder / "csv.yaml").write_text(yaml.safe_dump({"trainer": {"logger": logger}}))
    assert fit(command, folder, "--config=csv.yaml").status == 0
    assert (folder / RUN / "metrics.csv").exists()


@pytest.mark.parametrize("name", ["WandbLogger", "MLFlowLogger"])
def test_a_logger_whose_package_is_missing_says_so(folder, command, monkeypatch, name):
    from lightning.pytorch.loggers import mlflow, wandb

    module, package = {"WandbLogger": (wandb, "wandb"), "MLFlowLogger": (mlflow, "mlflow")}[name]
    monkeypatch.setattr(module, f"_{package.upper()}_AVAILABLE", Missing(package))
    result = fit(command, folder, f"--trainer.logger={name}")
    assert (result.status, len(result.err.splitlines())) == (1, 1)
    assert f"{name}': {package} is missing" in result.err
    assert not (folder / LOGS).exists()


class Missing(str):
    def __new__(cls, package: str):
        return super().__new__(cls, f"{package} is missing")

    def __bool__(self) -> bool:
        return False


# ---- profiler, tuners, callbacks ----


@pytest.mark.parametrize("profiler", ["simple", "advanced"])
def test_a_profiler_prints_its_table(folder, command, caplog, monkeypatch, profiler):
    import logging

    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    result = fit(command, folder, f"--trainer.profiler={profiler}", "--trainer.max_steps=2")
    assert result.status == 0, result.err
    assert "run_training_batch" in caplog.text


@pytest.mark.parametrize(
    ("callback", "reason"),
    [
        ("LearningRateFinder", "the rate is a function of the step"),
        ("BatchSizeFinder", "which sequences a step reads follows from the batch size"),
    ],
)
def test_tuners_are_refused_with_a_reason(folder, command, callback, reason):
    result = fit(command, folder, f"--trainer.callbacks+={callback}")
    assert (result.status, reason in result.err) == (1, True)
    assert len([line for line in result.err.splitlines() if line]) == 2
    assert not (folder / LOGS).exists()


def test_the_tuner_is_refused_from_python_too(tmp_path):
    with pytest.raises(ValueError, match="learning rate finder"):
        Tuner(make_trainer(tmp_path)).lr_find(make_module(), datamodule=make_data(tmp_path))


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
    flags = ("--trainer.logger=CSVLogger", "--trainer.max_steps=16")
    result = fit(command, folder, f"--trainer.callbacks+={name}", *settings, *flags)
    assert result.status == 0, result.err
    checkpoint, metrics = read(folder), (folder / RUN / "metrics.csv").read_text()
    assert checkpoint["global_step"] == (8 if name == "EarlyStopping" else 16)
    assert ("current_model_state" in checkpoint) == (name == "EMAWeightAveraging")
    assert ("cpu_percent" in metrics) == (name == "DeviceStatsMonitor")
    assert ("samples_per_sec" in metrics) == (name == "ThroughputMonitor")
    assert command(folder, "predict", "--generate.max_new_chars=3").status == 0


def test_a_callback_whose_package_is_missing_says_so(folder, command, monkeypatch):
    from lightning.pytorch.accelerators import cpu

    monkeypatch.setattr(cpu, "_PSUTIL_AVAILABLE", False)
    monkeypatch.setattr("lightning.pytorch.callbacks.device_stats_monitor._PSUTIL_AVAILABLE", False)
    result = fit(command, folder, "--trainer.callbacks+=DeviceStatsMonitor")
    assert (result.status, "Traceback" in result.err, "psutil" in result.err) == (1, False, True)
    assert not (folder / LOGS).exists()
