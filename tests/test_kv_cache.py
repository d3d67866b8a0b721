"""The KV cache compared with recomputation, and its operations on rows."""

from random import Random

import pytest
import torch

from chargpt.model import GPT, GPTConfig, KVCache, UserError

VOCAB_SIZE = 11
SIZES = dict(block_size=10, n_embd=16, n_head=2, n_layer=2)
MODERN = dict(position="rotary", norm="plain", bias=False, activation="relu2", ngrams={2: 7, 5: 37})
ARCHITECTURES = pytest.mark.parametrize("switches", [{}, MODERN], ids=["textbook", "modern"])


def random_gpt(**switches) -> GPT:
    gpt = GPT(GPTConfig(**SIZES | switches), VOCAB_SIZE).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return gpt


def random_prompt(length: int, seed: int = 0) -> list[int]:
    return Random(seed).choices(range(VOCAB_SIZE), k=length)


def filled_cache(gpt: GPT, prompts: list[list[int]]) -> KVCache:
    """A cache with a prompt in each row, each computed alone."""
    cache = KVCache(gpt, len(prompts))
    for row, prompt in enumerate(prompts):
        alone = KVCache(gpt, rows=1, capacity=len(prompt))
        gpt(torch.tensor([prompt]), alone)
        cache.copy_row(alone, 0, [row])
    return cache


def assert_continues(gpt: GPT, cache: KVCache, prompts: list[list[int]], T: int, seed: int) -> None:
    """Append T ids to each prompt; logits with the cache must equal those of recomputing."""
    new = [random_prompt(T, seed + row) for row in range(len(prompts))]
    logits = gpt(torch.tensor(new), cache)
    for row, prompt in enumerate(prompts):
        prompt += new[row]
        expected = gpt(torch.tensor([prompt]))[0, -T:]
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-4)


@ARCHITECTURES
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("steps", [[1] * 10, [10], [4, 1, 1, 3, 1], [9, 1]], ids=str)
@torch.no_grad()
def test_logits_with_a_cache_equal_those_of_recomputing(switches, rows, steps):
    gpt = random_gpt(**switches)
    ids = torch.tensor([random_prompt(10, seed) for seed in range(rows)])
    cache = KVCache(gpt, rows)
    logits = torch.cat([gpt(part, cache) for part in ids.split(steps, dim=1)], dim=1)
    torch.testing.assert_close(logits, gpt(ids), rtol=0, atol=1e-4)


@ARCHITECTURES
@torch.no_grad()
def test_rows_of_different_lengths_do_not_disturb_each_other(switches):
    gpt = random_gpt(**switches)
    prompts = [random_prompt(length, seed=length) for length in (7, 1, 4)]
    cache = filled_cache(gpt, prompts)
    assert cache.lengths == [7, 1, 4]
    for T in (1, 2):
        assert_continues(gpt, cache, prompts, T, seed=9 * T)


@ARCHITECTURES
@torch.no_grad()
def test_a_row_can_be_replaced_by_a_shorter_one_and_rows_can_be_dropped(switches):
    gpt = random_gpt(**switches)
    prompts = [random_prompt(length, seed=length) for length in (9, 6, 4)]
    cache = filled_cache(gpt, prompts)
    prompts[0] = random_prompt(2, seed=20)
    cache.copy_row(filled_cache(gpt, [prompts[2], prompts[0]]), 1, [0])
    assert_continues(gpt, cache, prompts, 1, seed=30)
    cache.select_rows([2, 0])
    prompts = [prompts[2], prompts[0]]
    assert cache.lengths == [5, 3]
    assert_continues(gpt, cache, prompts, 2, seed=40)


@torch.no_grad()
def test_no_more_characters_than_block_size_or_capacity():
    gpt = random_gpt()
    cache = KVCache(gpt, rows=1, capacity=100)
    gpt(torch.tensor([random_prompt(9)]), cache)
    with pytest.raises(UserError, match="11 positions requested, but the cache has 10 slots"):
        gpt(torch.tensor([random_prompt(2)]), cache)
    with pytest.raises(UserError, match="4 positions requested, but the cache has 3 slots"):
        gpt(torch.tensor([random_prompt(4)]), KVCache(gpt, rows=1, capacity=3))


def test_memory_follows_the_capacity_not_block_size():
    gpt = random_gpt(block_size=10**9, position="rotary")
    cache = KVCache(gpt, rows=2, capacity=20)
    assert cache.memory.numel() == 2 * 2 * 2 * 20 * 16  # layers, keys and values, rows, slots, C
    assert cache.angles is not None and len(cache.angles) == 20
