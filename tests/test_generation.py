"""Writing: the cache against recomputing, the window, the choice of a character, and stopping."""

import gc
import math
import random
import tracemalloc
from collections import Counter
from dataclasses import FrozenInstanceError, replace
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import reference_of, window_by_the_rule, write_greedily

from chargpt.generation import (
    GenerationConfig,
    SequenceState,
    generate,
    inference_copy,
    mix,
    sample,
    uniform,
    window_length,
)
from chargpt.model import GPT, GPTConfig, KVCache

VOCAB_SIZE = 11
SIZES = dict(block_size=10, n_embd=16, n_head=2, n_layer=2)
MODERN = dict(position="rotary", norm="plain", bias=False, activation="relu2", ngrams={2: 7, 5: 37})
ARCHITECTURES = pytest.mark.parametrize("switches", [{}, MODERN], ids=["textbook", "modern"])
GREEDY = GenerationConfig(temperature=0)
WARM = GenerationConfig(temperature=1.5)


def random_gpt(**switches) -> GPT:
    gpt = GPT(GPTConfig(**SIZES | switches), VOCAB_SIZE).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return gpt


def random_prompt(length: int, seed: int = 0) -> list[int]:
    return Random(seed).choices(range(VOCAB_SIZE), k=length)


def write(gpt, prompts, max_new, config=WARM, exact_window=False, **arguments) -> list[list[int]]:
    """What `generate` adds to each prompt."""
    texts = [[] for _ in prompts]
    config = replace(config, max_new_chars=max_new, exact_window=exact_window)
    for chunks in generate(gpt, prompts, config, **arguments):
        for index, ids, _ in chunks:
            texts[index] += ids
    return texts


# ---- the cache ----


@ARCHITECTURES
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("steps", [[1] * 10, [10], [4, 1, 1, 3, 1], [9, 1]], ids=str)
@torch.no_grad()
def test_cached_logits_are_those_of_recomputing(switches, rows, steps):
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
    together = KVCache(gpt, rows=3, end=7)
    for row, prompt in enumerate(prompts):
        alone = KVCache(gpt, rows=1)
        gpt(torch.tensor([prompt]), alone)
        together.put([row], alone, [0])
    for T in (1, 2):  # one character more in each row, then two
        more = [random_prompt(T, seed=9 + row) for row in range(3)]
        logits = gpt(torch.tensor(more), together)
        for row in range(3):
            prompts[row] += more[row]
            expected = gpt(torch.tensor([prompts[row]]))[0, -T:]
            torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_no_more_characters_in_the_cache_than_block_size():
    gpt = random_gpt()
    cache = KVCache(gpt, rows=1)
    gpt(torch.tensor([random_prompt(9)]), cache)
    with pytest.raises(ValueError, match="11 positions .* block_size is 10"):
        gpt(torch.tensor([random_prompt(2)]), cache)


# ---- the twin that writes ----


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@ARCHITECTURES
@torch.no_grad()
def test_the_twin_is_the_network_whatever_was_changed_in_it(switches):
    gpt, ids = random_gpt(dropout=0.5, **switches).train(), torch.tensor([random_prompt(10)])
    gpt.head = Doubled(16, 11)
    gpt.norm = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh())
    gpt.blocks[1].attention.qkv.weight = gpt.blocks[0].attention.qkv.weight
    hook = gpt.norm[0].register_forward_hook(lambda *_: pytest.fail("hooks are for training"))
    logits = inference_copy(gpt)(ids)
    hook.remove()
    assert all(module.training for module in gpt.modules())
    assert torch.equal(logits, gpt.eval()(ids))


def test_the_twin_shares_the_weights():
    gpt = random_gpt(**MODERN)
    twins = dict(inference_copy(gpt).named_parameters())
    assert all(twins[name] is weight for name, weight in gpt.named_parameters())


# ---- the window ----


@given(length=st.integers(1, 100), block_size=st.integers(1, 20))
def test_the_window_is_that_of_the_documented_rule(length, block_size):
    kept = window_length(length, block_size)
    assert kept == len(window_by_the_rule(list(range(length)), block_size))
    assert min(length, block_size / 2) <= kept <= block_size
    assert window_length(length, block_size, exact=True) == min(length, block_size)


@ARCHITECTURES
@pytest.mark.parametrize("exact", [False, True], ids=["halving", "exact"])
@pytest.mark.parametrize("block_size", [10, 5, 2, 1])
def test_greedy_texts_are_those_of_the_slow_way(switches, exact, block_size):
    gpt = random_gpt(block_size=block_size, **switches)
    reference = reference_of(gpt)
    lengths = sorted({1, max(block_size - 1, 1), block_size, 3 * block_size})
    prompts = [random_prompt(length, seed=length) for length in lengths]
    expected = [
        write_greedily(reference, prompt, 3 * block_size, exact)[len(prompt) :]
        for prompt in prompts
    ]
    for prompt, text in zip(prompts, expected):
        assert write(gpt, [prompt], 3 * block_size, GREEDY, exact_window=exact) == [text]
    eight = (prompts * 8)[:8]
    assert write(gpt, eight, 3 * block_size, GREEDY, exact_window=exact) == (expected * 8)[:8]


def test_both_windows_write_the_same_until_the_first_is_full():
    gpt = random_gpt()
    for length in (1, 9):
        n = 10 - length + 1  # the last of these is written after exactly block_size characters
        prompt = [random_prompt(length)]
        assert write(gpt, prompt, n, exact_window=True) == write(gpt, prompt, n)


def test_going_on_with_a_text_is_the_same_as_having_written_it_in_one_go():
    gpt, prompt = random_gpt(), random_prompt(3)
    for config in (GREEDY, WARM):
        whole = write(gpt, [prompt], 40, config)[0]
        for n in range(1, 40, 3):
            assert write(gpt, [prompt + whole[:n]], 40 - n, config)[0] == whole[n:]


# ---- batches, seeds, modes ----


@ARCHITECTURES
def test_each_text_is_the_same_alone_and_in_any_batch(switches):
    gpt = random_gpt(**switches)
    prompts = [random_prompt(length, seed=length) for length in (1, 30, 9, 10, 4, 11, 2, 2)]
    samples = list(range(8))
    stops = [[1, 2], [3], [0, 0, 0]]
    together = write(gpt, prompts, 50, samples=samples, stops=stops)
    for prompt, number, text in zip(prompts, samples, together):
        assert write(gpt, [prompt], 50, samples=[number], stops=stops) == [text]
    assert len({len(text) for text in together}) > 3, "they should have left the batch one by one"


def test_seeds_decide():
    gpt, prompt = random_gpt(), random_prompt(3)
    a, b, c = write(gpt, [prompt] * 3, 30, samples=[0, 1, 0])
    assert a == c != b
    assert write(gpt, [prompt], 30, replace(WARM, seed=1)) != [a]


def test_samples_share_the_reading_of_their_prompt(monkeypatch):
    read = []
    original = GPT.forward

    def forward(self, ids, cache=None):
        read.append(tuple(ids.shape))
        return original(self, ids, cache)

    monkeypatch.setattr(GPT, "forward", forward)
    write(random_gpt(), [random_prompt(6)] * 5 + [random_prompt(6, seed=1)], 2)
    assert read == [(2, 5), (6, 1), (6, 1)]


def test_the_networks_mode_and_the_callers_random_state_stay():
    gpt = random_gpt(dropout=0.5)
    expected = write(gpt, [random_prompt(3)], 30)
    gpt.train()
    state, state_of_python = torch.get_rng_state(), random.getstate()
    steps = generate(gpt, [random_prompt(3)], replace(WARM, max_new_chars=30))
    ids = []
    for pieces in steps:
        assert all(module.training for module in gpt.modules()), "between two characters, too"
        ids += pieces[0].ids
    assert [ids] == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == state_of_python


@ARCHITECTURES
@pytest.mark.parametrize("mixed", [True, False], ids=["autocast", "bfloat16 weights"])
def test_half_precision_writes_too(switches, mixed):
    gpt = random_gpt(**switches)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        texts = write(gpt if mixed else gpt.bfloat16(), [random_prompt(3), random_prompt(7)], 20)
    assert [len(text) for text in texts] == [20, 20]


def test_nothing_to_write():
    steps = generate(random_gpt(), [[1], [2]], GenerationConfig(max_new_chars=0))
    assert [chunk for step in steps for chunk in step] == [(0, [], True), (1, [], True)]


def test_memory_does_not_grow_with_the_text():
    gpt = random_gpt(block_size=8, n_layer=1)
    prompts, config = [[1]] * 32 + [[2, 3]] * 32, GenerationConfig(max_new_chars=10**9)
    steps = generate(gpt, prompts, config, range(64), stops=[[1] * 50])

    def used_after(n: int) -> tuple[int, int]:
        for _ in range(n):
            next(steps)
        gc.collect()
        tensors = sum(o.numel() for o in gc.get_objects() if type(o) is torch.Tensor)
        return tensors, tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        tensors, python = used_after(50)
        tensors_later, python_later = used_after(200)
    finally:
        tracemalloc.stop()
    assert tensors_later <= tensors + 1000
    assert (
        python_later < python + 80_000
    )  # 300 characters of 64 texts, kept as ids, are 153,600 bytes


# ---- the choice ----

settings_of_a_choice = st.builds(
    GenerationConfig,
    temperature=st.sampled_from([0, 1e-300, 1e-3, 0.5, 1, 3, 1e6]) | st.floats(0, 10),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.none() | st.floats(0, 1, exclude_min=True),
)
# whole numbers, so that ties are common
some_logits = st.lists(st.integers(-9, 9) | st.floats(-80, 80, width=32), min_size=1, max_size=8)
some_uniforms = st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 0.5, 1 - 2**-53])


def stated_distribution(logits: list[float], sampling: GenerationConfig) -> list[float]:
    """What temperature, top_k and top_p promise, one after the other, in plain words."""
    likeliest_first = sorted(range(len(logits)), key=lambda id: (-logits[id], id))
    if sampling.temperature == 0:
        return [float(id == likeliest_first[0]) for id in range(len(logits))]
    weights = [math.exp((logit - max(logits)) / sampling.temperature) for logit in logits]
    if sampling.top_k is not None:
        likeliest_first = likeliest_first[: sampling.top_k]
    if (
        sampling.top_p is not None and sampling.top_p < 1
    ):  # a sum meets 1 before the unlikely are in it
        total, together, kept = math.fsum(weights[id] for id in likeliest_first), 0.0, []
        for id in likeliest_first:
            kept.append(id)
            together += weights[id] / total
            if together >= sampling.top_p:
                break
        likeliest_first = kept
    total = math.fsum(weights[id] for id in likeliest_first)
    return [weights[id] / total if id in likeliest_first else 0.0 for id in range(len(logits))]


def sample_one(logits: list[float], sampling: GenerationConfig, uniform: float) -> int:
    uniforms = torch.tensor([uniform], dtype=torch.float64)
    return sample(torch.tensor([logits], dtype=torch.float32), sampling, uniforms).item()


@given(some_logits, settings_of_a_choice, some_uniforms)
@settings(max_examples=300, deadline=None)
def test_only_what_the_settings_leave_is_chosen(logits, sampling, uniform):
    chosen = sample_one(logits, sampling, uniform)
    allowed = stated_distribution(logits, sampling)
    if sampling.top_p is not None:  # a sum that meets top_p within rounding may end either way
        looser = replace(sampling, top_p=min(sampling.top_p + 1e-9, 1))
        allowed = stated_distribution(logits, looser)
    assert 0 <= chosen < len(logits)
    assert allowed[chosen] > 0


@given(
    st.lists(st.integers(-2, 2), min_size=2, max_size=8),
    st.none() | st.integers(1, 8),
    st.none() | st.floats(0.05, 0.95),
)
@settings(max_examples=150, deadline=None)
def test_all_that_the_settings_leave_is_chosen_some_time(logits, top_k, top_p):
    """So exactly k survive top_k, whatever the ties, and top_p leaves neither more nor fewer."""
    sampling = GenerationConfig(temperature=1.0, top_k=top_k, top_p=top_p)
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    chosen = sample(torch.tensor([logits] * 4000, dtype=torch.float32), sampling, grid)
    allowed = stated_distribution(logits, sampling)
    assert set(chosen.tolist()) == {id for id, p in enumerate(allowed) if p > 0}


@given(some_logits, st.integers(1, 5), some_uniforms)
@settings(max_examples=50, deadline=None)
def test_the_choice_depends_on_its_own_row_alone(logits, rows, uniform):
    sampling = GenerationConfig(temperature=0.9, top_k=5, top_p=0.9)
    batch = torch.tensor([logits] + [logits[::-1]] * rows, dtype=torch.float32)
    uniforms = torch.full((rows + 1,), uniform, dtype=torch.float64)
    assert sample(batch, sampling, uniforms)[0].item() == sample_one(logits, sampling, uniform)


def test_temperature_zero_takes_the_first_of_the_most_likely():
    assert sample_one([1, 3, 3, 2], GREEDY, 0.99) == 1


LOGITS = [2.0, 1.5, 1.5, 1.0, 0.3, 0.0, -0.5, -1.0, -2.0, 1.5]


@pytest.mark.parametrize(
    "sampling",
    [
        GenerationConfig(temperature=1.0),
        GenerationConfig(temperature=0.5),
        GenerationConfig(temperature=2.0),
        GenerationConfig(temperature=1.0, top_k=3),  # one of the three that are equal has to go
        GenerationConfig(temperature=1.0, top_p=0.7),
        GenerationConfig(temperature=0.8, top_k=6, top_p=0.9),
    ],
    ids=str,
)
def test_20_000_draws_have_the_stated_distribution(sampling):
    n = 20_000
    uniforms = torch.tensor([uniform(0, 0, position) for position in range(n)], dtype=torch.float64)
    drawn = Counter(sample(torch.tensor([LOGITS] * n), sampling, uniforms).tolist())
    assert p_value(drawn, stated_distribution(LOGITS, sampling), n) > 0.001


@pytest.mark.parametrize(
    "draw",
    [
        lambda n: uniform(0, 0, n),
        lambda n: uniform(7, n, 0),
        lambda n: uniform(n, 0, 0),
        lambda n: uniform(n << 32, 3, 100),
        lambda n: uniform(-n, n % 3, n // 3),
    ],
    ids=["positions", "samples", "seeds", "high bits of seeds", "all of them"],
)
def test_random_numbers_are_uniform_and_independent(draw):
    """Counters lie close together; their random numbers must not."""
    n = 20_000
    numbers = [draw(i) for i in range(n)]
    assert min(numbers) >= 0 and max(numbers) < 1 and len(set(numbers)) > n - 10
    for bins in (lambda x: int(x * 10), lambda x: int(x * 1e5) % 10):  # high and low digits
        drawn = [bins(number) for number in numbers]
        assert p_value(Counter(drawn), [0.1] * 10, n) > 0.001
        for lag in (1, 2, 16):
            pairs = Counter(a * 10 + b for a, b in zip(drawn, drawn[lag:]))
            assert p_value(pairs, [0.01] * 100, n - lag) > 0.001


def test_texts_of_one_seed_do_not_share_numbers():
    numbers = {uniform(1, sample, position) for sample in range(50) for position in range(500)}
    assert len(numbers) > 25_000 - 10


def p_value(drawn: Counter, probabilities: list[float], n: int) -> float:
    """Pearson's chi-squared test; nothing impossible may be drawn at all."""
    possible = [id for id, p in enumerate(probabilities) if p > 0]
    assert set(drawn) <= set(possible)
    statistic = sum(
        (drawn[id] - n * probabilities[id]) ** 2 / (n * probabilities[id]) for id in possible
    )
    freedom = torch.tensor((len(possible) - 1) / 2)
    return torch.special.gammaincc(freedom, torch.tensor(statistic / 2)).item()


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(temperature=-0.1), "temperature is -0.1"),
        (dict(temperature=math.nan), "temperature is nan"),
        (dict(temperature=math.inf), "temperature is inf"),
        (dict(top_k=0), "top_k is 0"),
        (dict(top_k=-5), "top_k is -5"),
        (dict(top_p=0.0), "top_p is 0.0"),
        (dict(top_p=1.1), "top_p is 1.1"),
        (dict(top_p=math.nan), "top_p is nan"),
    ],
)
def test_settings_that_mean_nothing(wrong, message):
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**wrong)


@given(st.integers(0, 2**32 - 1))
def test_mix_is_lowbias32_of_the_number_plus_the_golden_ratio(bits):
    def lowbias32(x: np.uint32) -> np.uint32:  # https://nullprogram.com/blog/2018/07/31/
        x ^= x >> np.uint32(16)
        x *= np.uint32(0x7FEB352D)
        x ^= x >> np.uint32(15)
        x *= np.uint32(0x846CA68B)
        x ^= x >> np.uint32(16)
        return x

    with np.errstate(over="ignore"):
        golden = np.uint32(2**32 * (math.sqrt(5) - 1) / 2)
        assert mix(bits) == lowbias32(np.uint32(bits) + golden)


def test_sampling_parameters_cannot_change_while_a_text_is_written():
    with pytest.raises(FrozenInstanceError):
        WARM.temperature = 0.0


# ---- stopping ----


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=30),
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), max_size=3),
)
def test_a_text_ends_before_the_first_stop_and_nothing_shown_is_taken_back(written, stops):
    text, shown = SequenceState(0, 0, 0, []), []
    for n, id in enumerate(written, start=1):
        piece = text.add(id, stops, last=n == len(written))
        shown += piece.ids
        if piece.last:
            break

    ends = [written[:n] for n in range(1, len(written) + 1)]
    stopped = next((end for end in ends if any(end[-len(stop) :] == stop for stop in stops)), None)
    if stopped is None:
        assert shown == written and n == len(written)
    else:
        longest = max(len(stop) for stop in stops if stopped[-len(stop) :] == stop)
        assert n == len(stopped) and shown == stopped[:-longest]


def test_what_cannot_begin_a_stop_is_shown_at_once():
    text = SequenceState(0, 0, 0, [])
    shown = [text.add(id, [[1, 2, 3]], last=False).ids for id in [0, 1, 2, 0, 1, 1, 2]]
    assert shown == [[0], [], [], [1, 2, 0], [], [1], []]
