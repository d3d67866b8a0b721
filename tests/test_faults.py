"""Regression tests of faults that users found: wrong results, lost work, tracebacks, messages."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from contextlib import suppress
from pathlib import Path

import lightning
import pytest
import torch
from conftest import assert_error
from lightning import Callback

import chargpt
from chargpt.cli.main import main
from chargpt.model import UserError

RUN = Path("lightning_logs", "version_0")
LAST = RUN / "checkpoints" / "last.ckpt"
BEST = RUN / "checkpoints" / "best.ckpt"
RESUME = ["fit", "--ckpt_path=last", "--trainer.max_steps=12"]  # the tiny run ends at step 8

SLURM = dict(
    SLURM_JOB_ID="7",
    SLURM_JOB_NAME="train",
    SLURM_NTASKS="1",
    SLURM_PROCID="0",
    SLURM_LOCALID="0",
    SLURM_NODEID="0",
)

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX signals and fork")


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the trained folder, which the test may change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def fit(folder, command):
    """Train in `folder` with the tiny configuration."""
    return lambda *flags: command(folder, "fit", "--config=tiny.yaml", *flags)


@pytest.fixture
def forked(tmp_path):
    """Run a command in a fork: signals and limits on files would affect the tests too."""

    def run(folder: Path, *args: str, before=lambda: None) -> tuple[int, str]:
        log = tmp_path / "stderr.txt"
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with open(log, "w") as err:
                    os.dup2(err.fileno(), 1)
                    os.dup2(err.fileno(), 2)
                sys.stdout = sys.stderr = os.fdopen(2, "w", closefd=False)
                os.chdir(folder)
                before()
                main(list(args))
                status = 0
            except SystemExit as stop:
                status = stop.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        deadline = time.monotonic() + 60
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.02)
        return os.waitstatus_to_exitcode(ended[1]), log.read_text()

    return run


@pytest.fixture
def at_step(monkeypatch):
    """Call a function at the beginning of a training step."""

    def patch(step: int, call) -> None:
        train = chargpt.GPTModule.training_step

        def training_step(self, batch, batch_idx):
            if self.global_step == step:
                call()
            return train(self, batch, batch_idx)

        monkeypatch.setattr(chargpt.GPTModule, "training_step", training_step)

    return patch


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def contents(folder: Path) -> dict[Path, bytes]:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- a run and other texts ----

# Of the same 23 characters, of fewer, and with a new one. {} is the original.
OTHER_TEXTS = {
    "same": lambda text: text[::-1],
    "fewer": lambda text: text.replace("k", "n"),
    "new": lambda text: text.replace("k", "é"),
}


def write_other(folder: Path, text: str, kind: str = "same") -> str:
    (folder / "other.txt").write_text(OTHER_TEXTS[kind](text), encoding="utf-8", newline="\n")
    return "--data.corpus=other.txt"


@pytest.mark.parametrize("kind", OTHER_TEXTS)
def test_resuming_with_another_text_is_refused_and_the_run_stays_as_it_was(
    run, text, command, kind
):
    other = write_other(run, text, kind)
    before = contents(run)
    result = command(run, *RESUME, other)
    assert_error(result, 1, "other.txt")
    assert contents(run) == before


@pytest.mark.parametrize(
    "args",
    [
        ["fit", "--ckpt_path=best", "--trainer.max_steps=12", "--data.corpus=other.txt"],
        [*RESUME, "--config=other.yaml"],
        ["validate", "--data.corpus=other.txt"],
        ["test", "--data.corpus=other.txt"],
        ["predict", "--data.corpus=other.txt"],
        ["export", "--to=page", "--output=other.html", "--data.corpus=other.txt"],
    ],
    ids=lambda args: " ".join(args),
)
def test_no_command_that_names_another_text_changes_the_first_run(run, text, command, args):
    write_other(run, text)
    (run / "other.yaml").write_text("data: {corpus: other.txt}")
    before = contents(run)
    result = command(run, *args)
    assert "Traceback" not in result.err
    assert contents(run) == before
    if args[0] == "fit":
        assert_error(result, 1, "other.txt")


def test_a_new_run_with_another_text_leaves_the_first_run_as_it_was(run, text, command):
    before = contents(run / RUN)
    flags = (write_other(run, text), "--trainer.max_steps=2")
    assert command(run, "fit", "--config=tiny.yaml", *flags).status == 0
    assert contents(run / RUN) == before
    assert (run / "lightning_logs/version_1/checkpoints/last.ckpt").is_file()


def test_a_copy_of_the_text_in_another_place_is_the_same_text(run, text, command):
    (run / "copy.txt").write_text(text, newline="\n")
    flags = ("--trainer.max_steps=10", "--data.corpus=copy.txt")
    result = command(run, "fit", "--ckpt_path=last", *flags)
    assert result.status == 0, result.err
    assert read(run / LAST)["global_step"] == 10


def test_the_best_checkpoint_is_not_guessed_from_the_name_of_a_file(folder, fit, command):
    (folder / "own.yaml").write_text(
        "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {every_n_train_steps: 1, "
        "save_top_k: -1, filename: '{step}-{val_loss:.2f}'}}]}"
    )
    assert fit("--config=own.yaml").status == 0
    result = command(folder, "validate")
    assert result.status == 0, result.err
    assert "best.ckpt" in result.err
    best = command(folder, "validate", f"--ckpt_path={BEST}")
    last = command(folder, "validate", f"--ckpt_path={LAST}")
    assert result.out == best.out
    assert float(best.out.split()[1]) <= float(last.out.split()[1])
    assert "best.ckpt" in command(folder, "predict", "--generate.max_new_chars=1").err


# ---- splits that overlap the training text ----


@pytest.mark.parametrize(
    "args",
    [
        ["test", "--data.test_fraction=0.5"],
        ["validate", "--data.val_fraction=0.5"],
        ["validate", "--data.test_fraction=0.5"],
        [*RESUME, "--data.val_fraction=0.3"],
        [*RESUME, "--data.val_fraction=0.05"],
        [*RESUME, "--data.test_fraction=0.3"],
    ],
    ids=" ".join,
)
def test_a_split_that_was_trained_on_is_refused(run, command, args):
    before = contents(run)
    name = args[-1].partition("=")[0].removeprefix("--data.")
    reason = "cannot be changed" if args[0] == "fit" else "were trained on"
    assert_error(command(run, *args), 1, name, reason)
    assert contents(run) == before


def test_a_test_split_of_a_run_that_was_trained_without_one_is_refused(folder, fit, command):
    assert fit("--data.test_fraction=0", "--trainer.max_steps=2").status == 0
    assert_error(command(folder, "test", "--data.test_fraction=0.5"), 1, "test_fraction")


def test_another_text_of_known_characters_can_be_validated_with_any_split(run, text, command):
    result = command(run, "validate", write_other(run, text), "--data.val_fraction=0.5")
    assert result.status == 0, result.err
    own = command(run, "validate")
    assert [line.split()[0] for line in result.out.splitlines()] == ["val_loss", "val_bpc"]
    assert result.out != own.out


# ---- the files of a folder ----


def train_on_poems(folder: Path, command) -> tuple[set[str], str]:
    """Train one step on the folder `poems`; returns its characters and standard error."""
    flags = ("--data.corpus=poems", "--trainer.max_steps=1", "--data.test_fraction=0")
    result = command(folder, "fit", "--config=tiny.yaml", *flags)
    assert result.status == 0, result.err
    return set(read(folder / LAST)["vocabulary"]), result.err


HIDDEN = [
    ".ipynb_checkpoints/a-checkpoint.txt",
    "._a.txt",
    "__MACOSX/a.txt",
    "sub/.git/deep/a.txt",
]


def test_hidden_files_and_folders_are_not_read(folder, text, command):
    for name in ("a.txt", *HIDDEN):
        path = folder / "poems" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = text if name == "a.txt" else text + "☃"
        path.write_text(content, encoding="utf-8", newline="\n")
    characters, err = train_on_poems(folder, command)
    assert characters == set(text)
    assert "2,000 characters" in err


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_linked_folders_are_read_once_and_the_number_of_files_is_printed(folder, text, command):
    (folder / "poems").mkdir()
    (folder / "more").mkdir()
    (folder / "poems/a.txt").write_text(text, newline="\n")
    (folder / "more/b.txt").write_text("☃" * 1000, encoding="utf-8")
    (folder / "poems/one").symlink_to("../more")
    (folder / "poems/two").symlink_to("../more")
    (folder / "poems/loop").symlink_to(".")
    characters, err = train_on_poems(folder, command)
    assert characters == {*text, "☃"}
    assert "3,001 characters" in err  # and a newline between the files
    assert "2 files" in err


# ---- SLURM and signals ----


def test_a_slurm_job_resumes_nothing_that_was_not_named(run, folder, fit, command, monkeypatch):
    assert command(run, *RESUME).status == 0
    shutil.copy(run / LAST, folder / "hpc_ckpt_1.ckpt")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    result = fit("--trainer.max_steps=2")
    assert result.status == 0, result.err
    assert read(folder / LAST)["global_step"] == 2


SIGNALS = [name for name in ("SIGHUP", "SIGUSR1", "SIGTERM", "SIGINT") if hasattr(signal, name)]


@posix
@pytest.mark.parametrize(
    ("name", "slurm"),
    [*((name, False) for name in SIGNALS), ("SIGUSR1", True), ("SIGTERM", True)],
)
def test_a_signal_ends_a_run_with_its_checkpoint_saved(
    folder, forked, at_step, monkeypatch, name, slurm
):
    for variable, value in SLURM.items() if slurm else ():
        monkeypatch.setenv(variable, value)
    number = getattr(signal, name)
    at_step(2, lambda: signal.raise_signal(number))
    status, err = forked(folder, "fit", "--config=tiny.yaml")
    assert status == 128 + number, err
    assert "Traceback" not in err
    assert read(folder / LAST)["global_step"] == 3
    assert not list(folder.rglob("*hpc_ckpt*"))


@posix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_during_setup_ends_the_run_with_its_status(folder, forked, monkeypatch, name):
    number, build = getattr(signal, name), chargpt.GPTModule.build

    def interrupted(self, vocabulary) -> None:
        signal.raise_signal(number)
        build(self, vocabulary)

    monkeypatch.setattr(chargpt.GPTModule, "build", interrupted)
    status, err = forked(folder, "fit", "--config=tiny.yaml")
    assert status == 128 + number, err
    assert "Traceback" not in err
    assert not (folder / "lightning_logs").exists()


@posix
def test_an_ignored_sighup_stays_ignored(folder, forked, at_step):
    at_step(2, lambda: signal.raise_signal(signal.SIGHUP))
    nohup = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    status, err = forked(folder, "fit", "--config=tiny.yaml", before=nohup)
    assert status == 0, err
    assert read(folder / LAST)["global_step"] == 8


# Sends Ctrl-C when a module is first imported.
INTERRUPT = """
import signal, sys

class Interrupt:
    def find_spec(self, name, *_):
        if name == {module!r}:
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
"""


def subprocess_env(*folders: Path) -> dict[str, str]:
    root = Path(chargpt.__file__).parents[1]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*folders, root]))}


@posix
@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("predict", "chargpt.cli.main"),
        ("predict", "torch"),
        ("fit", "lightning"),
    ],
)
def test_ctrl_c_while_modules_are_imported_ends_without_a_traceback(tmp_path, name, module):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT.format(module=module))
    result = subprocess.run(
        [sys.executable, "-m", "chargpt", name],
        cwd=tmp_path,
        env=subprocess_env(tmp_path),
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (130, ""), result.stderr
    assert "Traceback" not in result.stderr


@posix
@pytest.mark.parametrize(("name", "hook"), [("fit", "prepare_data"), ("validate", "setup")])
def test_ctrl_c_while_the_text_is_read_ends_without_a_traceback(
    run, forked, monkeypatch, name, hook
):
    interrupt = lambda *_, **__: signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(chargpt.CharDataModule, hook, interrupt)
    status, err = forked(run, name, "--config=tiny.yaml")
    assert (status, "Traceback" in err) == (130, False), err


def test_no_arguments_at_all_is_a_plain_error(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "chargpt"],
        cwd=tmp_path,
        env=subprocess_env(),
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) <= 2


# ---- settings without effect, runs without end ----


def test_stochastic_weight_averaging_is_refused_and_the_other_averaging_named(fit):
    flags = (
        "--trainer.callbacks+=StochasticWeightAveraging",
        "--trainer.callbacks.swa_lrs=0.01",
    )
    assert_error(fit(*flags), 1, "StochasticWeightAveraging", "EMAWeightAveraging")


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("limit_train_batches=0.0", "limit_train_batches"),
        ("max_time=00:00:00:00", "max_time"),
        ("min_steps=9", "min_steps"),  # max_steps is 8
        ("check_val_every_n_epoch=0", "check_val_every_n_epoch"),
        ("val_check_interval=00:00:00:02", "val_check_interval"),
    ],
)
def test_trainer_settings_that_cannot_work_are_refused(folder, fit, flag, words):
    before = contents(folder)
    assert_error(fit(f"--trainer.{flag}"), 1, words)
    assert contents(folder) == before


@pytest.mark.parametrize(
    "args",
    [
        ["validate", "--trainer.limit_val_batches=0"],
        ["test", "--trainer.limit_test_batches=0"],
    ],
    ids=" ".join,
)
def test_scoring_no_batches_is_refused(trained, command, args):
    result = command(trained, *args)
    assert_error(result, 1, args[1].partition("=")[0].removeprefix("--trainer."))
    assert result.out == ""


SIZES = dict(block_size=8, n_embd=8, n_head=2, n_layer=1, seed=1)


class Guard(Callback):
    """Ends a run that would train forever."""

    def on_train_batch_start(self, trainer, *_) -> None:
        assert trainer.global_step < 20, "the run does not end"


def plain_trainer(folder: Path, **settings) -> lightning.Trainer:
    return lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=[Guard()],
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def char_data(folder: Path, **settings) -> chargpt.CharDataModule:
    return chargpt.CharDataModule(str(folder / "text.txt"), **dict(block_size=8, batch_size=4, seed=1) | settings)  # fmt: skip


@pytest.mark.parametrize("limits", [dict(max_epochs=1), dict(max_epochs=3), {}], ids=str)
def test_a_plain_trainer_that_would_never_end_is_refused(folder, limits):
    trainer = plain_trainer(folder, logger=False, enable_checkpointing=False, **limits)
    with pytest.raises(UserError, match="max_steps"):
        trainer.fit(chargpt.GPTModule(**SIZES), datamodule=char_data(folder))


def test_a_plain_trainer_that_counts_batches_ends(folder):
    limits = dict(max_epochs=2, limit_train_batches=3, limit_val_batches=1)
    trainer = plain_trainer(folder, logger=False, enable_checkpointing=False, **limits)
    trainer.fit(chargpt.GPTModule(**SIZES), datamodule=char_data(folder))
    assert trainer.global_step == 6


def test_a_checkpoint_of_a_plain_trainer_is_refused_plainly(folder, command):
    limits = dict(max_steps=4, limit_train_batches=4, limit_val_batches=1, logger=False)
    trainer = plain_trainer(folder, **limits)
    trainer.fit(chargpt.GPTModule(**SIZES), datamodule=char_data(folder))
    path = folder / "plain.ckpt"
    trainer.save_checkpoint(path)
    flags = ("--config=tiny.yaml", "--data.test_fraction=0", "--seed_everything=1")
    result = command(folder, "fit", f"--ckpt_path={path}", *flags)
    assert_error(result, 1, "cannot be resumed exactly")


# ---- checkpoints and vocabularies that do not fit ----


@pytest.fixture
def from_the_future(run) -> Path:
    """A checkpoint with a network setting that this version does not have."""
    checkpoint = read(run / LAST)
    ours = checkpoint.setdefault("chargpt", {})
    ours["network"] = [*ours.get("network", ()), "gate_width"]
    checkpoint["hyper_parameters"]["gate_width"] = 2
    torch.save(checkpoint, run / "future.ckpt")
    return run / "future.ckpt"


@pytest.mark.parametrize(
    "args",
    [
        ["predict", "--generate.max_new_chars=1"],
        ["export", "--to=page", "--output=page.html"],
        ["validate"],
        ["fit", "--trainer.max_steps=9"],
    ],
    ids=lambda args: args[0],
)
def test_a_network_setting_that_this_version_does_not_know_is_refused_by_name(
    from_the_future, run, command, args
):
    before = contents(run)
    assert_error(command(run, *args, "--ckpt_path=future.ckpt"), 1, "gate_width")
    assert contents(run) == before


@pytest.mark.parametrize("characters", ["abc", "abcdefgh"])
def test_a_vocabulary_of_another_size_than_the_network_is_refused(characters):
    config = chargpt.GPTConfig(block_size=8, n_embd=8, n_head=2, n_layer=1)
    gpt = chargpt.GPT(config, 5)
    with pytest.raises(UserError, match=rf"{len(characters)}\b.*\b5|5\b.*\b{len(characters)}"):
        chargpt.TextGenerator(gpt, chargpt.Vocabulary(characters))
    assert chargpt.TextGenerator(gpt, chargpt.Vocabulary("abcde")).complete("a", max_new_chars=3)


# ---- tracebacks ----


def test_a_strategy_that_spawns_processes_is_refused(folder, fit):
    result = fit("--trainer.strategy=ddp_spawn", "--trainer.devices=1", "--trainer.max_steps=1")
    assert_error(result, 1, "ddp_spawn", "use ddp")


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
@pytest.mark.parametrize(
    "args",
    [["predict", "--generate.output=loop"], ["export", "--to=page", "--output=loop"]],
    ids=lambda args: args[0],
)
def test_an_output_that_is_a_loop_of_links_is_a_plain_error(run, command, args):
    (run / "loop").symlink_to("loop")
    assert_error(command(run, *args), 1, "loop")


def test_compiling_without_a_compiler_is_a_plain_error(folder, fit, monkeypatch):
    config = pytest.importorskip("torch._inductor.config")
    monkeypatch.setattr(config.cpp, "cxx", ("/nonexistent/c++",))
    monkeypatch.setattr(config, "force_disable_caches", True)
    torch._dynamo.reset()
    result = fit("--model.compile=true", "--trainer.max_steps=1", "--trainer.accelerator=cpu")
    assert_error(result, 1, "compile")


def test_a_full_disk_between_validations_names_the_folder_and_leaves_the_checkpoint(
    folder, command, fit, monkeypatch
):
    from torch.utils.tensorboard import SummaryWriter

    write = SummaryWriter.add_scalar

    def fail():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def add_scalar(self, tag, value, global_step=None, *args, **kwargs):
        if global_step == 5:  # as TensorBoard does, first in its thread, without a name
            thread = type("Writer", (threading.Thread,), {"__module__": "tensorboard.x"})(
                target=fail
            )
            thread.start()
            thread.join()
            fail()
        return write(self, tag, value, global_step, *args, **kwargs)

    monkeypatch.setattr(SummaryWriter, "add_scalar", add_scalar)
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # not pytest's
    assert_error(fit(), 1, os.strerror(errno.ENOSPC), str(RUN))
    assert read(folder / LAST)["global_step"] >= 4


def test_a_run_folder_that_is_deleted_is_a_plain_error(folder, fit, at_step):
    at_step(5, lambda: shutil.rmtree(folder / RUN))
    assert_error(fit(), 1, "cannot write", str(RUN))


def test_showwarning_is_restored_when_a_command_ends(trained, monkeypatch):
    monkeypatch.chdir(trained)
    before = warnings.showwarning
    monkeypatch.setattr(warnings, "showwarning", before)  # restored in any case
    for args in (["--version"], ["predict", "--generate.max_new_chars=1"], ["nonsense"]):
        with suppress(SystemExit):
            main(args)
        assert warnings.showwarning is before


def test_warnings_of_libraries_that_concern_the_user_are_shown(folder, fit, at_step):
    def warn() -> None:
        for category, said in (
            (UserWarning, "the driver is old"),
            (DeprecationWarning, "old spelling"),
        ):
            warnings.warn_explicit(said, category, "/site-packages/torch/cuda/__init__.py", 1)

    at_step(2, warn)
    result = fit("--trainer.max_steps=4")
    assert result.status == 0, result.err
    assert "warning: the driver is old" in result.err.splitlines()
    assert "old spelling" not in result.err


def test_an_unexpected_error_keeps_its_traceback(fit, at_step):
    def broken() -> None:
        raise ValueError("an unexpected bug")

    at_step(2, broken)
    result = fit("--trainer.max_steps=4")
    assert result.status == 1
    assert "Traceback" in result.err
    assert "in broken" in result.err
    assert "ValueError: an unexpected bug" in result.err


# ---- messages ----


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["train", "--config=tiny.yaml"], ["fit"]),
        (["generate"], ["predict"]),
        (["fit", "--lr=3"], ["--model.lr"]),
        (["predict", "Hello"], ['--generate.prompt "Hello"']),
    ],
    ids=lambda value: value[0],
)
def test_a_mistyped_command_or_option_gets_a_suggestion(trained, command, args, words):
    assert_error(command(trained, *args), 2, "did you mean", *words)


# The command, its status, words of the message, and words of the previous one.
MESSAGES = [
    (["predict", "--config=cpu"], 2, ["configuration file"], ["Key must be"]),
    (["fit", "--model.position=up"], 2, ["position", "up", "learned", "rotary"], ["Literal", "typing"]),
    (["predict", "--generate.format=xml"], 2, ["format", "xml", "text", "jsonl"], ["Literal", "typing"]),
    (["export", "--to=word", "--output=x"], 2, ["--to", "word", "page", "huggingface"], ["Literal", "typing"]),
    (["fit", "--config=tiny.yaml", "--trainer.precision=fp16"], None, ["precision", "fp16", "16-mixed"], ["Expected a int"]),
    (["predict", "--generate.prompt"], 2, ["--generate.prompt="], []),
    (["predict", "--generate.prompt", "--Hello"], 2, ["--generate.prompt="], []),
    (["export", "--to=page"], 2, ["required: output"], ["Key "]),
    (["export", "--to=page", "--output=text.txt/p.html"], 1, ["p.html"], ["[Errno", ".tmp"]),
    (["predict", "--generate.output=text.txt/p.txt", "--generate.max_new_chars=1"], 1, ["p.txt"], ["[Errno", ".tmp"]),
    (["export", "--to=page", "--output=/sys/p.html"], 1, ["/sys/p.html"], ["[Errno", ".tmp"]),
    (["predict", f"--ckpt_path={RUN}"], 1, ["version_0", "folder"], []),
    (["validate", f"--ckpt_path={RUN}"], 1, ["version_0", "folder"], []),
    (["fit", "--config="], 2, ["--config"], []),
    (["fit", "--config", ""], 2, ["--config"], []),
    (["fit", "--config=tiny.yaml", "--trainer.max_time={secs: 5}"], None, ["max_time", "secs", "seconds"], ["keyword", "__new__"]),
    (["fit", "--config=tiny.yaml", "--data.val_fraction=0.0005"], 1, ["leaves 1"], ["1 characters"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("args", "status", "words", "never"), MESSAGES, ids=[" ".join(row[0]) for row in MESSAGES]
)
def test_a_message_says_what_is_wrong_and_what_to_do(run, command, args, status, words, never):
    before = contents(run)
    result = command(run, *args)
    assert_error(result, status or (result.status in (1, 2) and result.status), *words)
    for word in never:
        assert word not in result.err
    assert contents(run) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_reported_in_plain_words(fit):
    result = fit("--trainer.accelerator=gpu")
    assert_error(result, 1, "GPU", "--config cpu")
    assert "backend" not in result.err
