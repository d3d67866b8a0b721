"""Which characters are read: random blocks as a function of the seed, and a cover of a split."""

import hashlib
import multiprocessing
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_data, write_text
from torch.utils.data import DataLoader

from chargpt.data import CharDataModule
from chargpt.data.blocks import EpochBlocks, EvaluationBlocks, RandomBlocks
from chargpt.data.corpus import CorpusError

TOKENS = np.arange(60_000, dtype=np.uint16)  # each id says where it stands
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
        batches = EvaluationBlocks(tokens, block_size, batch_size, rank, world_size)
        read = list(batches)
        assert len(read) == len(batches) >= 1  # all ranks take part
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
    """One device with the whole batch reads what several read together; no block twice in a batch."""
    tokens = TOKENS[:500]
    alone = RandomBlocks(tokens, block_size, batch_size * world_size, seed)[k]
    ranks = [
        RandomBlocks(tokens, block_size, batch_size, seed, r, world_size)[k]
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
    """But for less than two sequences at the ends; and the next epoch cuts the text elsewhere."""
    blocks = EpochBlocks(TOKENS[:characters], block_size, batch_size, seed)
    n = max(1, characters // block_size - 1)
    starts = np.concatenate([blocks.starts(k) for k in range(-(-2 * n // batch_size))])
    epochs = starts[:n], starts[n : 2 * n]
    for epoch in epochs:
        read = Counter(t for start in epoch for t in range(start + 1, start + block_size + 1))
        assert set(read.values()) == {1}
        assert min(read) >= 1 and max(read) < characters
        assert len(read) > characters - 1 - 2 * block_size
    assert all(row[-1] - row[0] == block_size for row in blocks[3].long())


def test_epochs_differ_in_their_order_and_where_they_cut():
    blocks = EpochBlocks(TOKENS[:1000], block_size=10, batch_size=99, seed=1)
    first, second = blocks.starts(0), blocks.starts(1)
    assert first[0] % 10 != second[0] % 10
    assert not (np.diff(first) == 10).all()
    assert not np.array_equal(first.argsort(), second.argsort())


@settings(max_examples=100, deadline=None)
@given(block_size=sizes, batch_size=sizes, world_size=st.integers(1, 4), k=st.integers(0, 2**40))
def test_ranks_share_an_epoch(block_size, batch_size, world_size, k):
    tokens = TOKENS[:500]
    alone = EpochBlocks(tokens, block_size, batch_size * world_size, 7)[k]
    ranks = [
        EpochBlocks(tokens, block_size, batch_size, 7, r, world_size)[k] for r in range(world_size)
    ]
    assert torch.equal(torch.cat(ranks), alone)


def test_every_place_of_the_split_can_be_read():
    batches = RandomBlocks(TOKENS[:20], block_size=4, batch_size=8, seed=0)
    starts = {start for k in range(50) for start in batches[k][:, 0].tolist()}
    assert starts == set(range(16))  # the last block ends with the last character


@pytest.mark.parametrize("Blocks", [RandomBlocks, EpochBlocks])
def test_reading_begins_with_the_first_batch(Blocks):
    blocks = Blocks(TOKENS, block_size=8, batch_size=4, seed=1)
    assert torch.equal(next(iter(blocks)), blocks[0])


def test_a_split_of_one_block_fills_a_batch():
    assert (
        RandomBlocks(TOKENS[:5], block_size=4, batch_size=3, seed=0)[0].tolist()
        == [[0, 1, 2, 3, 4]] * 3
    )


def test_batches_differ_between_steps_and_seeds_and_go_on_anywhere():
    def first(seed, start, n):
        reading = iter(RandomBlocks(TOKENS, 8, 4, seed, first=start))
        return [next(reading).tolist() for _ in range(n)]

    assert first(1, 0, 6)[3:] == first(1, 3, 3)
    assert first(1, 0, 6) == first(1, 0, 6) != first(2, 0, 6)
    assert len({str(batch) for batch in first(1, 0, 6)}) == 6


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_change_nothing(tmp_path, num_workers):
    data = make_data(tmp_path, num_workers=num_workers)
    data.setup()
    expected = RandomBlocks(data.train_tokens, 8, 4, seed=1)
    for k, batch in zip(range(5), data.train_dataloader()):
        assert torch.equal(batch, expected[k])
    targets = torch.cat([batch[:, 1:].flatten() for batch in data.val_dataloader()])
    assert torch.equal(
        targets.sort().values, torch.from_numpy(data.val_tokens[1:].copy()).sort().values
    )


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_workers_map_the_text_themselves(tmp_path, method):
    """However they start: one that is spawned gets the place of the text and not a copy."""
    data = make_data(tmp_path, corpus=str(write_text(tmp_path, 200_000)))
    data.setup()
    train, val = data.train_dataloader().dataset, data.val_dataloader().dataset
    assert len(pickle.dumps(train)) < 1000 and len(pickle.dumps(val)) < 1000
    loader = DataLoader(train, batch_size=None, num_workers=1, multiprocessing_context=method)
    for k, batch in zip(range(3), loader):
        assert torch.equal(batch, train[k])


def test_splits(tmp_path):
    data = make_data(tmp_path, val_fraction=0.2, test_fraction=0.1)
    data.setup()
    parts = [data.train_tokens, data.val_tokens, data.test_tokens]
    assert [len(part) for part in parts] == [1400, 400, 200]
    assert data.vocabulary.decode(np.concatenate(parts)) == write_text(tmp_path).read_text()
    assert data.hparams.corpus == str(tmp_path / "text.txt")
    assert (
        data.hparams.corpus_digest == hashlib.sha256(write_text(tmp_path).read_bytes()).hexdigest()
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(block_size=0), "block_size is 0"),
        (dict(batch_size=-1), "batch_size is -1"),
        (dict(num_workers=-1), "num_workers is -1"),
        (dict(seed=-1), "seed is -1"),
        (dict(block_size=8.0), "block_size is 8.0; it must be a whole number from 1 on"),
        (dict(batch_size="4"), "batch_size is '4'"),
        (dict(val_fraction=-0.1), "must not be negative"),
        (dict(val_fraction=0.5, test_fraction=0.5), "leave something to train on"),
        (dict(val_fraction=float("nan")), "leave something to train on"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        CharDataModule(**settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(block_size=1800), "1,800 characters to train on.*needs at least 1801"),
        (dict(val_fraction=0.0005), "1 characters to validate on"),
        (dict(test_fraction=0.0005), "1 characters to test on"),
    ],
)
def test_splits_that_are_too_short(tmp_path, settings, message):
    with pytest.raises(CorpusError, match=message):
        make_data(tmp_path, **settings).setup()


def test_no_test_split_unless_asked_for(tmp_path):
    data = make_data(tmp_path)
    data.setup()
    with pytest.raises(CorpusError, match="test_fraction"):
        data.test_dataloader()
