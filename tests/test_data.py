"""Datasets and the data module: which sequences, in which order, from which text."""

import contextlib
import errno
import hashlib
import os
import pickle
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_data, write_text

from chargpt.data import CharDataModule, token_file
from chargpt.data.datasets import EpochSequences, EvaluationSequences, RandomSequences
from chargpt.model import UserError

TOKENS = np.arange(60_000, dtype=np.uint16)  # each id is its position
sizes = st.integers(1, 12)


@settings(max_examples=150, deadline=None)
@given(
    characters=st.integers(2, 300), block_size=sizes, batch_size=sizes, world_size=st.integers(1, 5)
)
def test_evaluation_predicts_each_character_but_the_first_exactly_once(
    characters, block_size, batch_size, world_size
):
    tokens = TOKENS[:characters]
    seen = Counter()
    for rank in range(world_size):
        batches = EvaluationSequences(tokens, block_size, batch_size, rank, world_size)
        read = list(batches)
        assert len(read) == len(batches) >= 1  # all ranks participate
        for batch in read:
            assert batch.shape[0] <= batch_size and batch.shape[1] <= block_size + 1
            ids, targets = batch[:, :-1].long(), batch[:, 1:].long()
            assert torch.equal(ids + 1, targets)  # consecutive
            seen.update(targets.flatten().tolist())
    assert seen == Counter(range(1, characters))


@settings(max_examples=150, deadline=None)
@given(
    block_size=sizes,
    batch_size=sizes,
    world_size=st.sampled_from([1, 2, 3, 4]),
    seed=st.integers(0, 2**40),
    k=st.integers(0, 2**40),
)
def test_a_batch_is_a_function_of_seed_and_number(block_size, batch_size, world_size, seed, k):
    """Several devices together read the batch that one reads; no sequence is in a batch twice."""
    tokens = TOKENS[:500]
    alone = RandomSequences(tokens, block_size, batch_size * world_size, seed=seed)[k]
    ranks = [
        RandomSequences(tokens, block_size, batch_size, r, world_size, seed=seed)[k]
        for r in range(world_size)
    ]
    assert torch.equal(torch.cat(ranks), alone)
    assert alone.dtype == torch.uint16
    starts = alone[:, 0].tolist()
    assert len(set(starts)) == len(starts)
    for start, row in zip(starts, alone.tolist()):
        assert row == list(range(start, start + block_size + 1))


@settings(max_examples=150, deadline=None)
@given(characters=st.integers(13, 400), block_size=sizes, batch_size=sizes, seed=st.integers(0, 99))
def test_an_epoch_reads_each_character_once(characters, block_size, batch_size, seed):
    """Except for fewer than two sequences at the ends; each epoch splits the text at different offsets."""
    sequences = EpochSequences(TOKENS[:characters], block_size, batch_size, seed=seed)
    n = max(1, characters // block_size - 1)
    starts = np.concatenate([sequences.starts(k) for k in range(-(-2 * n // batch_size))])
    epochs = starts[:n], starts[n : 2 * n]
    for epoch in epochs:
        read = Counter(t for start in epoch for t in range(start + 1, start + block_size + 1))
        assert set(read.values()) == {1}
        assert min(read) >= 1 and max(read) < characters
        assert len(read) > characters - 1 - 2 * block_size
    assert all(row[-1] - row[0] == block_size for row in sequences[3].long())


def test_epochs_differ_in_order_and_offset():
    sequences = EpochSequences(TOKENS[:1000], block_size=10, batch_size=99, seed=1)
    first, second = sequences.starts(0), sequences.starts(1)
    assert first[0] % 10 != second[0] % 10
    assert not (np.diff(first) == 10).all()
    assert not np.array_equal(first.argsort(), second.argsort())


@settings(max_examples=100, deadline=None)
@given(block_size=sizes, batch_size=sizes, world_size=st.integers(1, 4), k=st.integers(0, 2**40))
def test_ranks_share_an_epoch(block_size, batch_size, world_size, k):
    tokens = TOKENS[:500]
    alone = EpochSequences(tokens, block_size, batch_size * world_size, seed=7)[k]
    ranks = [
        EpochSequences(tokens, block_size, batch_size, r, world_size, seed=7)[k]
        for r in range(world_size)
    ]
    assert torch.equal(torch.cat(ranks), alone)


def test_every_position_of_the_split_can_be_read():
    batches = RandomSequences(TOKENS[:20], block_size=4, batch_size=8, seed=0)
    starts = {start for k in range(50) for start in batches[k][:, 0].tolist()}
    assert starts == set(range(16))  # the last sequence ends with the last character


@pytest.mark.parametrize("Sequences", [RandomSequences, EpochSequences])
def test_the_first_batch_is_number_zero(Sequences):
    sequences = Sequences(TOKENS, block_size=8, batch_size=4, seed=1)
    assert torch.equal(next(iter(sequences)), sequences[0])


def test_a_split_of_one_sequence_fills_a_batch():
    assert (
        RandomSequences(TOKENS[:5], block_size=4, batch_size=3, seed=0)[0].tolist()
        == [[0, 1, 2, 3, 4]] * 3
    )


def test_batches_differ_between_steps_and_seeds_and_can_start_anywhere():
    def first(seed, start, n):
        reading = iter(RandomSequences(TOKENS, 8, 4, seed=seed, start_batch=start))
        return [next(reading).tolist() for _ in range(n)]

    assert first(1, 0, 6)[3:] == first(1, 3, 3)
    assert first(1, 0, 6) == first(1, 0, 6) != first(2, 0, 6)
    assert len({str(batch) for batch in first(1, 0, 6)}) == 6


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_keep_the_order(tmp_path, num_workers):
    data = make_data(tmp_path, num_workers=num_workers)
    data.setup()
    expected = RandomSequences(data.train_tokens, 8, 4, seed=1)
    for k, batch in zip(range(5), data.train_dataloader()):
        assert torch.equal(batch, expected[k])
    targets = torch.cat([batch[:, 1:].flatten() for batch in data.val_dataloader()])
    assert torch.equal(
        targets.sort().values, torch.from_numpy(data.val_tokens[1:].copy()).sort().values
    )


def test_workers_may_be_started_in_any_way(tmp_path):
    """A new interpreter gets the dataset pickled; only a fork, as above, gets it as it is."""
    data = make_data(tmp_path)
    data.setup()
    train = data.train_dataloader().dataset
    copy = pickle.loads(pickle.dumps(train))
    for k in range(3):
        assert torch.equal(copy[k], train[k])


RECORDED = ["corpus", "corpus_name", "corpus_digest", "corpus_bytes", "train_characters"]


def test_splits(tmp_path):
    data = make_data(tmp_path, val_fraction=0.2, test_fraction=0.1)
    data.setup()
    parts = [data.train_tokens, data.val_tokens, data.test_tokens]
    assert [len(part) for part in parts] == [1400, 400, 200]
    assert data.vocabulary.decode(np.concatenate(parts)) == write_text(tmp_path).read_text()
    assert {name: data.hparams[name] for name in RECORDED} == dict(
        corpus=str(tmp_path / "text.txt"),
        corpus_name=str(tmp_path / "text.txt"),
        corpus_digest=hashlib.sha256(write_text(tmp_path).read_bytes()).hexdigest(),
        corpus_bytes=2000,
        train_characters=1400,
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(block_size=0), "block_size is 0"),
        (dict(batch_size=-1), "batch_size is -1"),
        (dict(num_workers=-1), "num_workers is -1"),
        (dict(seed=-1), "seed is -1"),
        (dict(val_fraction=-0.1), "val_fraction is -0.1; it must be from 0 to 1"),
        (
            dict(val_fraction=0.5, test_fraction=0.6),
            "test_fraction is 0.6; it must be from 0 to 1 - ",
        ),
        (dict(val_fraction=float("nan")), "val_fraction is nan"),
        (dict(order="sorted"), "order is sorted; it must be random or epochs"),
    ],
)
def test_invalid_settings(settings, message):
    with pytest.raises(UserError, match=message):
        CharDataModule(**settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(block_size=1800), "training needs 1,801 characters, but .*text.txt leaves 1,800\n"),
        (dict(batch_size=1801), "training needs 1,801 .* 1,800\n.*smaller .*--data.batch_size"),
        (dict(val_fraction=0.0005), "validation needs 2 characters, .* leaves 1\n"),
        (dict(test_fraction=0.0005), "testing needs 2 characters, .* leaves 1\n"),
    ],
)
def test_splits_that_are_too_short(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        make_data(tmp_path, **settings).setup()


def test_no_test_split_unless_asked_for(tmp_path):
    data = make_data(tmp_path)
    data.setup()
    with pytest.raises(UserError, match="test_fraction"):
        data.test_dataloader()


def test_a_second_setup_keeps_the_name_of_the_text(tmp_path):
    """Lightning prepares the data again for each of fit, validate and test."""
    data = make_data(tmp_path, corpus="python-reference")
    for _ in range(2):
        data.prepare_data()
        data.setup()
    assert data.hparams["corpus_name"] == "python-reference"
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 1


@pytest.mark.parametrize("fault", ["a file as its folder", "a full disk"])
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, fault):
    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    data = make_data(tmp_path)
    if fault == "a full disk":
        monkeypatch.setattr(os, "fsync", full)
    else:
        (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="cannot access .*cache.tokens.*\n.*CHARGPT_DATA_DIR"):
        data.setup()
    assert list(tmp_path.rglob("*.npy*")) == []


def test_a_text_that_cannot_be_read(tmp_path, monkeypatch):
    def denied(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(token_file, "open", denied, raising=False)
    with pytest.raises(UserError, match="cannot access .*text.txt: Permission denied\n"):
        make_data(tmp_path).setup()


# --- the text of a checkpoint ---


def record_of(data: CharDataModule) -> dict:
    """The record in a checkpoint of a run with this data."""
    data.setup()
    return dict(data.hparams)


def setup_with(folder, trained: dict, other=(), **settings) -> CharDataModule:
    data = make_data(folder, **settings)
    data.trained, data.other_texts = trained, other
    data.setup()
    return data


CHANGED = "text.txt is not the text that the checkpoint records, or it has changed since"


@pytest.mark.parametrize("addition", ["", "a"])  # of the recorded size, and longer
def test_a_changed_text_is_refused_unless_the_user_names_it(tmp_path, addition):
    path = write_text(tmp_path)
    trained = record_of(make_data(tmp_path))
    assert len(setup_with(tmp_path, trained).train_tokens) == 1800
    path.write_text(path.read_text()[::-1] + addition)
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match=f"{CHANGED}\n.*--data.corpus"):
        setup_with(tmp_path, trained)
    setup_with(tmp_path, trained, other=["corpus"])


def test_a_text_of_another_size_than_recorded_is_not_read(tmp_path, monkeypatch):
    """A checkpoint may be untrusted, and the path in it may name any file."""
    trained = record_of(make_data(tmp_path))
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(token_file, "read_file", None)
    for size in (trained["corpus_bytes"] + 1, float(trained["corpus_bytes"])):
        with pytest.raises(UserError, match=CHANGED):
            setup_with(tmp_path, trained | dict(corpus_bytes=size))
    assert not (tmp_path / "cache").exists()


ODD = [None, "a", 7.0, True, 10**5000, -(10**5000), float("nan"), [[0]], {}, b"a", torch.ones(2)]


@pytest.mark.parametrize("value", ODD, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", ["corpus_bytes", "corpus_digest", "train_characters"])
def test_a_record_with_values_of_other_types_is_not_a_traceback(tmp_path, name, value):
    trained = record_of(make_data(tmp_path)) | {name: value}
    for other in ([], ["corpus"]):
        with contextlib.suppress(UserError):
            setup_with(tmp_path, trained, other)
            assert other or name == "train_characters"


def test_without_a_record_any_text_and_split_is_fine(tmp_path):
    trained = {name: "a" for name in record_of(make_data(tmp_path)) if name not in RECORDED}
    setup_with(tmp_path, trained, val_fraction=0.9)


@pytest.mark.parametrize("other", [(), ("corpus",)])
@pytest.mark.parametrize("split", [dict(test_fraction=0.5), dict(val_fraction=0.2)])
def test_a_split_that_overlaps_the_training_text_is_refused(tmp_path, other, split):
    trained = record_of(make_data(tmp_path))
    with pytest.raises(UserError, match="1,800 characters of .* were trained on") as error:
        setup_with(tmp_path, trained, other, **split)
    assert "--data.val_fraction or --data.test_fraction" in str(error.value)


def test_a_copy_of_the_text_and_other_splits_of_the_rest_are_fine(tmp_path):
    """0.05 and 0.05 leave one training character fewer than 0.1: 1 - 0.05 - 0.05 rounds down."""
    trained = record_of(make_data(tmp_path))
    copy = tmp_path / "copy.txt"
    shutil.copy(write_text(tmp_path), copy)
    halves = dict(val_fraction=0.05, test_fraction=0.05)
    data = setup_with(tmp_path, trained, corpus=str(copy), **halves)
    assert len(data.train_tokens) == 1799
    setup_with(tmp_path, trained, val_fraction=0.05)


def test_another_text_may_be_scored_with_any_split_but_not_trained_on(tmp_path):
    trained = record_of(make_data(tmp_path))
    other = tmp_path / "other.txt"
    other.write_text(write_text(tmp_path).read_text()[::-1])
    setup_with(tmp_path, trained, ["corpus"], corpus=str(other), val_fraction=0.5)
    with pytest.raises(UserError, match="other.txt is not the text.*\n.*omit --ckpt_path"):
        setup_with(tmp_path, trained, corpus=str(other))


def test_a_refused_text_is_refused_again(tmp_path):
    data = make_data(tmp_path)
    data.trained = record_of(make_data(tmp_path)) | dict(corpus_digest="0")
    for _ in range(2):
        with pytest.raises(UserError, match=CHANGED):
            data.setup()


# --- a text of its own to validate on ---


def write_val(folder, text: str = "hedge fed bed\n" * 3) -> str:
    path = folder / "val.txt"
    path.write_text(text)
    return str(path)


def test_a_validation_text_leaves_the_whole_corpus_to_training(tmp_path):
    data = make_data(tmp_path, val_corpus=write_val(tmp_path), val_fraction=0.5, test_fraction=0.1)
    data.setup()
    assert (len(data.train_tokens), len(data.test_tokens)) == (1800, 200)
    batches = [batch.long() for batch in data.val_dataloader()]
    targets = torch.cat([batch[:, 1:].flatten() for batch in batches])
    text = (tmp_path / "val.txt").read_text()
    assert data.vocabulary.decode(targets) == text[1:]  # in the ids of the corpus
    assert len(data.vocabulary) == 10 > len(set(text)) == 8
    assert data.hparams["val_corpus"] == str(tmp_path / "val.txt")
    assert data.hparams["val_corpus_bytes"] == len(text)
    assert data.hparams["val_corpus_digest"] == hashlib.sha256(text.encode()).hexdigest()


def test_a_validation_text_with_unknown_characters_is_refused_by_name(tmp_path):
    data = make_data(tmp_path, val_corpus=write_val(tmp_path, "hedge fed z"))
    data.setup()
    for loader in (data.train_dataloader, data.val_dataloader):  # before a step is taken
        with pytest.raises(UserError, match=r"val.txt has characters .* does not know: \['z'\]"):
            loader()


def test_a_changed_validation_text_is_refused_unless_it_is_named(tmp_path):
    path = write_val(tmp_path)
    trained = record_of(make_data(tmp_path, val_corpus=path))
    setup_with(tmp_path, trained, val_corpus=path)
    write_val(tmp_path, "hedge bed fed\n" * 3)
    os.utime(path, ns=(1, 1))
    for other in ([], ["corpus"]):
        with pytest.raises(UserError, match="val.txt is not the text"):
            setup_with(tmp_path, trained, other, val_corpus=path)
    setup_with(tmp_path, trained, ["val_corpus"], val_corpus=path)
