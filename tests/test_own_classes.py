"""Users' own classes: callbacks, loggers, strategies, checkpoints and optimizers."""

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import lightning
import pytest
import torch
from conftest import assert_error
from lightning import Callback

import chargpt

RUN = Path("lightning_logs", "version_0")
LAST = RUN / "checkpoints" / "last.ckpt"
BEST = RUN / "checkpoints" / "best.ckpt"

OWN = '''
"""Classes of a user, in the current folder."""

from pathlib import Path

from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import SingleDeviceStrategy


class Counter(Callback):
    """Counts steps, those before a restart included."""

    def __init__(self, path: str = "count.txt", first: int = 0) -> None:
        self.path, self.count = path, first

    def on_train_batch_end(self, *_) -> None:
        self.count += 1
        Path(self.path).write_text(str(self.count))

    def state_dict(self) -> dict:
        return {"count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.count = state["count"]


class Broken(Callback):
    def on_train_batch_end(self, *_) -> None:
        raise ValueError("a bug in user code")


class Checkpoints(ModelCheckpoint):
    def __init__(self, folder: str) -> None:
        super().__init__(dirpath=folder, every_n_train_steps=3, save_top_k=-1, filename="own-{step}")


class Lines(Logger):
    def __init__(self, path: str = "used.txt") -> None:
        super().__init__()
        self.path = Path(path)

    name, version = "lines", "0"

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        pass

    def log_metrics(self, metrics, step=None) -> None:
        with self.path.open("a") as file:
            file.write(f"{step} {sorted(metrics)}\\n")


class Device(SingleDeviceStrategy):
    def __init__(self, path: str = "used.txt") -> None:
        super().__init__(device="cpu")
        self.path = path

    def setup(self, trainer) -> None:
        Path(self.path).write_text("set up")
        super().setup(trainer)


class Actions(Profiler):
    def __init__(self, path: str = "used.txt") -> None:
        super().__init__()
        self.path = path

    def start(self, action_name: str) -> None:
        Path(self.path).write_text(action_name)

    def stop(self, action_name: str) -> None:
        pass
'''


@pytest.fixture(autouse=True)
def own(folder, monkeypatch) -> None:
    """A module of the user in the current folder, which is not on the import path."""
    (folder / "own.py").write_text(OWN)
    (folder / "own.yaml").write_text("trainer: {callbacks: [{class_path: own.Counter}]}")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ".")])
    monkeypatch.delitem(sys.modules, "own", raising=False)
    yield
    sys.modules.pop("own", None)


@pytest.fixture
def fit(folder, command):
    """Train in `folder` with the tiny configuration."""
    return lambda *flags: command(folder, "fit", "--config=tiny.yaml", *flags)


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def step(folder: Path) -> int:
    return read(folder / LAST)["global_step"]


# ---- classes that a file or a flag names (test_cli.py has one under `python -m`) ----


def test_a_callback_of_the_current_folder_works_and_so_does_resuming_with_it(folder, fit):
    result = fit("--config=own.yaml")
    assert result.status == 0, result.err
    assert (folder / "count.txt").read_text() == "8"
    result = fit("--config=own.yaml", "--ckpt_path=last", "--trainer.max_steps=12")
    assert result.status == 0, result.err
    assert (folder / "count.txt").read_text() == "12"


def test_a_callback_and_its_settings_by_flag(folder, fit):
    flags = ("--trainer.callbacks.path=other.txt", "--trainer.callbacks.first=100")
    result = fit("--trainer.max_steps=2", "--trainer.callbacks+=own.Counter", *flags)
    assert result.status == 0, result.err
    assert (folder / "other.txt").read_text() == "102"


@pytest.mark.parametrize("place", ["file", "flags"])
def test_loggers_strategies_and_profilers_of_the_current_folder_work(folder, fit, place):
    flags, lines = [], []
    for setting, name in (("logger", "Lines"), ("strategy", "Device"), ("profiler", "Actions")):
        flags += [f"--trainer.{setting}=own.{name}", f"--trainer.{setting}.path={name}.txt"]
        lines += [f"{setting}: {{class_path: own.{name}, init_args: {{path: {name}.txt}}}}"]
    (folder / "more.yaml").write_text(f"trainer: {{{', '.join(lines)}}}")
    result = fit("--trainer.max_steps=2", *(["--config=more.yaml"] if place == "file" else flags))
    assert result.status == 0, result.err
    assert all((folder / f"{name}.txt").read_text() for name in ("Lines", "Device", "Actions"))
    assert step(folder) == 2


def test_a_run_configuration_that_names_an_own_class_can_be_reused(folder, command):
    flags = ("--config=tiny.yaml", "--config=own.yaml", "--trainer.max_steps=2")
    assert command(folder, "fit", *flags).status == 0
    config = RUN / "config.yaml"
    result = command(folder, "fit", f"--config={config}", "--trainer.max_steps=1")
    assert result.status == 0, result.err
    assert (folder / "count.txt").read_text() == "1"


def test_validate_accepts_a_file_that_names_an_own_class(folder, fit, command):
    assert fit("--config=own.yaml", "--trainer.max_steps=2").status == 0
    plain = command(folder, "validate")
    result = command(folder, "validate", "--config=own.yaml")
    assert (result.status, result.out) == (0, plain.out), result.err


@pytest.mark.parametrize("name", ["own.Nothing", "nowhere.Nothing"])
def test_a_class_that_does_not_exist_is_a_plain_error(folder, fit, name):
    result = fit(f"--trainer.callbacks+={name}")
    assert_error(result, 2, name)
    assert not (folder / "lightning_logs").exists()


def test_an_error_in_an_own_callback_keeps_its_traceback(folder, fit):
    result = fit("--trainer.callbacks+=own.Broken")
    assert result.status == 1
    assert "Traceback" in result.err
    assert 'own.py", line' in result.err
    assert "ValueError: a bug in user code" in result.err


# ---- callbacks with a state ----


def early_stopping(patience: int) -> list[str]:
    """EarlyStopping that stops after `patience` validations, since no loss improves by 9."""
    return [
        "--trainer.callbacks+=EarlyStopping",
        "--trainer.callbacks.monitor=val_loss",
        "--trainer.callbacks.min_delta=9.0",
        f"--trainer.callbacks.patience={patience}",
    ]


def test_a_run_that_a_callback_stopped_says_which_and_why(folder, fit):
    result = fit("--trainer.max_steps=40", *early_stopping(1))
    assert result.status == 0, result.err
    assert step(folder) == 8
    (line,) = (line for line in result.err.splitlines() if "EarlyStopping" in line)
    assert "val_loss" in line


def test_a_run_that_ends_at_its_limit_names_no_callback(fit):
    result = fit(*early_stopping(9))
    assert result.status == 0, result.err
    assert "EarlyStopping" not in result.err


def test_the_same_command_resumes_the_count_of_early_stopping(folder, fit):
    assert fit(*early_stopping(3)).status == 0  # one of three validations without progress
    result = fit(*early_stopping(3), "--ckpt_path=last", "--trainer.max_steps=40")
    assert result.status == 0, result.err
    assert step(folder) == 16


def test_settings_of_a_callback_override_its_restored_state(folder, fit):
    assert fit("--trainer.max_steps=40", *early_stopping(1)).status == 0
    assert step(folder) == 8
    result = fit(*early_stopping(3), "--ckpt_path=last", "--trainer.max_steps=40")
    assert result.status == 0, result.err
    assert step(folder) == 16  # one of the three validations was before the stop


STATEFUL = {
    "EarlyStopping": early_stopping(9),
    "EMAWeightAveraging": [
        "--trainer.callbacks+=EMAWeightAveraging",
        "--trainer.callbacks.decay=0.9",
    ],
    "ModelCheckpoint": [
        "--trainer.callbacks+=ModelCheckpoint",
        "--trainer.callbacks.monitor=val_loss",
        "--trainer.callbacks.save_top_k=3",
    ],
    "Counter": ["--trainer.callbacks+=own.Counter"],
}


@pytest.mark.parametrize("name", STATEFUL)
def test_a_callback_with_a_state_resumes_with_the_same_command_only(folder, fit, command, name):
    assert fit(*STATEFUL[name]).status == 0
    before = (folder / LAST).read_bytes()
    resume = ("--ckpt_path=last", "--trainer.max_steps=12")
    assert_error(command(folder, "fit", *resume), 1, name, "repeat the command")
    assert (folder / LAST).read_bytes() == before
    result = fit(*STATEFUL[name], *resume)
    assert result.status == 0, result.err
    assert step(folder) == 12


def test_evaluation_does_not_need_the_callbacks_of_the_run(folder, fit, command):
    assert fit(*STATEFUL["EarlyStopping"], "--trainer.max_steps=4").status == 0
    assert command(folder, "validate").status == 0


def test_the_same_command_resumes_with_callbacks_without_a_state(folder, fit):
    flags = [
        "--trainer.callbacks+=LearningRateMonitor",
        "--trainer.callbacks+=ThroughputMonitor",
        "--trainer.callbacks.batch_size_fn=torch.Tensor.__len__",
    ]
    if find_spec("psutil"):
        flags.append("--trainer.callbacks+=DeviceStatsMonitor")
    assert fit(*flags).status == 0
    result = fit(*flags, "--ckpt_path=last", "--trainer.max_steps=12")
    assert result.status == 0, result.err
    assert step(folder) == 12


@pytest.mark.parametrize("name", ["EarlyStopping", "ModelCheckpoint"])
def test_a_misspelled_monitor_is_a_plain_error(fit, name):
    result = fit(f"--trainer.callbacks+={name}", "--trainer.callbacks.monitor=valloss")
    assert_error(result, 1, "valloss", "val_loss")


# ---- own checkpoints ----

CHECKPOINTS = """
trainer:
  callbacks:
    - {class_path: ModelCheckpoint, init_args: {monitor: val_loss, save_top_k: 3}}
    - {class_path: ModelCheckpoint, init_args: {dirpath: mine, monitor: train_loss, mode: max, filename: "{step}-{train_loss:.3f}"}}
    - {class_path: ModelCheckpoint, init_args: {dirpath: all, every_n_train_steps: 2, save_top_k: -1, filename: "{step}"}}
    - {class_path: own.Checkpoints, init_args: {folder: own}}
"""


def test_several_checkpoint_callbacks_work_and_resume(folder, fit, command):
    (folder / "checkpoints.yaml").write_text(CHECKPOINTS)
    plain_folder = shutil.copytree(folder, folder / "plain")
    assert command(plain_folder, "fit", "--config=tiny.yaml", "--trainer.max_steps=12").status == 0
    result = fit("--config=checkpoints.yaml")
    assert result.status == 0, result.err
    flags = ("--ckpt_path=last", "--trainer.max_steps=12")
    result = fit("--config=checkpoints.yaml", *flags)
    assert result.status == 0, result.err

    steps = lambda name: sorted(read(path)["global_step"] for path in (folder / name).iterdir())
    assert steps("all") == [2, 4, 6, 8, 10, 12]
    assert steps("own") == [3, 6, 9, 12]
    assert len(steps("mine")) == 1
    names = {path.name for path in (folder / RUN / "checkpoints").glob("*.ckpt")}
    assert len(names) == 2 + 3  # last, best, and those of three validations
    for path in (LAST, BEST):  # last and best equal those of a run without the user's callbacks
        own, plain = read(folder / path), read(plain_folder / path)
        assert own["global_step"] == plain["global_step"]
        for key, weight in plain["state_dict"].items():
            assert torch.equal(own["state_dict"][key], weight)


def test_own_checkpoints_do_not_replace_last_and_best(folder, fit, command):
    (folder / "names.yaml").write_text(
        "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {every_n_train_steps: 1, "
        "save_top_k: 1, filename: best, save_last: true}}]}"
    )
    result = fit("--config=names.yaml", "--trainer.limit_val_batches=0")
    assert result.status == 0, result.err
    own = folder / RUN / "checkpoints" / "own"
    assert {path.name for path in own.iterdir()} == {"best.ckpt", "last.ckpt"}
    assert step(folder) == 8
    assert not (folder / BEST).exists()  # nothing was validated
    assert "last.ckpt" in command(folder, "predict", "--generate.max_new_chars=1").err


# ---- the same from Python ----

SIZES = dict(block_size=8, n_embd=8, n_head=2, n_layer=1, dropout=0.1, seed=1)


class Rates(Callback):
    """The learning rate of each optimizer step, as the optimizer sees it."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_start(self, trainer, module) -> None:
        (optimizer,) = trainer.optimizers
        optimizer.register_step_pre_hook(
            lambda optimizer, *_: self.seen.extend(g["lr"] for g in optimizer.param_groups)
        )


def char_data(folder: Path) -> chargpt.CharDataModule:
    return chargpt.CharDataModule(str(folder / "text.txt"), block_size=8, batch_size=4, seed=1)


def train(folder: Path, module, *callbacks, ckpt_path=None, **settings) -> lightning.Trainer:
    defaults = dict(max_steps=8, val_check_interval=4, log_every_n_steps=1, accelerator="cpu")
    trainer = chargpt.make_trainer(
        **defaults | dict(logger=False, enable_progress_bar=False) | settings,
        default_root_dir=folder,
        callbacks=list(callbacks),
    )
    assert isinstance(trainer, lightning.Trainer)
    trainer.fit(module, datamodule=char_data(folder), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def test_make_trainer_keeps_checkpoints_and_takes_callbacks_and_loggers(folder):
    from lightning.pytorch.loggers import CSVLogger

    rates, logger = Rates(), CSVLogger(folder, name="logs")
    trainer = train(folder, chargpt.GPTModule(**SIZES, lr=0.01), rates, logger=logger)
    assert trainer.global_step == 8
    assert rates.seen and set(rates.seen) == {0.01}
    assert "val_loss" in next(folder.glob("logs/*/metrics.csv")).read_text()
    (last,) = folder.rglob("last.ckpt")
    assert read(last)["global_step"] == 8
    assert (last.parent / "best.ckpt").is_file()
    assert len(chargpt.load(last).complete("the", max_new_chars=5)) == 8


def test_make_trainer_keeps_a_run_where_the_commands_find_it(folder, command):
    train(folder, chargpt.GPTModule(**SIZES), logger=True)
    assert step(folder) == 8
    result = command(folder, "validate")
    assert (result.status, result.out.split()[0]) == (0, "val_loss"), result.err


class Constant(chargpt.GPTModule):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.25, momentum=0.9)


class Stepped(chargpt.GPTModule):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Cyclic(chargpt.GPTModule):
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step % 4))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


RATES = {
    Constant: [0.25] * 8,
    Stepped: [0.5] * 3 + [0.25] * 3 + [0.125] * 2,
    Cyclic: [0.1, 0.1 / 2, 0.1 / 3, 0.1 / 4] * 2,
}


@pytest.mark.parametrize("module_class", RATES, ids=lambda cls: cls.__name__)
def test_an_overridden_optimizer_trains_and_resumes_with_its_own_rates(folder, module_class):
    settings = SIZES | dict(lr=3.0, schedule="cosine", warmup_steps=3)
    whole = module_class(**settings)
    trainer = train(folder, whole, rates := Rates())
    assert rates.seen == pytest.approx(RATES[module_class])
    assert trainer.logged_metrics["lr"].item() == pytest.approx(RATES[module_class][-1])
    other = folder / "stopped"
    shutil.copytree(folder, other, ignore=lambda *_: ["lightning_logs", "checkpoints"])
    train(other, module_class(**settings), max_steps=5)
    (last,) = other.rglob("last.ckpt")
    resumed = module_class(**settings)
    train(other, resumed, rates := Rates(), ckpt_path=last)
    assert rates.seen == pytest.approx(RATES[module_class][5:])
    for name, weight in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name


def test_calling_the_module_gives_the_logits_of_its_network(folder, text):
    module = chargpt.GPTModule(**SIZES)
    train(folder, module)
    (last,) = folder.rglob("last.ckpt")
    model = chargpt.load(last)
    ids = torch.as_tensor(model.vocabulary.encode(text[:9])).long()
    with torch.no_grad():
        logits = module.eval()(ids[None, :-1])
    assert logits.shape == (1, 8, len(model.vocabulary))
    losses = torch.nn.functional.cross_entropy(logits[0], ids[1:], reduction="none")
    assert torch.allclose(losses, model.score(text[:9]).losses, atol=1e-5)
