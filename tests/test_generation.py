"""Generation compared with recomputation; the window, sampling, stop strings, batches."""

import gc
import math
import random
import tracemalloc
from collections import Counter
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import decode_greedily, reference_of, window_by_the_rule
from test_kv_cache import ARCHITECTURES, random_gpt, random_prompt

from chargpt.generation import (
    GenerationConfig,
    SequenceState,
    generate,
    mix,
    sample,
    uniform,
    window_length,
)
from chargpt.model import UserError

GREEDY = GenerationConfig(temperature=0)
WARM = GenerationConfig(temperature=1.5)


def write(gpt, prompts, max_new, config=WARM, **arguments) -> list[list[int]]:
    """The ids that `generate` appends to each prompt."""
    texts = [[] for _ in prompts]
    config = replace(config, max_new_chars=max_new)
    for chunks in generate(gpt, prompts, config, **arguments):
        for index, ids, _ in chunks:
            texts[index] += ids
    return texts


# ---- the window ----


@given(length=st.integers(1, 100), block_size=st.integers(1, 20))
def test_window_length_follows_the_documented_rule(length, block_size):
    kept = window_length(length, block_size)
    assert kept == len(window_by_the_rule(list(range(length)), block_size))
    assert min(length, block_size / 2) <= kept <= block_size


@ARCHITECTURES
@pytest.mark.parametrize("block_size", [10, 5, 2, 1])
def test_greedy_decoding_equals_recomputing_each_window(switches, block_size):
    gpt = random_gpt(block_size=block_size, **switches)
    reference = reference_of(gpt)
    lengths = sorted({1, max(block_size - 1, 1), block_size, 3 * block_size})
    prompts = [random_prompt(length, seed=length) for length in lengths]
    expected = [
        decode_greedily(reference, prompt, 3 * block_size)[len(prompt) :] for prompt in prompts
    ]
    for prompt, text in zip(prompts, expected):
        assert write(gpt, [prompt], 3 * block_size, GREEDY) == [text]
    eight = (prompts * 8)[:8]
    assert write(gpt, eight, 3 * block_size, GREEDY) == (expected * 8)[:8]


def test_continuing_a_text_equals_generating_it_in_one_go():
    gpt, prompt = random_gpt(), random_prompt(3)
    for config in (GREEDY, WARM):
        whole = write(gpt, [prompt], 40, config)[0]
        for n in range(1, 40, 3):
            assert write(gpt, [prompt + whole[:n]], 40 - n, config)[0] == whole[n:]


# ---- batches, seeds, train and eval mode ----


@ARCHITECTURES
def test_each_text_is_the_same_alone_and_in_any_batch(switches):
    gpt = random_gpt(**switches)
    prompts = [random_prompt(length, seed=length) for length in (1, 30, 9, 10, 4, 11, 2, 2)]
    samples = list(range(8))
    stops = [[1, 2], [3], [0, 0, 0]]
    together = write(gpt, prompts, 50, samples=samples, stops=stops)
    for prompt, number, text in zip(prompts, samples, together):
        assert write(gpt, [prompt], 50, samples=[number], stops=stops) == [text]
    assert len({len(text) for text in together}) > 3, "they should have ended at different steps"


def test_texts_depend_on_seed_and_sample():
    gpt, prompt = random_gpt(), random_prompt(3)
    a, b, c = write(gpt, [prompt] * 3, 30, samples=[0, 1, 0])
    assert a == c != b
    assert write(gpt, [prompt], 30, replace(WARM, seed=1)) != [a]


def test_equal_prompts_are_prefilled_once():
    shapes, gpt = [], random_gpt()
    gpt.register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape)))
    write(gpt, [random_prompt(6)] * 5 + [random_prompt(6, seed=1)], 2)
    assert shapes == [(2, 5), (6, 1), (6, 1)]


def test_modes_of_the_network_and_the_random_state_do_not_change():
    gpt = random_gpt(dropout=0.5)
    expected = write(gpt, [random_prompt(3)], 30)
    gpt.train()
    gpt.blocks[0].eval()
    modes = [module.training for module in gpt.modules()]
    state, state_of_python = torch.get_rng_state(), random.getstate()
    steps = generate(gpt, [random_prompt(3)], replace(WARM, max_new_chars=30))
    ids = []
    for chunks in steps:
        assert [module.training for module in gpt.modules()] == modes, "between two steps, too"
        ids += chunks[0].ids
    assert [ids] == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == state_of_python


def test_forward_hooks_take_effect():
    gpt, calls = random_gpt(), []
    before = write(gpt, [random_prompt(3)], 5)

    def negate(module, args, output):
        calls.append(output.shape)
        return -output

    gpt.head.register_forward_hook(negate)
    assert write(gpt, [random_prompt(3)], 5) != before
    assert len(calls) == 5 + 1  # and once while prefilling


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("config", [GREEDY, WARM], ids=["greedy", "warm"])
def test_a_network_with_nan_or_infinite_weights_is_reported_as_broken(number, config):
    gpt = random_gpt()
    with torch.no_grad():
        gpt.head.weight[3, 3] = number
    with pytest.raises(UserError, match="logits are NaN or infinite"):
        write(gpt, [[1, 2]], 3, config)


@ARCHITECTURES
@pytest.mark.parametrize("mixed", [True, False], ids=["autocast", "bfloat16 weights"])
def test_generation_in_half_precision(switches, mixed):
    gpt = random_gpt(**switches)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        texts = write(gpt if mixed else gpt.bfloat16(), [random_prompt(3), random_prompt(7)], 20)
    assert [len(text) for text in texts] == [20, 20]


def test_zero_new_characters():
    steps = generate(random_gpt(), [[1], [2]], GenerationConfig(max_new_chars=0))
    assert [chunk for step in steps for chunk in step] == [(0, [], True), (1, [], True)]


def test_memory_use_does_not_grow_with_the_text():
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


# ---- sampling ----

sampling_settings = st.builds(
    GenerationConfig,
    temperature=st.sampled_from([0, 1e-300, 1e-3, 0.5, 1, 3, 1e6]) | st.floats(0, 10),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.none() | st.floats(0, 1, exclude_min=True),
)
# integers, so that ties are common
some_logits = st.lists(st.integers(-9, 9) | st.floats(-80, 80, width=32), min_size=1, max_size=8)
some_uniforms = st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 0.5, 1 - 2**-53])


def stated_distribution(logits: list[float], sampling: GenerationConfig) -> list[float]:
    """Probabilities by the definitions of temperature, top_k and top_p, in plain Python."""
    likeliest_first = sorted(range(len(logits)), key=lambda id: (-logits[id], id))
    if sampling.temperature == 0:
        return [float(id == likeliest_first[0]) for id in range(len(logits))]
    weights = [math.exp((logit - max(logits)) / sampling.temperature) for logit in logits]
    if sampling.top_k is not None:
        likeliest_first = likeliest_first[: sampling.top_k]
    if (
        sampling.top_p is not None and sampling.top_p < 1
    ):  # a sum reaches 1 before unlikely ids are included
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


@given(some_logits, sampling_settings, some_uniforms)
@settings(max_examples=300, deadline=None)
def test_only_ids_that_the_settings_allow_are_sampled(logits, sampling, uniform):
    chosen = sample_one(logits, sampling, uniform)
    allowed = stated_distribution(logits, sampling)
    if sampling.top_p is not None:  # a sum that equals top_p up to rounding may count either way
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
def test_all_ids_that_the_settings_allow_are_sampled(logits, top_k, top_p):
    """top_k keeps exactly k ids even with ties, and top_p neither more nor fewer than needed."""
    sampling = GenerationConfig(temperature=1.0, top_k=top_k, top_p=top_p)
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    chosen = sample(torch.tensor([logits] * 4000, dtype=torch.float32), sampling, grid)
    allowed = stated_distribution(logits, sampling)
    assert set(chosen.tolist()) == {id for id, p in enumerate(allowed) if p > 0}


@given(some_logits, st.integers(1, 5), some_uniforms)
@settings(max_examples=50, deadline=None)
def test_each_row_is_sampled_independently(logits, rows, uniform):
    sampling = GenerationConfig(temperature=0.9, top_k=5, top_p=0.9)
    batch = torch.tensor([logits] + [logits[::-1]] * rows, dtype=torch.float32)
    uniforms = torch.full((rows + 1,), uniform, dtype=torch.float64)
    assert sample(batch, sampling, uniforms)[0].item() == sample_one(logits, sampling, uniform)


def test_temperature_zero_takes_the_first_of_the_most_likely_ids():
    assert sample_one([1, 3, 3, 2], GREEDY, 0.99) == 1


LOGITS = [2.0, 1.5, 1.5, 1.0, 0.3, 0.0, -0.5, -1.0, -2.0, 1.5]


@pytest.mark.parametrize(
    "sampling",
    [
        GenerationConfig(temperature=1.0),
        GenerationConfig(temperature=0.5),
        GenerationConfig(temperature=2.0),
        GenerationConfig(temperature=1.0, top_k=3),  # one of three equal logits is excluded
        GenerationConfig(temperature=1.0, top_p=0.7),
        GenerationConfig(temperature=0.8, top_k=6, top_p=0.9),
    ],
    ids=str,
)
def test_20_000_samples_have_the_stated_distribution(sampling):
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
    """Adjacent counters must give independent random numbers."""
    n = 20_000
    numbers = [draw(i) for i in range(n)]
    assert min(numbers) >= 0 and max(numbers) < 1 and len(set(numbers)) > n - 10
    for bins in (lambda x: int(x * 10), lambda x: int(x * 1e5) % 10):  # high and low digits
        drawn = [bins(number) for number in numbers]
        assert p_value(Counter(drawn), [0.1] * 10, n) > 0.001
        for lag in (1, 2, 16):
            pairs = Counter(a * 10 + b for a, b in zip(drawn, drawn[lag:]))
            assert p_value(pairs, [0.01] * 100, n - lag) > 0.001


def test_texts_with_one_seed_do_not_share_random_numbers():
    numbers = {uniform(1, sample, position) for sample in range(50) for position in range(500)}
    assert len(numbers) > 25_000 - 10


def p_value(drawn: Counter, probabilities: list[float], n: int) -> float:
    """Pearson's chi-squared test; no id of probability 0 may occur."""
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
def test_invalid_settings(wrong, message):
    with pytest.raises(UserError, match=message):
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


def test_sampling_parameters_are_immutable():
    with pytest.raises(FrozenInstanceError):
        WARM.temperature = 0.0


# ---- stopping ----


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=30),
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), max_size=3),
)
def test_a_text_ends_before_the_first_stop_string(written, stops):
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


def test_ids_that_are_too_old_for_a_stop_string_are_returned():
    text = SequenceState(0, 0, 0, [])
    shown = [text.add(id, [[1, 2, 3], [7]], last=False).ids for id in [0, 1, 2, 0, 1]]
    assert shown == [[], [], [0], [1], [2]]
    assert SequenceState(0, 0, 0, []).add(5, [], last=False).ids == [5]
    assert SequenceState(0, 0, 0, []).add(5, [[7]], last=False).ids == [5]
