"""Whole commands: their files and output, the order of settings, messages for wrong input."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import chargpt.__main__
from chargpt.cli.main import COMMANDS
from chargpt.cli.train import TrainingCLI

TRAINING = ["fit", "validate", "test"]
RUN = Path("lightning_logs", "version_0")
LAST = RUN / "checkpoints" / "last.ckpt"
BEST = RUN / "checkpoints" / "best.ckpt"
RESUME = ["fit", "--ckpt_path=last"]
OWN = """
from lightning import Callback

class Counter(Callback):
    count = 0

    def on_train_batch_end(self, *_):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}
"""
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(chargpt.__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the trained folder, which the test may change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def parsed(monkeypatch):
    """The settings that result from the arguments of a command."""
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


def assert_plain(result, status: int, words: str) -> None:
    """Standard error has one or two lines, in addition to the checkpoint's name and warnings."""
    lines = result.err.splitlines()
    lines = [line for line in lines if not line.startswith(("checkpoint ", "warning: "))]
    assert (result.status, result.out) == (status, ""), result.err
    assert words in result.err
    assert lines[0].startswith("error: ")
    assert len(lines) <= 2


# ---- whole commands ----


def test_a_run_leaves_its_best_and_last_checkpoint_and_its_settings(trained):
    assert names(trained / RUN / "checkpoints") == {"best.ckpt", "last.ckpt"}
    assert read(trained / LAST)["global_step"] == 8
    config = yaml.safe_load((trained / RUN / "config.yaml").read_text())
    assert config["model"]["n_embd"] == 8
    assert config["data"]["block_size"] == 8


def test_tensorboard_gets_scalars_and_samples(trained):
    found = events(trained / RUN)
    tags = found.Tags()
    scalars = {"train_loss", "val_loss", "val_bpc", "lr", "chars_per_second"}
    assert scalars <= set(tags["scalars"])
    assert {"sample/text_summary"} <= set(tags["tensors"])
    assert [sample.step for sample in found.Tensors("sample/text_summary")] == [4, 8]
    assert [point.step for point in found.Scalars("val_loss")] == [3, 7]  # Lightning counts from 0


def test_validate_prints_the_loss_in_full_and_leaves_nothing_behind(trained, command):
    before = names(trained)
    result = command(trained, "validate")
    lines = dict(line.split() for line in result.out.splitlines())
    assert (result.status, list(lines)) == (0, ["val_loss", "val_bpc"])
    assert str(BEST) in result.err
    saved = read(trained / BEST)["chargpt"]["val_loss"]
    assert float(lines["val_loss"]) == pytest.approx(saved, rel=1e-12)
    assert len(lines["val_loss"]) > 12
    assert names(trained) == before


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
    assert "best.ckpt" in result.err
    assert command(trained, "predict", *args).out == result.out


def test_predict_takes_prompts_and_stop_strings_and_writes_json_lines(run, command, monkeypatch):
    (run / "prompts.txt").write_text("The king\n\nof\n")
    flags = ("max_new_chars=30", r'stop=["e", "\n\n"]', "num_samples=2")
    flags += ("prompts=prompts.txt", "output=texts.jsonl", "format=jsonl")
    result = command(run, "predict", *(f"--generate.{flag}" for flag in flags))
    assert (result.status, result.out) == (0, "")
    monkeypatch.chdir(run)
    settings = dict(max_new_chars=30, stop=["e", "\n\n"])
    texts = chargpt.load().complete_all(["The king", "", "of"], num_samples=2, **settings)
    lines = (run / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == sum(texts, [])
    assert json.loads(lines[0])["settings"]["stop"] == ["e", "\n\n"]


def test_an_interrupted_predict_ends_with_130(trained, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(trained)
    monkeypatch.setattr("chargpt.cli.predict.read_prompts", interrupted)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # Ctrl-C must still end these tests
    monkeypatch.setattr(sys, "argv", ["chargpt", "predict"])
    with pytest.raises(SystemExit, match="130"):
        chargpt.__main__.main()
    assert capsys.readouterr().out == ""


def test_predict_and_validate_need_neither_the_folder_nor_a_configuration(
    trained, command, tmp_path
):
    checkpoint = f"--ckpt_path={trained / LAST}"
    assert command(tmp_path, "predict", checkpoint, "--generate.max_new_chars=5").status == 0
    assert command(tmp_path, "validate", checkpoint).out.startswith("val_loss")


def test_fit_resumes_in_the_same_folder_as_if_it_had_never_stopped(run, folder, command):
    result = command(run, *RESUME, "--trainer.max_steps=12")
    assert result.status == 0, result.err
    assert "resumed  after step 8" in result.err
    assert os.listdir(run / "lightning_logs") == ["version_0"]
    assert read(run / LAST)["global_step"] == 12
    assert [point.step for point in events(run / RUN).Scalars("val_loss")] == [3, 7, 11]
    assert command(folder, "fit", "--config=tiny.yaml", "--trainer.max_steps=12").status == 0
    resumed, whole = (read(at / LAST)["state_dict"] for at in (run, folder))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_resuming_a_complete_run_says_that_there_is_nothing_to_do(run, command):
    result = command(run, *RESUME)
    assert (result.status, result.err.splitlines()) == (
        0,
        [
            "nothing to do: step 8 is the last within trainer.max_steps or max_time",
            "increase the limit to train for longer",
        ],
    )


def test_resuming_when_the_time_is_over_says_that_there_is_nothing_to_do(run, command):
    limits = ["--trainer.max_time={seconds: 1000}", "--trainer.max_steps=9"]
    assert command(run, *RESUME, *limits).status == 0
    timer = read(run / LAST)["callbacks"]["Timer"]["time_elapsed"]
    assert timer["train"] < 1000
    checkpoint = read(run / LAST)
    checkpoint["callbacks"]["Timer"]["time_elapsed"]["train"] = 1000.0
    torch.save(checkpoint, run / LAST)
    result = command(run, *RESUME, "--trainer.max_steps=12")
    assert (result.status, "nothing to do: step 9 is the last" in result.err) == (0, True)


def test_the_config_of_a_resumed_run_starts_a_new_run(run, command):
    assert command(run, *RESUME, "--trainer.max_steps=10").status == 0
    flags = (f"--config={RUN / 'config.yaml'}", "--trainer.max_steps=2")
    assert command(run, "fit", *flags).status == 0
    assert read(run / "lightning_logs/version_1/checkpoints/last.ckpt")["global_step"] == 2


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_ctrl_c_under_python_m_saves_a_checkpoint(folder):
    """test_faults.py tries all signals in forks; this process has the handler of __main__.py.

    And it finds a class of the user in the current folder.
    """
    (folder / "own.py").write_text(OWN)
    args = [sys.executable, "-m", "chargpt", "fit", "--config=tiny.yaml"]
    args += ["--trainer.callbacks+=own.Counter"]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [*args, "--trainer.max_steps=1000000"],
            cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=log,
        )  # fmt: skip
        deadline = time.monotonic() + 180
        while not (folder / LAST).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=180)
    err = (folder / "log").read_text()
    assert (process.returncode, out) == (130, b""), err
    assert "Traceback" not in err
    assert "repeat the command with --ckpt_path last" in err
    checkpoint = read(folder / LAST)
    assert f"stopped after step {checkpoint['global_step']}" in err
    assert checkpoint["callbacks"]["Counter"] == {"count": checkpoint["global_step"]}


# ---- settings ----


@pytest.mark.parametrize("config", [["--config", "a.yaml"], ["--config=a.yaml"], ["-c", "a.yaml"]])
def test_flags_override_configuration_files_in_any_order(folder, parsed, config):
    (folder / "a.yaml").write_text("model: {n_embd: 16, n_head: 4}")
    flags = ["--model.n_embd=32"]
    for args in ([*config, *flags], [*flags, *config]):
        model = parsed(folder, "fit", "--config=tiny.yaml", *args).model
        assert (model.n_embd, model.n_head, model.n_layer) == (32, 4, 1)


def test_flags_override_files_and_files_override_the_checkpoint(run, parsed, capsys):
    (run / "other.yaml").write_text(
        "trainer: {max_steps: 20, log_every_n_steps: 3}\nmodel: {dropout: 0.5, lr: 1.0}\n"
    )
    config = parsed(run, "fit", "--model.lr=0.1", "--ckpt_path=last", "--config=other.yaml")
    assert (config.model.lr, config.model.dropout, config.seed_everything) == (0.1, 0.5, 7)
    assert (config.trainer.max_steps, config.trainer.log_every_n_steps) == (20, 3)
    assert config.trainer.val_check_interval == 4  # the checkpoint's
    assert Path(config.data.corpus).is_absolute()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("changed ") and "model.lr 0.003 -> 0.1" in line


def test_validate_takes_the_settings_of_the_checkpoint(trained, parsed):
    config = parsed(trained, "validate")
    assert (config.model.n_embd, config.data.block_size, config.data.test_fraction) == (8, 8, 0.1)
    assert parsed(trained, "validate", "--data.batch_size=9").data.batch_size == 9


@pytest.fixture(scope="module")
def resumed(trained, tmp_path_factory, command) -> dict:
    """The last checkpoint of the run, resumed for two steps without other settings."""
    folder = Path(shutil.copytree(trained, tmp_path_factory.mktemp("resumed") / "run"))
    assert command(folder, *RESUME, "--trainer.max_steps=10").status == 0
    return read(folder / LAST)


@pytest.mark.parametrize(
    "setting", ["model.lr=0.5", "model.dropout=0.4", "data.batch_size=2", "seed_everything=8"]
)
def test_flags_take_effect_when_a_run_is_resumed(run, resumed, command, setting):
    assert command(run, *RESUME, "--trainer.max_steps=10", f"--{setting}").status == 0
    changed = read(run / LAST)
    weights = changed["state_dict"]
    assert any(not torch.equal(w, resumed["state_dict"][name]) for name, w in weights.items())
    name = setting.split("=")[0].split(".")[-1].replace("seed_everything", "seed")
    saved = {**changed["hyper_parameters"], **changed["datamodule_hyper_parameters"]}
    assert saved[name] == ast.literal_eval(setting.split("=")[1])


@pytest.mark.parametrize("setting", ["n_embd=16", "n_head=1", "n_layer=2", "second_target=0.5"])
@pytest.mark.parametrize("name", ["fit", "validate"])
def test_another_network_is_refused_by_name(trained, command, name, setting):
    more = ["--trainer.max_steps=20"] if name == "fit" else []
    result = command(trained, name, "--ckpt_path=last", *more, f"--model.{setting}")
    assert_plain(result, 1, f"error: {setting.partition('=')[0]} is")
    assert "in the checkpoint and cannot be changed to" in result.err


def test_another_block_size_is_refused(trained, command):
    result = command(trained, *RESUME, "--trainer.max_steps=20", "--data.block_size=16")
    assert_plain(result, 1, "block_size is 8 in the checkpoint and cannot be changed to 16")


def test_evaluating_a_run_with_a_time_limit_prints_no_warning(folder, command):
    limit = ["--trainer.max_time=00:01:00:00", "--trainer.max_steps=2"]  # a callback with a state
    assert command(folder, "fit", "--config=tiny.yaml", *limit).status == 0
    result = command(folder, "validate")
    assert (result.status, "warning" in result.err) == (0, False), result.err


def test_another_block_size_is_possible_with_rotary_positions(folder, command):
    first = ["--config=tiny.yaml", "--model.position=rotary", "--trainer.max_steps=2"]
    assert command(folder, "fit", *first).status == 0
    result = command(folder, *RESUME, "--trainer.max_steps=4", "--data.block_size=16")
    assert result.status == 0, result.err
    assert "data.block_size 8 -> 16" in result.err
    assert read(folder / LAST)["hyper_parameters"]["block_size"] == 16


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


# ---- features of Lightning ----


@pytest.mark.parametrize(
    ("flag", "kept"),
    [
        ("fast_dev_run=true", None),
        ("limit_val_batches=0", LAST),
        ("overfit_batches=1", LAST),
        ("enable_progress_bar=false", LAST),
        ("logger=false", LAST),
        ("enable_checkpointing=false", RUN),
        ("default_root_dir=sub", "sub" / LAST),
        ("accumulate_grad_batches=2", LAST),
    ],
)
def test_flags_of_the_trainer_work(folder, command, flag, kept):
    flags = ("--trainer.max_steps=4", f"--trainer.{flag}")
    result = command(folder, "fit", "--config=tiny.yaml", *flags)
    assert result.status == 0, result.err
    assert "Traceback" not in result.err
    if kept:
        assert (folder / kept).exists()
    else:
        assert names(folder) == {"text.txt", "tiny.yaml"}
    assert not (folder / "config.yaml").exists()
    assert bool([*folder.rglob("*.ckpt")]) == (kept not in (None, RUN))
    assert bool([*folder.rglob("events*")]) == (kept is not None and flag != "logger=false")


# ---- messages of a run ----


def test_the_summary_names_model_text_and_device(folder, command):
    args = ["--trainer.fast_dev_run=true", "--model.second_target=0.5"]  # whose head isn't counted
    result = command(folder, "fit", "--config=tiny.yaml", *args)
    characters = len(set((folder / "text.txt").read_text()))
    embeddings = characters * 8 + 8 * 8
    block = 8 * 24 + (8 * 8 + 8) + (8 * 32 + 32) + (32 * 8 + 8) + 2 * 16
    parameters = embeddings + block + 16 + (8 * characters + characters)
    assert f"model    {parameters:,} parameters" in result.err
    counts = "1,600 for training, 200 for validation"
    assert f"2,000 characters, {characters} distinct\n         {counts}\n" in result.err
    assert "batch    4 sequences of 8 characters\n" in result.err
    assert "device   cpu, precision 32-true" in result.err


def test_a_fallback_is_announced_and_recorded(folder, command):
    args = ["--data.corpus=tiny-shakespeare", "--data.data_dir=data", "--trainer.max_steps=1"]
    result = command(folder, "fit", "--config=tiny.yaml", *args)
    assert (result.status, "Traceback" in result.err) == (1, False)
    assert "error: cannot download" in result.err
    assert names(folder) == {"text.txt", "tiny.yaml"}

    args += ["--data.fallback_corpus=python-reference", "--trainer.limit_val_batches=0"]
    result = command(folder, "fit", "--config=tiny.yaml", *args)
    assert result.status == 0
    assert "warning:" in result.err
    assert "python-reference" in result.err
    recorded = read(folder / LAST)["datamodule_hyper_parameters"]
    assert recorded["corpus_name"] == "python-reference"
    assert Path(recorded["corpus"]).is_absolute()


def test_misspelled_names_of_the_package_raise():
    assert {"load", "GPT", "CharDataModule"} <= set(dir(chargpt))
    with pytest.raises(AttributeError, match="GTP"):
        chargpt.GTP


# ---- invalid input: one or two plain lines, a nonzero status, no partial files ----

CONFIGS = {
    "list.yaml": "- 1\n",
    "empty.yaml": "",
    "broken.yaml": "trainer: {max_steps: 5\n",
    "latin.yaml": b"data: {corpus: caf\xe9}\n",
    "misspelled.yaml": "trainer: {max_step: 5}\n",
    "group.yaml": "modle: {n_embd: 8}\n",
    "word.yaml": "trainer: 5\n",
    "number.yaml": "model: 5\n",
    "generate.yaml": "generate: 5\n",
    "null.yaml": "model: {n_embd: null}\n",
    "type.yaml": "model: {n_embd: many}\n",
    "linked.yaml": "model: {block_size: 8}\n",
    "nested.yaml": "fit: {model: {n_embd: 8}}\n",
    "deep.yaml": "model: {ngrams: " + 5000 * "[" + 5000 * "]" + "}\n",
    "loop.yaml": "a: &a [*a]\n",
    "code.yaml": "model: {n_embd: !!python/object/apply:os.mkdir [pwned]}\n",
    "class.yaml": "trainer: {callbacks: [{class_path: os.mkdir, init_args: {path: pwned}}]}\n",
    "callback.yaml": "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {moniter: val_loss}}]}\n",
}  # fmt: skip


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        # the command
        ([], 2, "the command comes first"),
        (["fitt"], 2, "did you mean fit?"),
        (["--verbose"], 2, "the command comes first"),
        (["--config=tiny.yaml", "fit"], 2, "the command comes first"),
        # flags
        (["fit", "--model.n_emb=3"], 2, "did you mean --model.n_embd?"),
        (["predict", "--generate.promt=x"], 2, "did you mean --generate.prompt?"),
        (["predict", "--generate.length=9"], 2, "--help after the command lists"),
        (["fit", "--learning_rate=3"], 2, "--help after the command lists"),
        (["predict", "--model.n_layer=3"], 2, "there is no option --model.n_layer"),
        (["fit", "--data.block_size", "abc"], 2, "--data.block_size: abc is not a whole number"),
        (["predict", "--generate.top_k=1.5"], 2, "--generate.top_k: 1.5 is not a whole number"),
        (["fit", "--model.n_embd=null"], 2, "--model.n_embd: None is not a whole number"),
        (["fit", "--model.block_size=3"], 2, "must be given via \"data.block_size\""),
        (["fit", "word"], 2, "unrecognized arguments: word"),
        (["fit", "--config"], 2, "shipped configurations: "),
        # configurations
        (["fit", "--config=none.yaml"], 2, "none.yaml: No such file"),
        (["fit", "--config=."], 2, "Is a directory"),
        (["fit", "--config=a\0b"], 2, "null byte"),
        (["fit", "--config=list.yaml"], 2, "Unexpected config"),
        (["fit", "--config=empty.yaml"], 2, "Unexpected config"),
        (["fit", "--config=broken.yaml"], 2, "line 2"),
        (["fit", "--config=latin.yaml"], 2, "latin.yaml: 'utf-8'"),
        (["fit", "--config=misspelled.yaml"], 2, "did you mean trainer.max_steps?"),
        (["fit", "--config=group.yaml"], 2, "did you mean model.n_embd?"),
        (["fit", "--config=word.yaml"], 2, "trainer is 5"),
        (["fit", "--config=number.yaml"], 2, "model is 5"),
        (["predict", "--config=generate.yaml"], 2, "generate is 5"),
        (["fit", "--config=null.yaml"], 1, "n_embd is None; it must be int"),
        (["fit", "--config=type.yaml"], 2, "--model.n_embd: many is not a whole number"),
        (["fit", "--config=linked.yaml"], 2, "model.block_size cannot be set"),
        (["fit", "--config=deep.yaml"], 2, "nesting depth"),
        (["fit", "--config=loop.yaml"], 2, "recursion"),
        (["fit", "--config=nested.yaml"], 2, "there is no option fit.model.n_embd"),
        (["fit", "--config=code.yaml"], 2, "could not determine a constructor"),
        (["fit", "--config=class.yaml"], 2, "os.mkdir does not correspond to a subclass of Callback"),
        (["fit", "--config=callback.yaml"], 2, "Option 'moniter' is not accepted"),
        # the text
        (["--data.corpus=none.txt"], 1, "there is no text 'none.txt'"),
        (["--data.corpus=empty.txt"], 1, "fewer than two different characters"),
        (["--data.corpus=one.txt"], 1, "two different characters"),
        (["--data.corpus=binary.txt"], 1, "binary.txt is not UTF-8 text: byte 0x89 at offset 0"),
        (["--data.corpus=nothing"], 1, "no .txt file"),
        (["--data.block_size=2000"], 1, "leaves 1,600"),
        (["--data.val_fraction=0.0001"], 1, "validation needs 2 characters"),
        (["--data.test_fraction=0.0001"], 1, "testing needs 2 characters"),
        (["--data.val_fraction=0.95"], 1, "it must be from 0 to 1 - val_fraction"),
        (["--data.val_fraction=nan"], 2, "--data.val_fraction: nan is not a number"),
        # sizes
        (["--model.n_embd=7"], 1, "not divisible by n_head"),
        (["--model.n_embd=0"], 1, "n_embd"),
        (["--model.n_head=0"], 1, "n_head"),
        (["--model.n_layer=-1"], 1, "n_layer"),
        (["--data.block_size=0"], 1, "block_size is 0"),
        (["--data.batch_size=-1"], 1, "batch_size is -1"),
        (["--data.batch_size=100000000000"], 1, "or --data.batch_size"),
        (["--model.dropout=1"], 1, "dropout is 1.0"),
        (["--model.dropout=-0.1"], 1, "dropout is -0.1"),
        (["--model.lr=0"], 1, "lr is 0.0"),
        (["--seed_everything=-1"], 1, "seed_everything is -1"),
        (["--seed_everything=true"], 2, "--seed_everything: True is not a whole number"),
        # the trainer
        (["--trainer.accelerator=banana"], 1, "banana"),
        (["--trainer.devices=0"], 1, "devices"),
        (["--trainer.max_time=abc"], 1, "max_time abc is not a duration"),
        (["--trainer.max_steps=0"], 1, "trainer.max_steps is 0; it must be positive"),
        (["--trainer.val_check_interval=0"], 1, "trainer.val_check_interval is 0"),
        (["--trainer.max_epochs=1"], 1, "set max_steps without max_epochs"),
        (["--trainer.accumulate_grad_batches=0"], 1, "trainer.accumulate_grad_batches is 0"),
        # missing runs
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


@pytest.mark.parametrize("name", ["fit", "validate"])
def test_a_text_that_changed_is_refused_unless_it_is_named(run, command, name):
    checkpoint = run / LAST
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
        assert "is not the text that the checkpoint records" in result.err
        status = command(run, *args, f"--data.corpus={text}").status
        assert status == (1 if name == "fit" else 0)  # training continues on the same text only
    finally:
        text.write_text(original)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a shell and /dev/full")
def test_standard_output_on_a_full_disk_is_a_plain_error(trained):
    result = subprocess.run(
        f"{sys.executable} -m chargpt predict --generate.max_new_chars 3 >/dev/full",
        shell=True, cwd=trained, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert (result.returncode, "Traceback" in result.stderr) == (1, False), result.stderr
    assert "cannot write to standard output: No space" in result.stderr


def test_a_test_without_a_test_split_says_how_to_get_one(run, command):
    assert_plain(command(run, "test", "--data.test_fraction=0"), 1, "there is no test split")


def test_predict_uses_the_vocabulary_in_the_checkpoint(run, command):
    checkpoint = read(run / BEST)
    swapped = "".join(sorted(checkpoint["vocabulary"].replace("k", "é")))
    torch.save({**checkpoint, "vocabulary": swapped}, run / BEST)
    assert command(run, "predict", "--generate.prompt=é", "--generate.max_new_chars=1").status == 0
    assert_plain(command(run, "predict", "--generate.prompt=k"), 1, "'k' (U+006B)")
