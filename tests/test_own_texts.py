"""Whole commands with a validation text, with another text to score, and with a run on another machine."""

import math
import shutil
from pathlib import Path

import pytest
import torch

import chargpt

LAST = Path("lightning_logs/version_0/checkpoints/last.ckpt")
FIT = ["fit", "--config=tiny.yaml", "--data.val_corpus=val.txt", "--data.test_fraction=0"]
VAL = "The king walks to the garden.\nThe queen speaks of the crown.\n"


@pytest.fixture
def folder(folder) -> Path:
    (folder / "val.txt").write_text(VAL)
    return folder


def read(folder: Path) -> dict:
    return torch.load(folder / LAST, weights_only=True)


def loss(result) -> float:
    assert result.status == 0, result.err
    return float(result.out.split()[1])


def assert_refused(result, *words: str) -> None:
    assert result.status == 1 and "Traceback" not in result.err, result.err
    for word in words:
        assert word in result.err


# ---- --data.val_corpus ----


def test_a_run_with_a_validation_text_trains_on_the_whole_corpus(folder, command):
    result = command(folder, *FIT)
    assert result.status == 0, result.err
    assert "2,000 for training, 61 for validation" in result.err
    model = chargpt.load(folder / LAST)
    checkpoint = read(folder)
    assert checkpoint["chargpt"]["val_loss"] == pytest.approx(model.score(VAL).nats, abs=1e-6)
    assert checkpoint["datamodule_hyper_parameters"]["train_characters"] == 2000
    (folder / "elsewhere").mkdir()
    validated = command(folder / "elsewhere", "validate", f"--ckpt_path={folder / LAST}")
    assert loss(validated) == pytest.approx(model.score(VAL).nats, abs=1e-6)


def test_it_resumes_as_if_it_had_never_stopped(folder, command):
    assert command(folder, *FIT, "--trainer.max_steps=12").status == 0
    whole = read(folder)
    shutil.rmtree(folder / "lightning_logs")
    assert command(folder, *FIT).status == 0
    assert command(folder, "fit", "--ckpt_path=last", "--trainer.max_steps=12").status == 0
    resumed = read(folder)
    for name, weight in whole["state_dict"].items():
        assert torch.equal(weight, resumed["state_dict"][name])
    assert whole["chargpt"]["val_loss"] == resumed["chargpt"]["val_loss"]


@pytest.mark.parametrize("name", ["fit", "validate"])
def test_a_validation_text_that_changed_is_refused(folder, command, name):
    assert command(folder, *FIT).status == 0
    (folder / "val.txt").write_text(VAL[::-1])
    more = ["--trainer.max_steps=12"] if name == "fit" else []
    assert_refused(command(folder, name, "--ckpt_path=last", *more), "val.txt is not the text")
    named = command(folder, name, "--ckpt_path=last", *more, "--data.val_corpus=val.txt")
    if name == "fit":  # scores would not be comparable
        assert_refused(named, "val.txt is not the text")
    else:
        model = chargpt.load(folder / LAST)
        assert loss(named) == pytest.approx(model.score(VAL[::-1]).nats, abs=1e-6)


def test_a_run_without_a_validation_text_is_not_resumed_with_one(folder, command):
    assert command(folder, "fit", "--config=tiny.yaml").status == 0
    resume = ["fit", "--ckpt_path=last", "--trainer.max_steps=12", "--data.val_corpus=val.txt"]
    assert_refused(command(folder, *resume), "val_corpus is None in the checkpoint")


def test_unknown_characters_in_it_are_an_error_and_leave_nothing(folder, command):
    (folder / "val.txt").write_text("The king züçk")
    assert_refused(command(folder, *FIT), "val.txt has characters", "'z', 'ç', 'ü'")
    assert not (folder / "lightning_logs").exists()


def test_a_validation_text_without_its_record_is_not_read(folder, command):
    """A checkpoint may be a stranger's."""
    assert command(folder, *FIT).status == 0
    checkpoint = read(folder)
    del checkpoint["datamodule_hyper_parameters"]["corpus_digest"]
    checkpoint["datamodule_hyper_parameters"]["corpus"] = "python-reference"
    torch.save(checkpoint, folder / LAST)
    result = command(folder, "validate", "--ckpt_path=last", "--data.data_dir=data")
    assert "val.txt" not in result.err and not list((folder / "data").rglob("val-*"))


# ---- scoring another text ----


def test_another_text_is_scored_as_a_whole(folder, command):
    assert command(folder, *FIT).status == 0
    text = "a king walks to the garden of the queen\n" * 3
    (folder / "other.txt").write_text(text)
    flags = ["--data.corpus=other.txt", "--data.val_fraction=1"]
    result = command(folder, "validate", "--ckpt_path=last", *flags)
    score = chargpt.load(folder / LAST).score(text)
    assert loss(result) == pytest.approx(score.nats, abs=1e-6)
    assert [line.split()[0] for line in result.out.splitlines()] == ["val_loss", "val_bpc"]
    expected = f"{score.nats:.4f} nats, {score.bits:.4f} bits per character"
    assert f"scored   {len(text) - 1:,} characters of {folder / 'other.txt'}: {expected}, " in (
        result.err
    )
    assert f"perplexity {math.exp(score.nats):.4f}" in result.err


def test_the_text_that_was_trained_on_is_not_scored_as_a_whole(folder, command):
    assert command(folder, "fit", "--config=tiny.yaml").status == 0
    result = command(folder, "validate", "--data.val_fraction=0.9")
    assert_refused(result, "1,600 characters", "were trained on")


# ---- line endings, and a different machine ----


def test_cr_lf_line_endings_are_announced(folder, text, command):
    (folder / "text.txt").write_bytes(text.replace("\n", "\r\n").encode())
    result = command(folder, "fit", "--config=tiny.yaml", "--trainer.max_steps=1")
    assert result.status == 0, result.err
    assert result.err.count("has carriage returns (CR LF line endings") == 1
    flags = ['--generate.stop=["\\n"]', "--generate.max_new_chars=5"]
    assert command(folder, "predict", *flags).status == 0


def test_a_literal_backslash_n_in_a_prompt_is_explained(trained, command):
    for flag in (r"--generate.prompt=The king\nspeaks", r"--generate.stop=\n\n"):
        result = command(trained, "predict", flag)
        assert_refused(result, r"\n is not a newline here; write $'\n'")
        assert len(result.err.splitlines()) == 3  # with the checkpoint's name


def test_a_named_text_is_found_by_its_name_on_another_machine(folder, text, command, tmp_path):
    for machine in ("one", "two"):
        (folder / machine / "mine").mkdir(parents=True)
        (folder / machine / "mine/input.txt").write_text(text, newline="\n")
    for corpora in (["--data.corpus=mine"], ["--data.corpus=mine", "--data.val_corpus=mine"]):
        shutil.copytree(folder / "one", folder / "used", dirs_exist_ok=True)
        check_on_another_machine(folder, text, command, [*corpora, "--data.data_dir=used"])


def check_on_another_machine(folder, text, command, flags) -> None:
    assert command(folder, "fit", "--config=tiny.yaml", *flags).status == 0
    resume = ["fit", "--ckpt_path=last", "--data.data_dir=used", "--trainer.max_steps"]
    assert command(folder, *resume, "9").status == 0  # by its path
    shutil.rmtree(folder / "used")
    result = command(folder, "validate", "--data.data_dir=two")
    assert result.status == 0, result.err
    assert str(folder / "two/mine/input.txt") in result.err
    (folder / "two/mine/input.txt").write_text(text[::-1], newline="\n")
    assert_refused(command(folder, "validate", "--data.data_dir=two"), "is not the text")
    (folder / "two/mine/input.txt").write_text(text, newline="\n")
