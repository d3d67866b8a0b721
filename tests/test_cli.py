import ast
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import chargpt
from chargpt.checkpoints import new_run
from chargpt.cli.main import COMMANDS
from chargpt.cli.train import TrainingCLI
from chargpt.training import callbacks
from chargpt.vocabulary import Vocabulary

TRAINING = ["fit", "validate", "test"]

RUN = Path("lightning_logs", "version_0")


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the trained folder, to be changed at will."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def parsed(monkeypatch):
    """The settings that a command line amounts to."""
    monkeypatch.setattr(TrainingCLI, "instantiate_classes", lambda self: None)

    def parse(folder: Path, *args: str):
        monkeypatch.chdir(folder)
        return TrainingCLI(args[0], list(args[1:])).config

    return parse


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ---- whole commands ----


def test_a_run_leaves_its_best_and_last_checkpoint_and_its_settings(trained):
    files = sorted(path.name for path in (trained / RUN / "checkpoints").iterdir())
    assert [name.split("-val_loss=")[0] for name in files] == ["last.ckpt", "step=8"]
    assert read(trained / RUN / "checkpoints/last.ckpt")["global_step"] == 8
    config = yaml.safe_load((trained / RUN / "config.yaml").read_text())
    assert config["model"]["n_embd"] == 8
    assert config["data"]["block_size"] == 8


def test_tensorboard_gets_scalars_samples_and_the_best_loss(trained):
    found = events(trained / RUN)
    tags = found.Tags()
    assert {"train_loss", "val_loss", "val_bpc", "lr", "chars_per_second", "best_val_loss"} <= set(
        tags["scalars"]
    )
    assert {"sample/text_summary"} <= set(tags["tensors"])
    assert [sample.step for sample in found.Tensors("sample/text_summary")] == [4, 8]
    assert [point.step for point in found.Scalars("val_loss")] == [3, 7]  # Lightning counts from 0
    best = min(point.value for point in found.Scalars("val_loss"))
    assert found.Scalars("best_val_loss")[0].value == pytest.approx(best)


def test_validate_prints_the_loss_in_full_and_leaves_nothing_behind(trained, command):
    before = names(trained)
    result = command(trained, "validate")
    lines = dict(line.split() for line in result.out.splitlines())
    assert (result.status, list(lines)) == (0, ["val_loss", "val_bpc"])
    (best,) = (trained / RUN / "checkpoints").glob("*val_loss*")
    assert str(best.relative_to(trained)) in result.err
    assert f"{float(lines['val_loss']):.4f}" in best.name
    assert len(lines["val_loss"]) > 12
    assert names(trained) == before


def test_the_validation_loss_does_not_depend_on_the_batch_size(trained, command):
    losses = [
        float(command(trained, "validate", f"--data.batch_size={n}").out.split()[1])
        for n in (1, 7, 64)
    ]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


def test_test_prints_the_loss_of_the_test_split(trained, command):
    result = command(trained, "test")
    assert [line.split()[0] for line in result.out.splitlines()] == ["test_loss", "test_bpc"]
    assert result.out != command(trained, "validate").out


def test_predict_writes_the_text_and_nothing_else_to_standard_output(trained, command, monkeypatch):
    args = ("--generate.prompt=The king", "--generate.max_new_chars=20", "--generate.seed=3")
    before = names(trained)
    result = command(trained, "predict", *args)
    assert names(trained) == before
    monkeypatch.chdir(trained)
    expected = chargpt.load().complete("The king", max_new_chars=20, seed=3)
    assert (result.status, result.out) == (0, expected + "\n" * (not expected.endswith("\n")))
    assert "val_loss" in result.err  # the checkpoint's name
    assert command(trained, "predict", *args).out == result.out


def test_predict_takes_prompts_and_stops_and_gives_lines_of_json(run, command, monkeypatch):
    (run / "prompts.txt").write_text("The king\n\nof\n")
    settings = (
        "--generate.max_new_chars=30",
        '--generate.stop=["e", "\\n\\n"]',
        "--generate.exact_window=true",
    )
    files = (
        "--generate.prompts=prompts.txt",
        "--generate.output=texts.jsonl",
        "--generate.format=jsonl",
    )
    result = command(run, "predict", "--generate.num_samples=2", *settings, *files)
    assert (result.status, result.out) == (0, "")
    monkeypatch.chdir(run)
    texts = chargpt.load().complete_all(
        ["The king", "", "of"],
        num_samples=2,
        max_new_chars=30,
        stop=["e", "\n\n"],
        exact_window=True,
    )
    lines = [
        json.loads(line) for line in (run / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [line["text"] for line in lines] == sum(texts, [])
    assert lines[0]["settings"]["stop"] == ["e", "\n\n"]


def test_an_interrupted_predict_ends_with_130(trained, command, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("chargpt.cli.predict.read_prompts", interrupted)
    result = command(trained, "predict")
    assert (result.status, result.out) == (130, "")
    assert "Traceback" not in result.err


def test_predict_and_validate_need_neither_the_folder_nor_a_configuration(
    trained, command, tmp_path
):
    checkpoint = f"--ckpt_path={trained / RUN / 'checkpoints/last.ckpt'}"
    assert command(tmp_path, "predict", checkpoint, "--generate.max_new_chars=5").status == 0
    assert command(tmp_path, "validate", checkpoint).out.startswith("val_loss")


def test_predict_takes_no_flags_that_would_change_nothing(trained, command):
    result = command(trained, "predict", "--generate.max_new_chars=1", "--model.n_layer=3")
    assert_plain(result, 2, "there is no option --model.n_layer")


def test_an_empty_prompt_starts_from_a_newline(trained, command):
    result = command(trained, "predict", "--generate.prompt=", "--generate.max_new_chars=5")
    assert (result.status, result.out[0]) == (0, "\n")


def test_fit_goes_on_in_the_same_folder(run, command):
    best_before = events(run / RUN).Scalars("best_val_loss")[0].value
    result = command(run, "fit", "--ckpt_path=last", "--trainer.max_steps=12")
    assert result.status == 0, result.err
    assert "after step 8" in result.err
    assert os.listdir(run / "lightning_logs") == ["version_0"]
    assert read(run / RUN / "checkpoints/last.ckpt")["global_step"] == 12
    assert [point.step for point in events(run / RUN).Scalars("val_loss")] == [3, 7, 11]
    assert events(run / RUN).Scalars("best_val_loss")[-1].value <= best_before


def test_a_run_goes_on_as_if_it_had_never_stopped(run, folder, command):
    assert command(run, "fit", "--ckpt_path=last", "--trainer.max_steps=12").status == 0
    assert command(folder, "fit", "--config=tiny.yaml", "--trainer.max_steps=12").status == 0
    ours, theirs = (read(at / RUN / "checkpoints/last.ckpt")["state_dict"] for at in (run, folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_going_on_with_what_is_complete_says_so(run, command):
    result = command(run, "fit", "--ckpt_path=last")
    assert (result.status, result.err.splitlines()) == (
        0,
        [
            f"settings {run / RUN / 'config.yaml'}",
            "nothing to do: the checkpoint is of step 8, and trainer.max_steps is 8",
            "give a larger --trainer.max_steps to train on",
        ],
    )


def test_going_on_when_the_time_is_over_says_so(run, command):
    limits = ["--trainer.max_time={seconds: 1000}", "--trainer.max_steps=9"]
    assert command(run, "fit", "--ckpt_path=last", *limits).status == 0
    limits = ["--trainer.max_time={seconds: 0}", "--trainer.max_steps=12"]
    result = command(run, "fit", "--ckpt_path=last", *limits)
    assert (result.status, "of step 9, and trainer.max_time is" in result.err) == (0, True)
    assert "give a larger --trainer.max_time" in result.err


def test_the_config_of_a_run_that_went_on_starts_anew(run, command):
    command(run, "fit", "--ckpt_path=last", "--trainer.max_steps=10")
    assert (
        command(run, "fit", f"--config={RUN / 'config.yaml'}", "--trainer.max_steps=2").status == 0
    )
    assert read(run / "lightning_logs/version_1/checkpoints/last.ckpt")["global_step"] == 2


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_ctrl_c_saves_and_the_run_goes_on(folder, command):
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "chargpt",
                "fit",
                "--config=tiny.yaml",
                "--trainer.max_steps=1000000",
            ],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=log,
            env={
                **os.environ,
                "PYTHONPATH": str(Path(chargpt.__file__).parents[1]),
                "OMP_NUM_THREADS": "1",
            },
        )
        deadline = time.monotonic() + 180
        while not list(folder.glob(f"{RUN}/checkpoints/*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=180)
    err = (folder / "log").read_text()
    assert (process.returncode, out) == (130, b""), err
    assert "Traceback" not in err
    assert "go on with the same command and --ckpt_path last" in err
    step = read(folder / RUN / "checkpoints/last.ckpt")["global_step"]
    assert f"stopped after step {step}" in err
    assert command(folder, "fit", "--ckpt_path=last", f"--trainer.max_steps={step + 2}").status == 0
    assert read(folder / RUN / "checkpoints/last.ckpt")["global_step"] == step + 2


# ---- settings ----


@pytest.mark.parametrize("flags", [["--config", "a.yaml"], ["--config=a.yaml"], ["-c", "a.yaml"]])
def test_typed_flags_win_wherever_the_config_stands(folder, parsed, flags):
    (folder / "a.yaml").write_text("model: {n_embd: 16, n_head: 4}")
    typed = ["--model.n_embd=32"]
    for args in ([*flags, *typed], [*typed, *flags]):
        config = parsed(folder, "fit", "--config=tiny.yaml", *args)
        assert (config.model.n_embd, config.model.n_head, config.model.n_layer) == (32, 4, 1)


def test_typed_flags_win_over_the_checkpoint_and_that_over_configs(run, parsed):
    (run / "other.yaml").write_text(
        "seed_everything: 1\ntrainer: {max_steps: 20, log_every_n_steps: 3}\nmodel: {dropout: 0.5, lr: 1.0}\n"
    )
    config = parsed(run, "fit", "--model.lr=0.1", "--ckpt_path=last", "--config=other.yaml")
    assert (config.model.lr, config.model.dropout, config.seed_everything) == (0.1, 0.1, 7)
    assert (config.trainer.max_steps, config.trainer.log_every_n_steps) == (20, 3)
    assert Path(config.data.corpus) == run.parent.parent / config.data.corpus  # absolute


def test_going_on_without_a_configuration_takes_that_of_the_run(run, parsed):
    config = parsed(run, "fit", "--ckpt_path=last", "--trainer.max_steps=9")
    assert (config.trainer.max_steps, config.trainer.val_check_interval) == (9, 4)


def test_validate_takes_the_settings_of_the_checkpoint(trained, parsed):
    config = parsed(trained, "validate")
    assert (config.model.n_embd, config.data.block_size, config.data.test_fraction) == (8, 8, 0.1)
    assert parsed(trained, "validate", "--data.batch_size=9").data.batch_size == 9


@pytest.fixture(scope="module")
def went_on(trained, tmp_path_factory, command) -> dict:
    """The last checkpoint of the run, gone on for two steps with nothing else typed."""
    folder = Path(shutil.copytree(trained, tmp_path_factory.mktemp("went_on") / "run"))
    assert command(folder, "fit", "--ckpt_path=last", "--trainer.max_steps=10").status == 0
    return read(folder / RUN / "checkpoints/last.ckpt")


@pytest.mark.parametrize(
    "setting", ["model.lr=0.5", "model.dropout=0.4", "data.batch_size=2", "seed_everything=8"]
)
def test_what_is_typed_on_going_on_takes_effect(run, went_on, command, setting):
    assert (
        command(run, "fit", "--ckpt_path=last", "--trainer.max_steps=10", f"--{setting}").status
        == 0
    )
    ours = read(run / RUN / "checkpoints/last.ckpt")
    assert any(
        not torch.equal(w, went_on["state_dict"][name]) for name, w in ours["state_dict"].items()
    )
    name = setting.split("=")[0].split(".")[-1].replace("seed_everything", "seed")
    saved = {**ours["hyper_parameters"], **ours["datamodule_hyper_parameters"]}
    assert saved[name] == ast.literal_eval(setting.split("=")[1])


@pytest.mark.parametrize(
    "setting", ["model.n_embd=16", "model.n_head=1", "model.n_layer=2", "data.block_size=16"]
)
@pytest.mark.parametrize("name", ["fit", "validate"])
def test_another_network_is_refused_with_a_reason(trained, command, name, setting):
    more = ["--ckpt_path=last", "--trainer.max_steps=20"] if name == "fit" else []
    result = command(trained, name, *more, f"--{setting}")
    assert result.status == 1
    assert f"error: {setting.split('.')[1].split('=')[0]} is" in result.err
    assert "in the checkpoint" in result.err


@pytest.mark.parametrize("name", ["fit", "validate"])
def test_a_second_target_comes_and_goes_with_its_head(trained, command, name):
    result = command(trained, name, "--ckpt_path=last", "--model.second_target=0.5")
    assert (result.status, "lacks the weights of its head" in result.err) == (1, True)
    assert "Traceback" not in result.err


def test_a_run_that_counts_epochs_is_not_resumed(run, command):
    flags = ["--trainer.max_epochs=9", "--trainer.limit_train_batches=2", "--trainer.max_steps=12"]
    result = command(run, "fit", "--ckpt_path=last", *flags)
    assert (result.status, "cannot be resumed exactly" in result.err) == (1, True)


@pytest.mark.parametrize("name", [*TRAINING, "predict"])
def test_help_explains_each_argument(name, command, tmp_path):
    result = command(tmp_path, name, "--help")
    assert (result.status, result.err) == (0, "")
    assert ("--data.block_size" in result.out) == (name != "predict")
    assert ("--generate.top_p" in result.out) == (name == "predict")
    options = re.findall(r"^  (?:-\w \w+, )?(--[\w.]+)(.*\n(?:   .*\n)*)", result.out, re.MULTILINE)
    assert len(options) > 10
    for option, rest in options:
        explanation = re.sub(r"\(type: .*", "", rest, flags=re.DOTALL)
        assert len(explanation.split()) > 3, f"{option} is not explained"


def test_help_without_a_command_names_the_commands(command, tmp_path):
    result = command(tmp_path, "--help")
    assert (result.status, result.err) == (0, "")
    assert all(name in result.out for name in COMMANDS)


@pytest.mark.parametrize("name", TRAINING)
def test_print_config_gives_a_configuration(name, command, folder):
    result = command(folder, name, "--config=tiny.yaml", "--print_config")
    assert (result.status, result.err) == (0, "")
    assert yaml.safe_load(result.out)["model"]["n_embd"] == 8


# ---- what Lightning offers ----


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (["--trainer.fast_dev_run=true"], []),
        (["--trainer.limit_val_batches=0"], ["lightning_logs/version_0/checkpoints/last.ckpt"]),
        (["--trainer.overfit_batches=1"], ["lightning_logs/version_0/checkpoints/last.ckpt"]),
        (
            ["--trainer.enable_progress_bar=false"],
            ["lightning_logs/version_0/checkpoints/last.ckpt"],
        ),
        (["--trainer.logger=false"], ["lightning_logs/version_0/checkpoints/last.ckpt"]),
        (["--trainer.enable_checkpointing=false"], ["lightning_logs/version_0"]),
        (
            ["--trainer.default_root_dir=sub"],
            ["sub/lightning_logs/version_0/checkpoints/last.ckpt"],
        ),
        (
            ["--trainer.accumulate_grad_batches=2"],
            ["lightning_logs/version_0/checkpoints/last.ckpt"],
        ),
    ],
    ids=lambda value: value[0].split(".")[-1] if value and value[0].startswith("--") else "",
)
def test_flags_of_the_trainer_work(folder, command, flags, kept):
    result = command(folder, "fit", "--config=tiny.yaml", "--trainer.max_steps=4", *flags)
    assert result.status == 0, result.err
    assert "Traceback" not in result.err
    assert all((folder / path).exists() for path in kept)
    assert kept or names(folder) == {"text.txt", "tiny.yaml"}
    assert not (folder / "config.yaml").exists()


def test_callbacks_of_the_user_work_beside_ours(folder, command):
    (folder / "callbacks.yaml").write_text(
        """
        trainer:
          max_steps: 100
          callbacks:
            - {class_path: EarlyStopping, init_args: {monitor: val_loss, patience: 1, min_delta: 9.0}}
            - {class_path: ModelCheckpoint, init_args: {dirpath: mine, monitor: train_loss}}
            - {class_path: TQDMProgressBar}
            - {class_path: LearningRateMonitor}
        """
    )
    result = command(folder, "fit", "--config=tiny.yaml", "--config=callbacks.yaml")
    assert result.status == 0, result.err
    assert read(folder / RUN / "checkpoints/last.ckpt")["global_step"] == 8
    assert len(list(folder.glob("mine/*.ckpt"))) == 1


def test_two_runs_that_start_together_take_two_folders(tmp_path, monkeypatch):
    assert [new_run(tmp_path).name for _ in range(2)] == ["version_0", "version_1"]
    monkeypatch.setattr(Path, "glob", lambda *_: [])  # the other has not made its own yet
    assert new_run(tmp_path).name == "version_2"


# ---- what a run says ----


def test_the_summary_says_what_is_trained_on_what(folder, command):
    result = command(folder, "fit", "--config=tiny.yaml", "--trainer.fast_dev_run=true")
    characters = len(set((folder / "text.txt").read_text()))
    embeddings = characters * 8 + 8 * 8
    block = 8 * 24 + (8 * 8 + 8) + (8 * 32 + 32) + (32 * 8 + 8) + 2 * 16
    parameters = embeddings + block + 16 + (8 * characters + characters)
    assert f"model    {parameters:,} parameters" in result.err
    assert (
        f"2,000 characters, {characters} different; 1,600 to train, 200 to validate" in result.err
    )
    assert "device   cpu, precision 32-true" in result.err


def test_a_step_of_several_batches_says_so(folder, command):
    flags = ("--trainer.fast_dev_run=true", "--trainer.accumulate_grad_batches=2")
    assert "keep this product of 8" in command(folder, "fit", "--config=tiny.yaml", *flags).err
    assert "keep this product" not in command(folder, "fit", "--config=tiny.yaml", flags[0]).err


def test_a_long_run_without_a_gpu_is_announced(folder, command, monkeypatch):
    args = ["fit", "--config=tiny.yaml", "--trainer.enable_checkpointing=false"]
    assert "--config cpu" not in command(folder, *args).err
    monkeypatch.setattr(callbacks, "LONG_RUN_S", 0)
    result = command(folder, *args)
    assert "hours on this machine" in result.err
    assert "--config cpu" in result.err


def test_bf16_on_a_processor_without_it_is_a_warning(folder, command, monkeypatch):
    args = [
        "fit",
        "--config=tiny.yaml",
        "--trainer.precision=bf16-mixed",
        "--trainer.fast_dev_run=true",
    ]
    for slowdown, warned in ((1.0, False), (50.0, True)):
        monkeypatch.setattr(callbacks, "slowdown_of_bf16", lambda: slowdown)
        result = command(folder, *args)
        assert result.status == 0
        assert ("warning: bf16 will crawl" in result.err) == warned


def test_a_fallback_is_announced_and_recorded(folder, command):
    args = ["--data.corpus=tiny-shakespeare", "--data.data_dir=data", "--trainer.max_steps=1"]
    result = command(folder, "fit", "--config=tiny.yaml", *args)
    assert (result.status, "Traceback" in result.err) == (1, False)
    assert "can't be downloaded" in result.err
    assert names(folder) == {"text.txt", "tiny.yaml"}

    args += ["--data.fallback_corpus=python-reference", "--trainer.limit_val_batches=0"]
    result = command(folder, "fit", "--config=tiny.yaml", *args)
    assert result.status == 0
    assert "warning:" in result.err
    assert "THE TEXT USED IN ITS PLACE IS python-reference" in result.err
    recorded = read(folder / RUN / "checkpoints/last.ckpt")["datamodule_hyper_parameters"]
    assert recorded["corpus_name"] == "python-reference"
    assert Path(recorded["corpus"]).is_absolute()


def test_warnings_of_libraries_stay_silent(trained, command, monkeypatch):
    def noisy(*args):
        warnings.warn_explicit(
            "of a library", UserWarning, "/home/me/chargpt/.venv/lightning/loop.py", 1
        )
        warnings.warn_explicit(
            "of ours", UserWarning, str(Path(chargpt.__file__).parent / "data.py"), 1
        )
        return [""]

    monkeypatch.setattr("chargpt.cli.predict.read_prompts", noisy)
    lines = command(trained, "predict").err.splitlines()
    assert lines[1:] == ["warning: of ours"]


def test_importing_and_loading_need_no_lightning():
    code = (
        "import sys, chargpt; assert 'torch' not in sys.modules; chargpt.load; chargpt.Vocabulary; chargpt.GPT; "
        "assert 'lightning' not in sys.modules; assert {'load', 'GPT', 'CharDataModule'} <= set(dir(chargpt))"
    )
    root = Path(chargpt.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
    with pytest.raises(AttributeError, match="GTP"):
        chargpt.GTP


# ---- bad input: a plain line or two, a status that is not zero, and nothing half-written ----

CONFIGS = {
    "list.yaml": "- 1\n",
    "empty.yaml": "",
    "broken.yaml": "trainer: {max_steps: 5\n",
    "latin.yaml": b"data: {corpus: caf\xe9}\n",
    "misspelt.yaml": "trainer: {max_step: 5}\n",
    "group.yaml": "modle: {n_embd: 8}\n",
    "word.yaml": "trainer: 5\n",
    "null.yaml": "model: {n_embd: null}\n",
    "type.yaml": "model: {n_embd: many}\n",
    "linked.yaml": "model: {block_size: 8}\n",
    "nested.yaml": "fit: {model: {n_embd: 8}}\n",
    "code.yaml": "model: {n_embd: !!python/object/apply:os.mkdir [pwned]}\n",
    "class.yaml": "trainer: {callbacks: [{class_path: os.mkdir, init_args: {path: pwned}}]}\n",
    "callback.yaml": "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {moniter: val_loss}}]}\n",
    "bomb.yaml": "a: &a [1, 1]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijklmnopq", "bcdefghijklmnopqr")),
    "endless.yaml": "trainer: &a {callbacks: *a}\n",
    "deeper.yaml": "- " * 5000 + "x\n",
    "tag.yaml": "a: !!bool x\n",
    "deep.yaml": "model: " + "[" * 1000 + "]" * 1000 + "\n",
}  # fmt: skip


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        # the command
        ([], 2, "a command is missing"),
        (["fitt"], 2, "did you mean fit?"),
        (["--verbose"], 2, "the command comes first"),
        (["--config=tiny.yaml", "fit"], 2, "the command comes first"),
        # flags
        (["fit", "--model.n_emb=3"], 2, "did you mean --model.n_embd?"),
        (["fit", "--lr=3"], 2, "did you mean --model.lr?"),
        (["predict", "--generate.promt=x"], 2, "did you mean --generate.prompt?"),
        (["predict", "--generate.length=9"], 2, "--help after the command explains"),
        (["fit", "--learning_rate=3"], 2, "--help after the command explains"),
        (["fit", "--data.block_size", "abc"], 2, '"data.block_size": Expected a int. Got value: abc'),
        (["fit", "--data.block_size"], 2, "--data.block_size: expected one argument"),
        (["fit", "--model.position=up"], 2, "Literal['learned', 'rotary']. Got value: up"),
        (["predict", "--generate.top_k=1.5"], 2, '"generate.top_k": Expected a int. Got value: 1.5'),
        (["predict", "--generate.format=xml"], 2, "Literal['text', 'jsonl']. Got value: xml"),
        (["fit", "--model.n_embd=null"], 2, "Expected a int. Got value: None"),
        (["fit", "--model.block_size=3"], 2, "must be given via \"data.block_size\""),
        (["fit", "word"], 2, "unrecognized arguments: word"),
        (["fit", "--config"], 2, "--config needs the name of a file"),
        # configurations
        (["fit", "--config=none.yaml"], 2, "none.yaml: there is no such configuration file"),
        (["fit", "--config=."], 2, "is a folder"),
        (["fit", "--config=a\0b"], 2, "cannot be read"),
        (["fit", "--config=list.yaml"], 2, "list.yaml: holds no settings"),
        (["fit", "--config=empty.yaml"], 2, "empty.yaml: holds no settings"),
        (["fit", "--config=broken.yaml"], 2, "line 2"),
        (["fit", "--config=latin.yaml"], 2, "latin.yaml: is not UTF-8 text"),
        (["fit", "--config=misspelt.yaml"], 2, "did you mean trainer.max_steps?"),
        (["fit", "--config=group.yaml"], 2, "did you mean model.n_embd?"),
        (["fit", "--config=word.yaml"], 2, "word.yaml: trainer is 5"),
        (["fit", "--config=null.yaml"], 1, "n_embd is None; it must be int"),
        (["fit", "--config=type.yaml"], 2, 'type.yaml: Parser key "model.n_embd": Expected a int. Got value: many'),
        (["fit", "--config=linked.yaml"], 2, "linked.yaml: model.block_size cannot be set"),
        (["fit", "--config=nested.yaml"], 2, "nested.yaml: there is no option fit.model.n_embd"),
        (["fit", "--config=code.yaml"], 2, "could not determine a constructor"),
        (["fit", "--config=class.yaml"], 2, "Importing 'os.mkdir' is not allowed"),
        (["fit", "--config=callback.yaml"], 2, "Option 'moniter' is not accepted"),
        (["fit", "--config=bomb.yaml"], 2, "bomb.yaml: has aliases"),
        (["fit", "--config=endless.yaml"], 2, "endless.yaml: has aliases"),
        (["fit", "--config=tag.yaml"], 2, "tag.yaml: holds a value that cannot be read"),
        (["fit", "--config=deep.yaml"], 2, "nested too deeply"),
        (["predict", "--config=deep.yaml"], 2, "nested too deeply"),
        (["predict", "-c", "endless.yaml"], 2, "endless.yaml: has aliases"),
        (["fit", "--config=deeper.yaml"], 2, "nested too deeply"),
        # the text
        (["--data.corpus=none.txt"], 1, "there is no text 'none.txt'"),
        (["--data.corpus=empty.txt"], 1, "holds no text"),
        (["--data.corpus=one.txt"], 1, "two different characters"),
        (["--data.corpus=binary.txt"], 1, "binary.txt"),
        (["--data.corpus=nothing"], 1, "no .txt file"),
        (["--data.block_size=2000"], 1, "1,600 characters to train on"),
        (["--data.val_fraction=0.0001"], 1, "to validate on"),
        (["--data.test_fraction=0.0001"], 1, "to test on"),
        (["--data.val_fraction=0.95"], 1, "must not be negative"),
        (["--data.val_fraction=nan"], 2, '"data.val_fraction": Expected a float. Got value: nan'),
        # sizes
        (["--model.n_embd=7"], 1, "not divisible by n_head"),
        (["--model.n_embd=0"], 1, "n_embd"),
        (["--model.n_head=0"], 1, "n_head"),
        (["--model.n_layer=-1"], 1, "n_layer"),
        (["--data.block_size=0"], 1, "block_size is 0"),
        (["--data.batch_size=-1"], 1, "batch_size is -1"),
        (["--data.batch_size=100000000000"], 1, "allocate"),
        (["--model.dropout=1"], 1, "dropout is 1.0"),
        (["--model.dropout=-0.1"], 1, "dropout is -0.1"),
        (["--model.lr=0"], 1, "lr is 0.0"),
        (["--seed_everything=-1"], 1, "-1 is not in bounds"),
        # the trainer
        (["--trainer.accelerator=banana"], 1, "banana"),
        (["--trainer.devices=0"], 1, "devices"),
        (["--trainer.max_time=abc"], 1, "duration"),
        (["--trainer.max_steps=0"], 1, "trainer.max_steps is 0; it must be at least 1"),
        (["--trainer.val_check_interval=0"], 1, "trainer.val_check_interval is 0"),
        (["--trainer.max_epochs=1"], 1, "sequences are read without end"),
        (["--trainer.accumulate_grad_batches=0"], 1, "trainer.accumulate_grad_batches is 0"),
        # runs that are not there
        (["predict"], 1, "no run with a checkpoint"),
        (["validate"], 1, "no run with a checkpoint"),
        (["test", "--ckpt_path=best"], 1, "no run with a checkpoint"),
        (["fit", "--ckpt_path=last"], 1, "no run with a checkpoint"),
        (["predict", "--ckpt_path=none.ckpt"], 1, "no checkpoint at"),
    ],
)  # fmt: skip
def test_bad_input_is_a_plain_line(folder, command, args, status, words):
    for name, content in CONFIGS.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "empty.txt").write_text("")
    (folder / "one.txt").write_text("aaaa")
    (folder / "binary.txt").write_bytes(b"\x89PNG\r\n\x1a\n\0\xff")
    (folder / "nothing").mkdir()
    before = names(folder)
    if args and args[0].startswith(("--data", "--model", "--seed", "--trainer")):
        args = ["fit", "--config=tiny.yaml", *args]
    assert_plain(command(folder, *args), status, words)
    assert names(folder) == before


def assert_plain(result, status: int, words: str) -> None:
    lines = [
        line
        for line in result.err.splitlines()
        if not line.startswith(("checkpoint ", "warning: "))
    ]
    assert (result.status, result.out) == (status, ""), result.err
    assert words in result.err
    assert lines[0].startswith("error: ")
    assert len(lines) <= 2


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["fit", "validate", "predict"])
@pytest.mark.parametrize(
    "kind", ["empty", "text", "truncated", "foreign", "vocabulary", "code", "folder"]
)
def test_a_bad_checkpoint_is_refused(trained, folder, command, name, kind):
    path, pwned = folder / "bad.ckpt", folder / "pwned"
    whole = (trained / RUN / "checkpoints/last.ckpt").read_bytes()
    if kind == "folder":
        path.mkdir()
    elif kind == "foreign":
        torch.save({"state_dict": {"w": torch.zeros(2)}, "epoch": 1}, path)
    elif kind == "vocabulary":
        torch.save({**read(trained / RUN / "checkpoints/last.ckpt"), "vocabulary": None}, path)
    elif kind == "code":
        torch.save({**read(trained / RUN / "checkpoints/last.ckpt"), "x": Touch(pwned)}, path)
    else:
        path.write_bytes(
            {"empty": b"", "text": b"not a checkpoint", "truncated": whole[: len(whole) // 2]}[kind]
        )
    before = names(folder)
    assert_plain(command(folder, name, "--ckpt_path=bad.ckpt"), 1, "checkpoint")
    assert not pwned.exists()
    assert names(folder) == before
    if kind == "code":  # it would have run: a plain unpickling does it
        pickle.loads(pickle.dumps(Touch(pwned)))
        assert pwned.exists()


def test_an_unknown_character_in_a_prompt_is_named(trained, command):
    result = command(trained, "predict", "--generate.prompt=Café")
    assert_plain(result, 1, "'é' (U+00E9)")


def test_a_text_with_other_characters_is_refused_on_going_on(run, command):
    (run / "other.txt").write_text("Quite another text! " * 100)
    before = names(run)
    result = command(
        run, "fit", "--ckpt_path=last", "--trainer.max_steps=9", "--data.corpus=other.txt"
    )
    assert (result.status, "Traceback" in result.err) == (1, False)
    assert "are not those of this text" in result.err
    assert read(run / RUN / "checkpoints/last.ckpt")["global_step"] == 8
    assert {name for name in names(run) - before if "ckpt" in name} == set()


@pytest.mark.parametrize("name", ["fit", "validate"])
def test_a_text_that_changed_is_refused_unless_it_is_named(run, command, name):
    checkpoint = run / RUN / "checkpoints/last.ckpt"
    text = Path(read(checkpoint)["datamodule_hyper_parameters"]["corpus"])
    original = text.read_text()
    args = [
        name,
        f"--ckpt_path={checkpoint}",
        *(["--trainer.max_steps=9"] if name == "fit" else []),
    ]
    try:
        text.write_text(original[::-1])
        result = command(run, *args)
        assert (result.status, "Traceback" in result.err) == (1, False)
        assert "has changed since the checkpoint was trained on it" in result.err
        assert command(run, *args, f"--data.corpus={text}").status == 0
    finally:
        text.write_text(original)


CLOSED = [  # what the shell closes, the command, its status, and what it says
    (">&-", "predict", 1, "standard output is closed"),
    (">&-", "validate", 1, "standard output is closed"),
    ("<&-", "predict --generate.prompt -", 1, "standard input is closed"),
    ("2>&-", "predict --generate.max_new_chars 3", 0, ""),
    (
        ">/dev/full",
        "predict --generate.max_new_chars 3",
        1,
        "cannot write to standard output: No space",
    ),
    (
        "",
        "predict --generate.max_new_chars 3 --generate.output /dev/full",
        1,
        "cannot write /dev/full",
    ),
]


@pytest.mark.skipif(sys.platform != "linux", reason="a shell, and a device that is full")
@pytest.mark.parametrize("redirection, args, status, words", CLOSED)
def test_closed_and_full_streams(trained, redirection, args, status, words):
    environment = {**os.environ, "PYTHONPATH": str(Path(chargpt.__file__).parents[1])}
    result = subprocess.run(
        f"{sys.executable} -m chargpt {args} {redirection}",
        shell=True, cwd=trained, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert (result.returncode, "Traceback" in result.stderr) == (status, False), result.stderr
    assert words in result.stderr
    assert "checkpoint" not in result.stdout


def test_a_test_without_a_test_split_says_how_to_get_one(run, command):
    assert_plain(command(run, "test", "--data.test_fraction=0"), 1, "there is no test split")


def test_a_loss_that_diverges_stops_the_run_and_keeps_the_last_good_checkpoint(folder, command):
    args = ["fit", "--config=tiny.yaml", "--trainer.max_steps=8"]
    assert command(folder, *args).status == 0
    result = command(
        folder, *args[:2], "--ckpt_path=last", "--trainer.max_steps=20", "--model.lr=1e38"
    )
    assert result.status == 1
    assert "Traceback" not in result.err
    assert "step 10" in result.err.splitlines()[-2]
    assert result.err.splitlines()[-2].startswith("error: training loss is")
    assert read(folder / RUN / "checkpoints/last.ckpt")["global_step"] == 8


def test_a_run_that_fails_before_its_first_step_leaves_no_folder(trained, folder, command):
    (folder / "other.txt").write_text("Quite another text! " * 100)
    checkpoint = trained / RUN / "checkpoints/last.ckpt"
    result = command(
        folder,
        "fit",
        f"--ckpt_path={checkpoint}",
        "--trainer.max_steps=9",
        "--data.corpus=other.txt",
    )
    assert result.status == 1
    assert not (folder / "lightning_logs").exists()


def test_a_vocabulary_in_the_checkpoint_is_the_one_that_predict_uses(run, command):
    (best,) = (run / RUN / "checkpoints").glob("*val_loss*")
    checkpoint = read(best)
    swapped = "".join(sorted(checkpoint["vocabulary"].replace("k", "é")))
    torch.save({**checkpoint, "vocabulary": swapped}, best)
    assert len(Vocabulary(swapped)) == len(checkpoint["vocabulary"])
    assert command(run, "predict", "--generate.prompt=é", "--generate.max_new_chars=1").status == 0
    assert_plain(command(run, "predict", "--generate.prompt=k"), 1, "'k' (U+006B)")
