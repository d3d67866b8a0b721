"""Which checkpoint a name stands for, where a run begins, and what one of another time or hand holds."""

import os
from pathlib import Path

import pytest
import torch

from chargpt import checkpoints
from chargpt.checkpoints import CheckpointError
from chargpt.model import GPT, GPTConfig

SIZES = dict(block_size=8, n_embd=16, n_head=2, n_layer=2)


def touch(path: Path, time: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, ns=(time, time))
    return path


def checkpoint_of(config: GPTConfig) -> dict:
    """A checkpoint of a network of four characters, as training leaves it."""
    weights = GPT(config, 4).state_dict()
    settings = {name: getattr(config, name) for name in config.__dataclass_fields__}
    return dict(
        vocabulary="abcd",
        state_dict={f"gpt.{name}": weight for name, weight in weights.items()},
        hyper_parameters=settings | dict(lr=1e-3),
        datamodule_hyper_parameters={},
        global_step=5,
    )


# ---- which one ----


def test_the_newest_run_is_the_one_whose_checkpoint_was_written_last(tmp_path):
    runs = tmp_path / "lightning_logs"
    touch(runs / "version_0" / "checkpoints" / "last.ckpt", 3_000)
    touch(runs / "version_1" / "checkpoints" / "last.ckpt", 2_000)
    (runs / "version_2").mkdir()
    assert checkpoints.newest_run(tmp_path) == runs / "version_0"
    touch(runs / "by hand" / "checkpoints" / "step=1-val_loss=2.0000.ckpt", 4_000)
    assert checkpoints.newest_run(tmp_path) == runs / "by hand"


def test_best_is_the_lowest_loss_and_of_equal_ones_the_newest(tmp_path):
    folder = tmp_path / "checkpoints"
    last = touch(folder / "last.ckpt", 9_000)
    assert checkpoints.best_checkpoint(tmp_path) == last  # none has been scored yet
    touch(folder / "step=10-val_loss=10.5000.ckpt", 8_000)
    older = touch(folder / "step=20-val_loss=2.5000.ckpt", 1_000)
    assert checkpoints.best_checkpoint(tmp_path) == older
    newer = touch(folder / "step=30-val_loss=2.5000.ckpt", 2_000)
    assert checkpoints.best_checkpoint(tmp_path) == newer
    assert checkpoints.last_checkpoint(tmp_path) == last


def test_last_is_the_newest_where_a_run_was_cut_short(tmp_path):
    touch(tmp_path / "checkpoints" / "step=20-val_loss=2.0000.ckpt", 1_000)
    newest = touch(tmp_path / "checkpoints" / "step=10-val_loss=3.0000.ckpt", 2_000)
    assert checkpoints.last_checkpoint(tmp_path) == newest


def test_names_stand_for_files(tmp_path, monkeypatch):
    folder = tmp_path / "lightning_logs" / "version_0" / "checkpoints"
    with pytest.raises(CheckpointError, match="no run with a checkpoint under"):
        checkpoints.resolve_checkpoint("best", tmp_path)
    last = touch(folder / "last.ckpt", 2_000)
    best = touch(folder / "step=5-val_loss=2.0000.ckpt", 1_000)
    for name, path in ((None, best), ("best", best), ("last", last), (str(last), last)):
        assert checkpoints.resolve_checkpoint(name, tmp_path) == path
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert checkpoints.resolve_checkpoint(f"~/{last.relative_to(tmp_path)}") == last
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        checkpoints.resolve_checkpoint(folder)


def test_a_run_is_a_folder_with_checkpoints_and_settings(tmp_path, monkeypatch):
    run = tmp_path / "lightning_logs" / "version_3"
    path = touch(run / "checkpoints" / "last.ckpt", 1_000)
    assert checkpoints.run_of(path) is None  # whatever folder that is
    touch(run / "config.yaml", 1_000)
    monkeypatch.chdir(path.parent)
    assert checkpoints.run_of(Path("last.ckpt")) == run
    assert checkpoints.run_of(touch(run / "elsewhere" / "last.ckpt", 1_000)) is None
    assert checkpoints.run_of(None) is None


def test_a_new_run_is_numbered_after_all_that_there_are(tmp_path):
    logs = tmp_path / "lightning_logs"
    assert checkpoints.new_run(logs).name == "version_0"
    assert checkpoints.new_run(logs).name == "version_1"
    for name in ("version_9", "version_x", "my version_12"):
        (logs / name).mkdir()
    assert checkpoints.new_run(logs).name == "version_10"


def test_of_two_that_take_a_number_at_once_one_takes_the_next(tmp_path, monkeypatch):
    (tmp_path / "version_0").mkdir()
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))  # looked before the other had made it
    assert checkpoints.new_run(tmp_path).name == "version_1"


# ---- what is in it ----


@pytest.mark.parametrize("part", checkpoints.PARTS)
@pytest.mark.parametrize("held", ["nothing", "another type"])
def test_a_file_without_our_parts_is_of_another_project(tmp_path, part, held):
    checkpoint = checkpoint_of(GPTConfig(**SIZES))
    checkpoint[part] = 1.5
    if held == "nothing":
        del checkpoint[part]
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="of another project or another version"):
        checkpoints.read_checkpoint(tmp_path / "a.ckpt")
    torch.save([1, 2], tmp_path / "b.ckpt")
    with pytest.raises(CheckpointError, match="of another project or another version"):
        checkpoints.read_checkpoint(tmp_path / "b.ckpt")


class Code:
    """What a pickle would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("where", ["state_dict", "hyper_parameters", "extra"])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, where):
    checkpoint = checkpoint_of(GPTConfig(**SIZES)) | {where: Code(tmp_path / "run")}
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="holds code"):
        checkpoints.read_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(tmp_path, size):
    torch.save(checkpoint_of(GPTConfig(**SIZES)), path := tmp_path / "a.ckpt")
    data = path.read_bytes()
    path.write_bytes(data[: size if isinstance(size, int) else int(size * len(data))])
    with pytest.raises(CheckpointError, match="truncated"):
        checkpoints.read_checkpoint(path)


def test_a_file_that_cannot_be_opened_says_why(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read checkpoint .*: \w+"):
        checkpoints.read_checkpoint(tmp_path)


@pytest.mark.parametrize("rows, ngrams", [(0, None), (40, {3: 40})])
def test_what_version_0_1_did_not_have_gets_a_value(tmp_path, rows, ngrams):
    checkpoint = checkpoint_of(GPTConfig(**SIZES, ngrams=ngrams))
    settings, state = checkpoint["hyper_parameters"], checkpoint["state_dict"]
    del settings["ngrams"], settings["ngram_dropout"]
    settings["trigram_rows"] = rows
    if ngrams:
        table = state.pop("gpt.ngram_embedding.table.weight")
        state["gpt.trigram_embedding.table.weight"] = table
    averages = dict(state)
    torch.save(checkpoint | dict(current_model_state=averages), tmp_path / "old.ckpt")
    read = checkpoints.read_checkpoint(tmp_path / "old.ckpt")
    settings = read["hyper_parameters"]
    assert settings["ngrams"] == ngrams and "trigram_rows" not in settings
    assert (settings["ngram_dropout"], settings["second_target"], settings["eps"]) == (0, 0, 1e-8)
    assert read["datamodule_hyper_parameters"]["order"] == "random"
    gpt, vocabulary = checkpoints.network_of(read, "old.ckpt")
    assert gpt.config == GPTConfig(**SIZES, ngrams=ngrams) and vocabulary.characters == "abcd"
    names = {f"gpt.{name}" for name in gpt.state_dict()}
    assert read["state_dict"].keys() == read["current_model_state"].keys() == names


def test_weights_of_others_beside_the_network_are_left_out():
    checkpoint = checkpoint_of(GPTConfig(**SIZES))
    checkpoint["state_dict"]["second_head.weight"] = torch.zeros(4, 16)
    gpt, _ = checkpoints.network_of(checkpoint, "a.ckpt")
    assert torch.equal(gpt.head.weight, checkpoint["state_dict"]["gpt.head.weight"])


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(n_embd=10**9), "n_embd is 1000000000, but its weights have 16"),
        (dict(n_layer=10**9), "n_layer is 1000000000, but its weights have 2"),
        (dict(block_size=10**9), "block_size is 1000000000, but its weights have 8"),
        (dict(ngrams={2: 10**9, 3: 5}), "ngrams asks for 1000000005 rows"),
    ],
    ids=str,
)
def test_sizes_are_refused_before_memory_is_asked_for(change, said):
    checkpoint = checkpoint_of(GPTConfig(**SIZES, ngrams={2: 3, 3: 5}))
    checkpoint["hyper_parameters"] |= change
    with pytest.raises(CheckpointError, match=said) as error:
        checkpoints.network_of(checkpoint, "a.ckpt")
    assert str(error.value).startswith("a.ckpt does not fit")


def test_weights_of_another_shape_are_named():
    checkpoint = checkpoint_of(GPTConfig(**SIZES)) | dict(vocabulary="abc")
    with pytest.raises(CheckpointError, match=r"size mismatch for head.bias: .*\n\w"):
        checkpoints.network_of(checkpoint, "a.ckpt")


def test_a_rotary_network_may_look_at_any_length():
    checkpoint = checkpoint_of(GPTConfig(**SIZES, position="rotary"))
    checkpoint["hyper_parameters"]["block_size"] = 10**9
    gpt, _ = checkpoints.network_of(checkpoint, "a.ckpt")
    assert gpt.config.block_size == 10**9


def test_building_a_network_draws_no_random_numbers_of_others():
    checkpoint, state = checkpoint_of(GPTConfig(**SIZES)), torch.get_rng_state()
    checkpoints.network_of(checkpoint, "a.ckpt")
    assert torch.equal(torch.get_rng_state(), state)
