"""Generation: sampling the next id, and doing so again and again with a KV cache.

    prompt -> window -> GPT with a KVCache -> logits (B, V) -> sample -> id -> window -> ...

A network looks at no more than block_size characters. When a text has outgrown that, its newest
half is read afresh, and generation goes on from there: the network always sees at least half a
window, and a character costs the same however long the text. (Simply dropping the oldest character
would not do: in all layers but the first, what is remembered of the others was computed while it
was still there; and learned positions would all move by one.)
"""

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from chargpt.model.gpt import GPT, KVCache, check


@dataclass(frozen=True)
class GenerationConfig:
    """Sampling parameters: what decides how a prompt goes on.

    The same network, prompt and settings give the same text.

    Raises:
        ValueError: a setting that means nothing; the message names it.
    """

    max_new_chars: int = 500
    """The most characters to write after the prompt."""
    temperature: float = 0.8
    """Below 1 the likely characters become likelier, above 1 the unlikely; 0 always takes the most
    likely one."""
    top_k: int | None = None
    """Sample among this many of the most likely characters."""
    top_p: float | None = None
    """Nucleus sampling: among the fewest most likely characters that have this probability
    together (Holtzman et al. 2019, arXiv:1904.09751), after temperature and top_k."""
    stop: list[str] | str | None = field(default_factory=list)
    """End before the first of these strings that is written after the prompt. On the command line a
    list, where \\n is a newline: '["\\n\\n", "THE END"]'."""
    seed: int = 0
    """Seed of the random choices; another seed, another text."""
    exact_window: bool = False
    """Past block_size characters, look at exactly the newest block_size, and read them all again
    for each character: slow. Otherwise the window falls to its newest half whenever it is full."""

    def __post_init__(self) -> None:
        check(self, "max_new_chars", "at least 0", lambda n: n >= 0)
        check(self, "temperature", "0 or a positive number", lambda t: 0 <= t < math.inf)
        check(self, "top_k", "at least 1", lambda k: k >= 1)
        check(self, "top_p", "greater than 0 and at most 1", lambda p: 0 < p <= 1)
        if "" in self.stop_strings:
            raise ValueError("a stop string is empty; it would end every text before it begins")

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


def uniform(seed: int, sample: int, position: int) -> float:
    """A random number in [0, 1): a pure function of its arguments (a counter-based generator).

    So a text does not depend on what else is written beside it, and going on with a text gives what
    writing it in one go would have given. `export/page.js` has the same few lines.

    Args:
        seed: any whole number; its lowest 64 bits count.
        sample: which of several texts from the same seed.
        position: of the character in its text.
    """
    bits = mix(position)
    for word in (sample, seed, seed >> 32):
        bits = mix(bits ^ word & 0xFFFFFFFF)
    return bits / 2**32


def mix(bits: int) -> int:
    """A hash of 32 bits in which every bit depends on every other (lowbias32, C. Wellons 2018)."""
    bits = (bits + 0x9E3779B9) & 0xFFFFFFFF  # 0 would stay 0
    bits = (bits ^ bits >> 16) * 0x7FEB352D & 0xFFFFFFFF
    bits = (bits ^ bits >> 15) * 0x846CA68B & 0xFFFFFFFF
    return bits ^ bits >> 16


def sample(logits: Tensor, config: GenerationConfig, uniforms: Tensor) -> Tensor:
    """Sample the next id of each text, (B, V) to (B,), with temperature, top-k and top-p.

    Ids share the interval [0, 1) in their order, each by its probability, and the uniform number
    says which one is hit: logits that differ by a rounding error almost always give the same id.

    Args:
        logits: (B, V) on the CPU.
        config: temperature, top_k and top_p, applied in this order; of equal logits the one with
            the lowest id counts as the most likely.
        uniforms: (B,) float64 in [0, 1).
    """
    if config.temperature == 0:
        return logits.argmax(-1)
    nucleus = config.top_p is not None and config.top_p < 1
    if config.top_k is not None or nucleus:
        likeliest_first = logits.argsort(dim=-1, descending=True, stable=True)
    logits = logits.double()
    logits = (logits - logits.amax(-1, keepdim=True)) / config.temperature
    if config.top_k is not None:
        logits = logits.scatter(-1, likeliest_first[:, config.top_k :], -math.inf)
    probabilities = logits.softmax(-1)
    if nucleus:
        falling = probabilities.gather(-1, likeliest_first)
        before = falling.cumsum(-1) - falling  # what the likelier ones have together
        falling = falling.masked_fill(before >= config.top_p, 0)
        probabilities = torch.zeros_like(falling).scatter(-1, likeliest_first, falling)
    cumulative = probabilities.cumsum(-1)
    cumulative = cumulative / cumulative[:, -1:]  # ends in exactly 1, which no number reaches
    return torch.searchsorted(cumulative, uniforms.unsqueeze(-1), right=True).squeeze(-1)


class Chunk(NamedTuple):
    """What is new of one text. The last of each is marked, and may be empty."""

    row: int  # of the text among the prompts
    ids: list[int]
    last: bool


@dataclass
class SequenceState:
    """A text while it is generated."""

    row: int  # among the prompts
    sample: int
    length: int  # characters in all, those of the prompt included
    window: list[int]  # the newest ids, which the network looks at
    held: list[int] = field(default_factory=list)  # generated, perhaps the beginning of a stop

    def add(self, id: int, stops: Sequence[Sequence[int]], last: bool) -> Chunk:
        """Add one id; what may be the beginning of a stop sequence waits for the next one."""
        self.length += 1
        self.window.append(id)
        self.held.append(id)
        begins = len(self.held)  # where a stop may begin
        for start in range(len(self.held)):
            tail = self.held[start:]
            if tail in stops:
                return Chunk(self.row, self.held[:start], True)
            if any(stop[: len(tail)] == tail for stop in stops):
                begins = min(begins, start)
        free = len(self.held) if last else begins
        chunk = Chunk(self.row, self.held[:free], last)
        self.held = self.held[free:]
        return chunk


def window_length(length: int, block_size: int, exact: bool = False) -> int:
    """How many of the newest characters of a text the network looks at.

    All of them up to block_size. Then, if `exact`, the newest block_size: a sliding window. Else
    the window falls to half of block_size (rounded up) whenever it would outgrow it, and grows
    again from there. With block_size 4 and lengths from 1 on: 1 2 3 4 2 3 4 2 3; exact: 1 2 3 4 4.
    It depends on nothing but the length, so that going on with a text is the same as having
    generated it in one go.
    """
    if length <= block_size:
        return length
    least = block_size if exact else (block_size + 1) // 2
    return least + (length - block_size - 1) % (block_size - least + 1)


@torch.inference_mode()
def generate(
    gpt: GPT,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    samples: Sequence[int] | None = None,
    stops: Sequence[Sequence[int]] = (),
) -> Iterator[list[Chunk]]:
    """Continue each prompt as if it were alone, all of them in one batch.

    Dropout is off while the network is at work, whatever its mode, and no random state is touched.

    Args:
        gpt: the network.
        prompts: at least one id each.
        config: sampling parameters.
        samples: which sample of its prompt each text is; the first unless given.
        stops: ids of the stop strings; a text ends before the first of these that it generates.

    Yields:
        what is new of each text after one step, never empty but perhaps the last of a text
    """
    if config.max_new_chars == 0:
        yield [Chunk(row, [], True) for row in range(len(prompts))]
        return
    block_size = gpt.config.block_size
    stops = [list(stop) for stop in stops]
    least = window_length(block_size + 1, block_size, config.exact_window)  # just after it fell
    texts = []
    for row, prompt in enumerate(prompts):
        window = list(prompt[-window_length(len(prompt), block_size, config.exact_window) :])
        texts.append(SequenceState(row, samples[row] if samples else 0, len(prompt), window))
    network = inference_copy(gpt)
    # All but the newest character of each window; the loop below reads that one.
    cache = KVCache(gpt, len(texts), end=max(len(text.window) for text in texts) - 1)
    prefill(network, cache, texts, range(len(texts)))
    for left in reversed(range(config.max_new_chars)):
        newest = torch.tensor([text.window[-1:] for text in texts], device=cache.memory.device)
        logits = network(newest, cache)[:, -1].to("cpu", torch.float32)
        uniforms = [uniform(config.seed, text.sample, text.length) for text in texts]
        ids = sample(logits, config, torch.tensor(uniforms, dtype=torch.float64)).tolist()
        chunks = [text.add(id, stops, last=left == 0) for text, id in zip(texts, ids)]
        yield [chunk for chunk in chunks if chunk.ids or chunk.last]

        unfinished = [row for row, chunk in enumerate(chunks) if not chunk.last]
        if not unfinished:
            return
        if len(unfinished) < len(texts):
            texts = [texts[row] for row in unfinished]
            cache.keep(unfinished)
        full = [row for row, text in enumerate(texts) if len(text.window) > block_size]
        for row in full:
            del texts[row].window[:-least]
        prefill(network, cache, texts, full)


def prefill(
    network: GPT, cache: KVCache, texts: Sequence[SequenceState], rows: Sequence[int]
) -> None:
    """Prefill: read the windows of these rows but for the newest character, the next step's input.

    Windows of one length are one batch, and those that are the same are read once.
    """
    by_length: dict[int, dict[tuple[int, ...], list[int]]] = {}
    for row in rows:
        window = tuple(texts[row].window[:-1])
        by_length.setdefault(len(window), {}).setdefault(window, []).append(row)
    for length, sharing in by_length.items():
        fresh = KVCache(network, len(sharing))
        if length > 0:
            network(torch.tensor(list(sharing), device=cache.memory.device), fresh)
        sources = [source for source, same in enumerate(sharing.values()) for _ in same]
        cache.put([row for same in sharing.values() for row in same], fresh, sources)


def inference_copy(gpt: GPT) -> GPT:
    """A copy of the network for inference: it shares the weights, has no dropout and no hooks.

    nn.Module finds layers and weights where Python looks for attributes last, and looks for hooks
    at each call. With one character at a time that is an eighth of the time (tests/benchmarks/
    LOG.md). So in this copy every part lies where Python looks first, and calling a module is
    calling its forward.

    Raises:
        ValueError: the network has no numbers, since it was moved to torch's meta device.
    """
    if any(weight.is_meta for weight in gpt.parameters()):
        raise ValueError(
            "the network is on the meta device, where weights have no numbers\n"
            "load it anew, and move it to cpu, cuda or mps"
        )
    # deepcopy shares what it is told of.
    weights = {id(weight): weight for weight in gpt.parameters()}
    copy = deepcopy(gpt, weights).eval()
    modules = list(copy.modules())
    forwards: dict[type, Any] = {type(module): type(module).forward for module in modules}
    forwards[nn.Dropout] = nn.Identity.forward
    kinds = {kind: type(kind.__name__, (kind,), {"__call__": f}) for kind, f in forwards.items()}
    for module in modules:
        vars(module).update(module.named_parameters(recurse=False))
        vars(module).update(module.named_children())
        module.__class__ = kinds[type(module)]
    return copy
