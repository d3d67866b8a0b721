"""Runs that start from a checkpoint: `fit --init_from`, `GPTModule.init_from`, `--ckpt_path auto`."""

import hashlib
import random
import shutil
from pathlib import Path

import pytest
import torch
from tiny import MUON, assert_same, last, make_data, make_module, make_trainer
from torch import nn

import chargpt
import chargpt.training.module as module_file
from chargpt import checkpoints
from chargpt.model import GPT, GPTConfig, UserError
from chargpt.vocabulary import Vocabulary

RUNS = Path("lightning_logs")
OTHER = "Thé king walks, and thé queen sings. ß\n"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of a folder with a trained run, and another text with two more characters."""
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    words = random.Random(1).choices(OTHER.split(" "), k=300)
    (folder / "other.txt").write_text(OTHER + " ".join(words))
    return folder


def read(folder: Path, run: int, name: str = "last") -> dict:
    return torch.load(
        folder / RUNS / f"version_{run}" / f"checkpoints/{name}.ckpt", weights_only=True
    )


def digests(folder: Path) -> dict[Path, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


START = ["fit", "--config=tiny.yaml", "--data.corpus=other.txt"]


def test_a_new_run_starts_with_the_weights_of_the_checkpoint(run, command):
    before = digests(run / RUNS)
    flags = ["--trainer.max_steps=1", "--model.lr=1e-9", "--model.weight_decay=0"]
    result = command(run, *START, "--init_from=best", *flags)
    assert result.status == 0, result.err
    assert {path: digest for path, digest in digests(run / RUNS).items() if path in before} == (
        before
    )
    base, tuned = read(run, 0, "best"), read(run, 1)
    assert tuned["global_step"] == 1
    size = len(base["vocabulary"])
    assert tuned["vocabulary"] == base["vocabulary"] + ",ßé"  # ids of known characters stay
    for name, weight in base["state_dict"].items():
        torch.testing.assert_close(tuned["state_dict"][name][: len(weight)], weight)
    new_rows = tuned["state_dict"]["gpt.token_embedding.weight"][size:]
    assert 0.01 < new_rows.std() < 0.04  # drawn with a standard deviation of 0.02


def test_it_learns_text_and_characters_that_the_checkpoint_did_not_know(run, command):
    limits = ["--trainer.max_steps=300", "--trainer.val_check_interval=300"]
    result = command(run, *START, "--init_from=last", *limits, "--model.lr=0.01")
    assert result.status == 0, result.err
    model = chargpt.load(run / RUNS / "version_1/checkpoints/last.ckpt")
    assert (
        model.score("thé king").nats
        < chargpt.load(run / RUNS / "version_0/checkpoints/last.ckpt").score("the king").nats
    )
    assert "é" in model.complete("Th", max_new_chars=200, seed=1)


AVERAGES = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.9"]


@pytest.mark.parametrize(
    "settings, callbacks",
    [({}, []), (MUON, []), ({}, AVERAGES)],
    ids=["adamw", "muon", "averages"],
)
def test_a_fine_tuned_run_resumes_exactly(run, command, settings, callbacks):
    flags = [*callbacks, *(f"--model.{name}={value}" for name, value in settings.items())]
    base = f"--init_from={RUNS / 'version_0/checkpoints/best.ckpt'}"
    assert command(run, *START, base, *flags).status == 0
    assert command(run, *START, base, *flags, "--trainer.max_steps=4").status == 0
    result = command(run, "fit", *callbacks, "--ckpt_path=last", "--trainer.max_steps=8")
    assert result.status == 0, result.err
    assert_same(read(run, 2)["state_dict"], read(run, 1)["state_dict"])
    assert_same(read(run, 2)["optimizer_states"], read(run, 1)["optimizer_states"])
    assert command(run, "validate").status == 0


def test_the_network_is_that_of_the_checkpoint(run, command):
    """Whatever a configuration file says; a flag that differs is refused."""
    (run / "wide.yaml").write_text("model: {n_embd: 64, dropout: 0.3, norm: plain}")
    arguments = [*START, "--config=wide.yaml", "--init_from=last", "--trainer.max_steps=1"]
    result = command(run, *arguments)
    assert result.status == 0, result.err
    assert "model.n_embd 64 -> 8" in result.err and "model.norm plain -> layer" in result.err
    settings = read(run, 1)["hyper_parameters"]
    assert (settings["n_embd"], settings["norm"], settings["dropout"]) == (8, "layer", 0.3)
    resumed = command(run, *arguments, "--ckpt_path=last", "--trainer.max_steps=2")
    assert resumed.status == 0, resumed.err  # as the message of a stopped run advises
    result = command(run, *arguments, "--model.n_embd=16")
    assert (result.status, "n_embd is 8 in" in result.err) == (1, True)


def test_in_python(tmp_path):
    make_trainer(tmp_path / "base", max_steps=2).fit(make_module(), make_data(tmp_path))
    base = chargpt.load(last(tmp_path / "base"))
    text = ("abc " * 10 + "yz\n") * 30
    (tmp_path / "other.txt").write_text(text)
    module = chargpt.GPTModule.init_from(last(tmp_path / "base"), lr=1e-2, dropout=0.0)
    data = make_data(tmp_path, corpus=str(tmp_path / "other.txt"))
    trainer = make_trainer(tmp_path / "tuned", max_steps=2)
    seen = []
    step = module.training_step

    def training_step(batch, batch_idx):
        if not seen:
            logits = module.gpt(batch[:, :-1].long())
            seen.extend([batch.long(), logits.detach()])
        return step(batch, batch_idx)

    module.training_step = training_step
    trainer.fit(module, data)
    assert module.vocabulary.characters == base.vocabulary.characters + "yz"
    ids, logits = seen
    assert module.vocabulary.decode(ids[0]) in text  # served in the ids of the network
    size = len(base.vocabulary)
    known = (ids[:, :-1] < size).all(1)
    assert known.any()
    torch.testing.assert_close(base.gpt(ids[known, :-1]), logits[known, :, :size])
    with pytest.raises(TypeError, match="n_embd"):
        chargpt.GPTModule.init_from(last(tmp_path / "base"), n_embd=32)


def test_a_tied_head_stays_tied(tmp_path, monkeypatch):
    """The network that is loaded, and a new run that starts with it; also a learned scalar."""

    class Tied(GPT):
        def initialize(self) -> None:
            self.head.weight = self.token_embedding.weight
            self.blocks[0].gain = nn.Parameter(torch.tensor(2.0))
            super().initialize()

    monkeypatch.setattr(checkpoints, "GPT", Tied)
    monkeypatch.setattr(module_file, "GPT", Tied)
    gpt = Tied(GPTConfig(block_size=8, n_embd=16, n_head=2, n_layer=2), 3).eval()
    nn.init.constant_(gpt.blocks[0].gain, 3.0)
    chargpt.save(gpt, Vocabulary("abc"), tmp_path / "a.ckpt")
    loaded = chargpt.load(tmp_path / "a.ckpt").gpt
    module = chargpt.GPTModule.init_from(tmp_path / "a.ckpt")
    module.build(Vocabulary("abcd"))
    ids = torch.tensor([[0, 1, 2, 1]])
    for other in (loaded, module.gpt.eval()):
        assert other.head.weight is other.token_embedding.weight
        assert [n for n, _ in other.named_parameters()] == [n for n, _ in gpt.named_parameters()]
        assert other.blocks[0].gain == 3.0
        torch.testing.assert_close(other(ids)[..., :3], gpt(ids))


def test_a_text_with_fewer_characters_than_the_network_is_scored(run, command):
    text = "the queen walks to the king. " * 20
    (run / "fewer.txt").write_text(text)
    result = command(run, "validate", "--data.corpus=fewer.txt", "--data.val_fraction=0.5")
    assert result.status == 0, result.err
    model = chargpt.load(run / RUNS / "version_0/checkpoints/best.ckpt")
    expected = model.score(text[len(text) // 2 :])
    assert float(result.out.split()[1]) == pytest.approx(expected.nats, abs=1e-6)


def test_a_text_with_unknown_characters_is_refused_by_name(run, command):
    result = command(run, "validate", "--data.corpus=other.txt")
    assert (result.status, "[',', 'ß', 'é']" in result.err, "Traceback" in result.err) == (
        1,
        True,
        False,
    )


# ---- --ckpt_path auto ----


def test_auto_starts_a_run_then_resumes_it(folder, command):
    arguments = ["fit", "--config=tiny.yaml", "--ckpt_path=auto"]
    assert command(folder, *arguments, "--trainer.max_steps=4").status == 0
    result = command(folder, *arguments)
    assert result.status == 0, result.err
    assert "resumed  after step 4" in result.err
    assert [path.name for path in (folder / RUNS).iterdir()] == ["version_0"]
    assert read(folder, 0)["global_step"] == 8


def test_auto_and_init_from(run, command):
    base = run / RUNS / "version_0/checkpoints/best.ckpt"
    arguments = [*START, f"--init_from={base}", "--ckpt_path=auto"]
    assert command(run, *arguments, "--trainer.max_steps=4").status == 0
    result = command(run, *arguments)  # now the newest run is the fine-tuned one
    assert result.status == 0, result.err
    assert "resumed  after step 4" in result.err
    assert read(run, 1)["global_step"] == 8
    result = command(run, *START, "--init_from=best", "--ckpt_path=auto")
    assert (result.status, "give --init_from the path" in result.err) == (1, True)


def test_a_missing_checkpoint_is_named(folder, command):
    result = command(folder, "fit", "--config=tiny.yaml", "--init_from=nowhere.ckpt")
    assert (result.status, "no checkpoint at" in result.err) == (1, True)
    with pytest.raises(UserError, match="no checkpoint"):
        chargpt.GPTModule.init_from(folder / "nowhere.ckpt")
