"""Generation: sampling the next id, again and again, with a KV cache.

prompt -> window -> GPT with a KVCache -> logits (B, V) -> sample -> id -> window -> ...
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from chargpt.model import GPT, KVCache, UserError
from chargpt.model.config import check


@dataclass(frozen=True)
class GenerationConfig:
    """Sampling parameters. The same network, prompt and parameters give the same text."""

    max_new_chars: int = 500
    """Maximum number of characters to generate after the prompt."""
    temperature: float = 0.8
    """Logits are divided by it: below 1, likely characters become more likely; above 1, less; 0
    always takes the most likely one (greedy decoding)."""
    top_k: int | None = None
    """Sample only from this many of the most likely characters."""
    top_p: float | None = None
    """Nucleus sampling: sample from the smallest set of most likely characters whose total
    probability reaches top_p (arXiv:1904.09751), after temperature and top_k."""
    stop: list[str] | str | None = field(default_factory=list)
    """Stop when any of these strings is generated; the string itself is not included. On the
    command line, pass a list, in which \\n is a newline: '["\\n\\n", "THE END"]'."""
    seed: int = 0
    """Random seed for sampling."""

    def __post_init__(self) -> None:
        check(self, "max_new_chars", "at least 0", lambda n: n >= 0)
        check(self, "temperature", "0 or a positive number", lambda t: 0 <= t < math.inf)
        check(self, "top_k", "at least 1", lambda k: k >= 1)
        check(self, "top_p", "greater than 0 and at most 1", lambda p: 0 < p <= 1)
        if "" in self.stop_strings:
            raise UserError("a stop string is empty; every text would end before it begins")

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


def uniform(seed: int, sample: int, position: int) -> float:
    """A random number in [0, 1) for a character of a text (a counter-based generator).

    It depends only on its arguments (of the seed, on the low 64 bits), so a text is the same in
    any batch, whether or not it is generated in parts. `export/page.js` has the same function.
    """
    bits = mix(position)
    for word in (sample, seed, seed >> 32):
        bits = mix(bits ^ word & 0xFFFFFFFF)
    return bits / 2**32


def mix(bits: int) -> int:
    """A 32-bit hash: each output bit depends on all input bits (lowbias32, C. Wellons 2018)."""
    bits = (bits + 0x9E3779B9) & 0xFFFFFFFF  # 0 would stay 0
    bits = (bits ^ bits >> 16) * 0x7FEB352D & 0xFFFFFFFF
    bits = (bits ^ bits >> 15) * 0x846CA68B & 0xFFFFFFFF
    return bits ^ bits >> 16


def sample(logits: Tensor, config: GenerationConfig, uniforms: Tensor) -> Tensor:
    """Sample the next id of each text, (B, V) on the CPU -> (B,).

    Inverse-CDF sampling: the first id whose cumulative probability exceeds the random number, so
    that logits that differ by a rounding error almost always give the same id. Of equal logits,
    the one with the lowest id counts as the most likely. `uniforms` are (B,) float64 in [0, 1).
    """
    if config.temperature == 0:
        return logits.argmax(-1)
    top_p = config.top_p or 1.0
    if config.top_k or top_p < 1:
        likeliest_first = logits.argsort(dim=-1, descending=True, stable=True)
    logits = logits.double()
    logits = (logits - logits.amax(-1, keepdim=True)) / config.temperature
    if config.top_k:
        logits = logits.scatter(-1, likeliest_first[:, config.top_k :], -math.inf)
    probs = logits.softmax(-1)
    if top_p < 1:
        sorted_probs = probs.gather(-1, likeliest_first)
        before = sorted_probs.cumsum(-1) - sorted_probs  # total probability of more likely ids
        sorted_probs = sorted_probs.masked_fill(before >= top_p, 0)
        probs = probs.scatter(-1, likeliest_first, sorted_probs)
    cumulative = probs.cumsum(-1)
    cumulative = cumulative / cumulative[:, -1:]  # ends in exactly 1, above every uniform number
    return torch.searchsorted(cumulative, uniforms.unsqueeze(-1), right=True).squeeze(-1)


class Chunk(NamedTuple):
    """New ids of one text."""

    row: int  # index of the prompt
    ids: list[int]
    last: bool  # of this text; the last chunk may be empty


@dataclass
class SequenceState:
    """A text being generated."""

    row: int  # index of the prompt
    sample: int
    length: int  # characters in all, including the prompt
    window: list[int]  # the newest ids, which the network sees
    pending: list[int] = field(default_factory=list)  # generated, possibly part of a stop sequence

    def add(self, id: int, stops: Sequence[list[int]], last: bool) -> Chunk:
        """Add one id; ids that a stop sequence might include stay pending."""
        self.length += 1
        self.window.append(id)
        self.pending.append(id)
        found = max((len(stop) for stop in stops if self.pending[-len(stop) :] == stop), default=0)
        held = found if found or last else max(map(len, stops), default=1) - 1
        ready = max(0, len(self.pending) - held)
        ids, self.pending = self.pending[:ready], self.pending[ready:]
        return Chunk(self.row, ids, last or found > 0)


def window_length(length: int, block_size: int) -> int:
    """How many of the newest characters of a text the network sees: at most block_size.

    A full window is cut to its newest half (rounded up) and grows again: dropping just the oldest
    keys and values would be wrong, since those of the others were computed from them. The result
    depends only on the arguments, so that continuing a text is the same as generating it in one go.
    """
    if length <= block_size:
        return length
    min_window = (block_size + 1) // 2
    return min_window + (length - block_size - 1) % (block_size - min_window + 1)


@torch.inference_mode()
def generate(
    gpt: GPT,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    samples: Sequence[int] | None = None,
    stops: Sequence[list[int]] = (),
) -> Iterator[list[Chunk]]:
    """Continue all prompts (at least one id each) in one batch, each as if it were alone.

    Each step yields one Chunk for each text that has new ids or finishes. A text finishes just
    before its first stop sequence, or at its full length. `samples[i]` is the index of text i among
    the samples of its prompt (default 0). No random state is used or changed.
    """
    if config.max_new_chars == 0:
        yield [Chunk(row, [], True) for row in range(len(prompts))]
        return
    texts = [
        SequenceState(row, samples[row] if samples else 0, len(prompt), list(prompt))
        for row, prompt in enumerate(prompts)
    ]
    cache = KVCache(gpt, len(texts), max(map(len, prompts)) + config.max_new_chars)
    for remaining in reversed(range(config.max_new_chars)):
        with eval_mode(gpt):
            prefill(gpt, cache, texts)
            newest = torch.tensor([text.window[-1:] for text in texts], device=cache.ids.device)
            logits = gpt(newest, cache)[:, -1].to("cpu", torch.float32)
        if not math.isfinite(logits.amax()):
            raise UserError("the network's logits are NaN or infinite")
        uniforms = [uniform(config.seed, text.sample, text.length) for text in texts]
        ids = sample(logits, config, torch.tensor(uniforms, dtype=torch.float64)).tolist()
        chunks = [text.add(id, stops, remaining == 0) for text, id in zip(texts, ids)]
        yield [chunk for chunk in chunks if chunk.ids or chunk.last]

        unfinished = [row for row, chunk in enumerate(chunks) if not chunk.last]
        if not unfinished:
            return
        if len(unfinished) < len(texts):
            texts = [texts[row] for row in unfinished]
            cache.select_rows(unfinished)


def prefill(gpt: GPT, cache: KVCache, texts: Sequence[SequenceState]) -> None:
    """Fill the cache for new texts and for windows just cut, up to but excluding the newest id.

    Windows of equal length form a batch; identical ones are computed once.
    """
    by_length: dict[int, dict[tuple[int, ...], list[int]]] = {}
    for row, text in enumerate(texts):
        length = window_length(text.length, gpt.config.block_size) - 1
        if cache.lengths[row] != length:
            del text.window[: -length - 1]
            window = tuple(text.window[:-1])
            by_length.setdefault(length, {}).setdefault(window, []).append(row)
    for length, windows in by_length.items():
        source = KVCache(gpt, len(windows), capacity=length)
        if length > 0:
            gpt(torch.tensor(list(windows), device=cache.ids.device), source)
        for source_row, same in enumerate(windows.values()):
            cache.copy_row(source, source_row, same)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside the `with` statement, then the previous modes."""
    training = [part for part in module.modules() if part.training] if module.training else []
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
