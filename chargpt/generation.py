"""Writing, one character after the other: choosing the next id, remembering the ones before.

    prompt -> window -> GPT with a KVCache -> logits (B, V) -> choose -> id -> window -> ...

A network looks at no more than block_size characters, and its positions cannot slide: a character
that leaves the window would move all the others, and every remembered key and value would be wrong.
So when the window is full, its newest half is read afresh, and writing goes on from there. The
network always sees at least half a window, and a character costs the same however long the text.
"""

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor, nn

from chargpt.model import GPT


@dataclass(frozen=True)
class Sampling:
    """How the next character is chosen from the network's probabilities.

    Args:
        temperature: below 1 the likely characters become likelier, above 1 the unlikely; 0 always
            takes the most likely one.
        top_k: choose among this many of the most likely characters.
        top_p: choose among the fewest most likely characters that have this probability together
            (Holtzman et al. 2019, arXiv:1904.09751), after temperature and top_k.

    Raises:
        ValueError: a setting that means nothing; the message names it.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be greater than 0 and at most 1")


def choose(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> Tensor:
    """The next id of each row: a function of its arguments and nothing else.

    Ids share the interval [0, 1) in their order, each by its probability, and the uniform number
    says which one is hit: logits that differ by a rounding error almost always give the same id.

    Args:
        logits: (B, V) on the CPU.
        sampling: temperature, top_k and top_p, applied in this order; of equal logits the one with
            the lowest id counts as the most likely.
        uniforms: (B,) float64 in [0, 1).

    Returns:
        ids: (B,)
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    nucleus = sampling.top_p is not None and sampling.top_p < 1
    if sampling.top_k is not None or nucleus:
        likeliest_first = logits.argsort(dim=-1, descending=True, stable=True)
    logits = logits.double()
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None:
        logits = logits.scatter(-1, likeliest_first[:, sampling.top_k :], -math.inf)
    probabilities = logits.softmax(-1)
    if nucleus:
        falling = probabilities.gather(-1, likeliest_first)
        before = falling.cumsum(-1) - falling  # what the likelier ones have together
        falling = falling.masked_fill(before >= sampling.top_p, 0)
        probabilities = torch.zeros_like(falling).scatter(-1, likeliest_first, falling)
    cumulative = probabilities.cumsum(-1)
    cumulative = cumulative / cumulative[:, -1:]  # ends in exactly 1, which no uniform number reaches
    return torch.searchsorted(cumulative, uniforms.unsqueeze(-1), right=True).squeeze(-1)


class LayerCache(NamedTuple):
    """What one attention layer remembers, in a step that adds T positions to it."""

    keys: Tensor  # (B, H, S, D), the new ones among them
    values: Tensor
    where: tuple  # the index of the new ones
    mask: Tensor | None  # which positions each new one may look at; all before it if None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Remember T more keys and values, (B, H, T, D) each; returns all of them, and the mask."""
        if k.dtype != self.keys.dtype:  # autocast made them narrower
            k, v = k.to(self.keys.dtype), v.to(self.keys.dtype)
        self.keys[self.where] = k
        self.values[self.where] = v
        return self.keys, self.values, self.mask


class KVCache:
    """Keys and values of the characters that each row of a batch has behind it.

    Rows may have different lengths, so that prompts of different lengths are one batch.

    Args:
        gpt: the network that will use it.
        rows: sequences in the batch, B.
        capacity: most characters in a row; block_size unless given.
    """

    def __init__(self, gpt: GPT, rows: int, capacity: int | None = None) -> None:
        capacity = gpt.block_size if capacity is None else capacity
        # zeros, not empty: what a mask hides is still multiplied, and 0 * nan is nan
        zeros = gpt.token_embedding.weight.new_zeros
        # the keys of the first layer, its values, the keys of the second, ...
        self.memory = zeros(2 * len(gpt.blocks), rows, gpt.n_head, capacity, gpt.head_size)
        self.lengths = [0] * rows
        self.newest = zeros((rows, 2), dtype=torch.long)  # ids; filled where embeddings need them

    def advance(self, T: int) -> tuple[Tensor, list[LayerCache]]:
        """Count T more characters in every row, and say where they belong.

        Returns:
            positions: (B, T), or (T,) where they are the same in all rows
            layers: what each attention layer needs for them
        """
        shortest, longest, device = min(self.lengths), max(self.lengths), self.memory.device
        end = longest + T
        if shortest == longest:
            positions = torch.arange(longest, end, device=device)
            where = (slice(None), slice(None), slice(longest, end))
        else:
            positions = torch.tensor(self.lengths, device=device).unsqueeze(1)
            positions = positions + torch.arange(T, device=device)  # (B, T)
            rows, heads = (torch.arange(size, device=device) for size in self.memory.shape[1:3])
            where = (rows[:, None, None], heads[:, None], positions.unsqueeze(1))  # together (B, H, T)
        mask = None  # enough for one new character after all others, or a start from nothing
        if shortest < longest or (T > 1 and longest > 0):
            columns = torch.arange(end, device=device)
            mask = columns <= positions[..., None, :, None]  # (1, T, S) or (B, 1, T, S)
        self.lengths = [length + T for length in self.lengths]
        # cut out of all layers at once, since a slice for each is slower
        parts = self.memory.narrow(3, 0, end).unbind()
        return positions, [LayerCache(k, v, where, mask) for k, v in zip(parts[::2], parts[1::2])]

    def shift(self, ids: Tensor) -> Tensor:
        """Take in ids (B, T), and give back the two before them, (B, 2); 0 where there are none."""
        before, self.newest = self.newest, torch.cat((self.newest, ids), dim=1)[:, -2:]
        return before

    def put(self, rows: Sequence[int], source: "KVCache", source_rows: Sequence[int]) -> None:
        """Replace what `rows` remember by what `source_rows` of another cache do, all of one length."""
        T = source.lengths[0]
        self.memory[:, rows, :, :T] = source.memory[:, source_rows, :, :T]
        self.newest[rows] = source.newest[source_rows]
        for row in rows:
            self.lengths[row] = T

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all rows but these."""
        self.memory = self.memory[:, rows]
        self.newest = self.newest[rows]
        self.lengths = [self.lengths[row] for row in rows]


@dataclass
class Text:
    """A text as it grows."""

    index: int  # its place among the prompts
    window: list[int]  # the ids that the network looks at
    random: Random
    held: list[int] = field(default_factory=list)  # written, perhaps the beginning of a stop

    def add(self, id: int, stops: Sequence[Sequence[int]], last: bool) -> "NewIds":
        """Write one more id; what may be the beginning of a stop waits for the next one."""
        self.window.append(id)
        self.held.append(id)
        tails = [(start, self.held[start:]) for start in range(len(self.held))]
        for start, tail in tails:
            if tail in stops:
                return NewIds(self.index, self.held[:start], True)
        begins = (start for start, tail in tails if any(stop[: len(tail)] == tail for stop in stops))
        free = len(self.held) if last else next(begins, len(self.held))
        new = NewIds(self.index, self.held[:free], last)
        self.held = self.held[free:]
        return new


class NewIds(NamedTuple):
    """What is new of one text. The last of each is marked, and may be empty."""

    index: int  # of the prompt that it follows
    ids: list[int]
    last: bool


def window_length(length: int, block_size: int, exact: bool = False) -> int:
    """How many of the newest characters of a text the network looks at.

    All of them up to block_size. Then, exactly: the newest block_size. Else the window falls to
    half of block_size (rounded up) whenever it would outgrow it, and grows again from there. It
    depends on nothing but the length, so that going on with a text is the same as having written
    it in one go.
    """
    if length <= block_size:
        return length
    least = block_size if exact else (block_size + 1) // 2
    return least + (length - block_size - 1) % (block_size - least + 1)


@torch.inference_mode()
def generate(
    gpt: GPT,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[str],
    max_new: int,
    sampling: Sampling,
    stops: Sequence[Sequence[int]] = (),
    exact_window: bool = False,
) -> Iterator[list[NewIds]]:
    """Continue each prompt as if it were alone, all of them in one batch.

    Dropout is off while the network is at work, whatever its mode, and no random state but each
    text's own is touched.

    Args:
        gpt: the network.
        prompts: at least one id each.
        seeds: of each text's random numbers.
        max_new: ids to write at most, each.
        sampling: how they are chosen.
        stops: a text ends before the first of these that it writes.
        exact_window: let the network look at exactly the newest block_size characters, which costs
            a pass over all of them for each; see `window_length`.

    Yields:
        what is new of each text after one step, never empty but perhaps the last of a text
    """
    if max_new == 0:
        yield [NewIds(index, [], True) for index in range(len(prompts))]
        return
    block_size = gpt.block_size
    least = window_length(block_size + 1, block_size, exact_window)
    texts = []
    for index, (prompt, seed) in enumerate(zip(prompts, seeds)):
        length = window_length(len(prompt), block_size, exact_window)
        texts.append(Text(index, list(prompt[-length:]), Random(seed)))
    stops = [list(stop) for stop in stops]
    network, cache = bare(gpt), KVCache(gpt, len(texts))
    prefill(network, cache, texts, range(len(texts)))
    for left in reversed(range(max_new)):
        newest = torch.tensor([text.window[-1:] for text in texts], device=cache.memory.device)
        logits = network(newest, cache)[:, -1].to("cpu", torch.float32)
        uniforms = torch.tensor([text.random.random() for text in texts], dtype=torch.float64)
        ids = choose(logits, sampling, uniforms).tolist()
        news = [text.add(id, stops, last=left == 0) for text, id in zip(texts, ids)]
        yield [new for new in news if new.ids or new.last]

        going_on = [row for row, new in enumerate(news) if not new.last]
        if not going_on:
            return
        if len(going_on) < len(texts):
            texts = [texts[row] for row in going_on]
            cache.keep(going_on)
        full = [row for row, text in enumerate(texts) if len(text.window) > block_size]
        for row in full:
            del texts[row].window[:-least]
        prefill(network, cache, texts, full)


def prefill(network: GPT, cache: KVCache, texts: Sequence[Text], rows: Sequence[int]) -> None:
    """Read the windows of these rows, all but the newest character: the next step's input.

    Windows of one length are one batch, and those that are the same are read once.
    """
    by_length: dict[int, dict[tuple[int, ...], list[int]]] = {}
    for row in rows:
        window = tuple(texts[row].window[:-1])
        by_length.setdefault(len(window), {}).setdefault(window, []).append(row)
    for length, sharing in by_length.items():
        fresh = KVCache(network, len(sharing), capacity=length)
        if length > 0:
            network(torch.tensor(list(sharing), device=cache.memory.device), fresh)
        sources = [source for source, same in enumerate(sharing.values()) for _ in same]
        cache.put([row for same in sharing.values() for row in same], fresh, sources)


def bare(gpt: GPT) -> GPT:
    """The network without dropout, and without nn.Module's ceremony: no hooks, not compiled.

    nn.Module looks for layers and weights where Python looks for attributes last, and for hooks at
    each call. With one character at a time that is more than a third of all that is not matrix
    products. So this is a twin that shares the weights, in which every part lies where Python looks
    first, and calling a module is calling its forward.
    """
    weights = {id(weight): weight for weight in gpt.parameters()}  # known to deepcopy: not copied
    twin = deepcopy(gpt, weights).eval()
    modules = list(twin.modules())
    forwards = {kind: kind.forward for kind in map(type, modules)} | {nn.Dropout: nn.Identity.forward}
    kinds = {kind: type(kind.__name__, (kind,), {"__call__": call}) for kind, call in forwards.items()}
    for module in modules:
        vars(module).update(module._parameters | module._modules)
        module.__class__ = kinds[type(module)]
    return twin
