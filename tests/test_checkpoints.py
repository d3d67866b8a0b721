"""Resolving `last` and `best`, creating run folders, reading checkpoints."""

import os
from pathlib import Path

import pytest
import torch

import chargpt
from chargpt import checkpoints
from chargpt.model import GPT, GPTConfig, UserError
from chargpt.vocabulary import Vocabulary

SIZES = dict(block_size=8, n_embd=16, n_head=2, n_layer=2)


def touch(path: Path, time: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, ns=(time, time))
    return path


def checkpoint_of(config: GPTConfig) -> dict:
    """A checkpoint of a network for four characters."""
    return checkpoints.checkpoint_of(GPT(config, 4).state_dict(), config, Vocabulary("abcd"))


# ---- runs and names ----


def test_the_newest_run_is_the_one_whose_checkpoint_was_written_last(tmp_path):
    runs = tmp_path / "lightning_logs"
    touch(runs / "version_0" / "checkpoints" / "last.ckpt", 3_000)
    touch(runs / "version_1" / "checkpoints" / "last.ckpt", 2_000)
    # neither last nor best
    touch(runs / "version_2" / "checkpoints" / "step=1-val_loss=2.0000.ckpt", 9_000)
    assert checkpoints.resolve_checkpoint("last", tmp_path).parents[1] == runs / "version_0"
    touch(runs / "renamed" / "checkpoints" / "best.ckpt", 4_000)
    assert checkpoints.resolve_checkpoint("last", tmp_path).parents[1] == runs / "renamed"


def test_a_name_or_path_is_resolved_to_a_file(tmp_path, monkeypatch):
    folder = tmp_path / "lightning_logs" / "version_0" / "checkpoints"
    with pytest.raises(UserError, match="no run with a checkpoint in"):
        checkpoints.resolve_checkpoint("best", tmp_path)
    last = touch(folder / "last.ckpt", 1_000)
    assert checkpoints.resolve_checkpoint("best", tmp_path) == last  # not validated yet
    best = touch(folder / "best.ckpt", 2_000)
    for name, path in ((None, best), ("best", best), ("last", last), (str(last), last)):
        assert checkpoints.resolve_checkpoint(name, tmp_path) == path
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert checkpoints.resolve_checkpoint(f"~/{last.relative_to(tmp_path)}") == last
    with pytest.raises(UserError, match="is a folder"):
        checkpoints.resolve_checkpoint(folder)
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoints.resolve_checkpoint(folder / "other.ckpt")


def test_the_run_of_a_checkpoint_is_the_folder_above_checkpoints(tmp_path, monkeypatch):
    run = tmp_path / "lightning_logs" / "version_3"
    path = touch(run / "checkpoints" / "last.ckpt", 1_000)
    monkeypatch.chdir(path.parent)
    assert checkpoints.run_of(Path("last.ckpt")) == run
    assert checkpoints.run_of(path.parent / "own" / "last.ckpt") == run
    assert checkpoints.run_of(tmp_path / "models" / "last.ckpt") is None
    moved = touch(tmp_path / "moved" / "checkpoints" / "last.ckpt", 1_000)
    assert checkpoints.run_of(moved) is None  # any folder may be named checkpoints
    touch(tmp_path / "moved" / ".lock", 1_000)
    assert checkpoints.run_of(moved) == tmp_path / "moved"


def test_a_new_run_gets_the_number_after_the_highest(tmp_path):
    assert checkpoints.new_run(tmp_path).name == "version_0"
    assert checkpoints.new_run(tmp_path).name == "version_1"
    for name in ("version_9", "version_x", "my version_12"):
        (tmp_path / "lightning_logs" / name).mkdir()
    assert checkpoints.new_run(tmp_path).name == "version_10"


def test_runs_that_start_at_the_same_time_get_different_numbers(tmp_path, monkeypatch):
    (tmp_path / "lightning_logs" / "version_0").mkdir(parents=True)
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))  # as if listed before
    assert checkpoints.new_run(tmp_path).name == "version_1"


# ---- reading ----


@pytest.mark.parametrize("part", checkpoints.PARTS)
@pytest.mark.parametrize("kind", ["missing", "another type"])
def test_a_file_that_lacks_a_part_is_refused(tmp_path, part, kind):
    checkpoint = checkpoint_of(GPTConfig(**SIZES))
    checkpoint[part] = 1.5
    if kind == "missing":
        if part in checkpoints.NO_TRAINING_STATE:
            pytest.skip("a network without training state")
        del checkpoint[part]
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="a different version or project wrote it"):
        checkpoints.read_checkpoint(tmp_path / "a.ckpt")


def test_a_file_that_has_no_parts_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="a different version or project wrote it"):
        checkpoints.read_checkpoint(tmp_path / "a.ckpt")


# ---- the network ----


@pytest.mark.parametrize("ngrams", [None, {2: 7, 3: 5}])
def test_a_saved_network_is_loaded_unchanged(tmp_path, ngrams):
    gpt = GPT(GPTConfig(**SIZES, ngrams=ngrams), 4)
    chargpt.save(gpt, Vocabulary("abcd"), tmp_path / "new" / "a.ckpt")
    loaded = chargpt.load(tmp_path / "new" / "a.ckpt")
    assert loaded.gpt.config == gpt.config and loaded.vocabulary.characters == "abcd"
    assert loaded.gpt.state_dict().keys() == gpt.state_dict().keys()
    for name, weight in gpt.state_dict().items():
        assert torch.equal(loaded.gpt.state_dict()[name], weight)


def test_weights_outside_the_network_are_ignored():
    checkpoint = checkpoint_of(GPTConfig(**SIZES))
    checkpoint["state_dict"]["second_head.weight"] = torch.zeros(4, 16)
    gpt, _ = checkpoints.build_network(checkpoint, "a.ckpt")
    assert torch.equal(gpt.head.weight, checkpoint["state_dict"]["gpt.head.weight"])


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(n_embd=10**6), "size mismatch"),
        (dict(n_embd=10**9), "overflowed"),
        (dict(n_embd=2**70), "do not fit"),
        (dict(n_layer=10**9), "n_layer 1000000000"),
        (dict(block_size=10**9), "size mismatch for position_embedding"),
        (dict(ngrams={2: 10**9, 3: 5}), "size mismatch for ngram"),
    ],
    ids=str,
)
def test_sizes_are_refused_without_allocating_memory(change, reason):
    checkpoint = checkpoint_of(GPTConfig(**SIZES, ngrams={2: 3, 3: 5}))
    checkpoint["hyper_parameters"] |= change
    with pytest.raises(UserError, match=f"a.ckpt.*{reason}"):
        checkpoints.build_network(checkpoint, "a.ckpt")


def test_a_weight_of_another_shape_is_named():
    checkpoint = checkpoint_of(GPTConfig(**SIZES)) | dict(vocabulary="abc")
    with pytest.raises(UserError, match="size mismatch for head.bias"):
        checkpoints.build_network(checkpoint, "a.ckpt")


def test_building_a_network_draws_no_random_numbers():
    checkpoint, state = checkpoint_of(GPTConfig(**SIZES)), torch.get_rng_state()
    checkpoints.build_network(checkpoint, "a.ckpt")
    assert torch.equal(torch.get_rng_state(), state)
