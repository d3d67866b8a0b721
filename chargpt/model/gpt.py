"""GPT: a decoder-only transformer over characters, from first principles.

The textbook form is the default (Vaswani et al. 2017, arXiv:1706.03762, with the pre-norm
residual blocks of GPT-2); what has been found since then is one switch each in `GPTConfig`.
`textbook.py` explains every part; here the same network is written to be fast.

    B  sequences in a batch         V  size of the vocabulary
    T  characters in a sequence     H  attention heads
    C  channels (n_embd)            D  channels of one head (C / H)
    S  characters that can be attended to: T, and before them what a cache holds
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def squared_relu(x: Tensor) -> Tensor:
    """ReLU squared (So et al. 2021, Primer, arXiv:2109.08668)."""
    x = torch.relu(x)
    return x * x  # not x.square(), whose gradient is three times slower on a CPU


ACTIVATIONS = {"relu": torch.relu, "gelu": F.gelu, "relu2": squared_relu}
NORMS = {
    "layer": nn.LayerNorm,
    "plain": lambda n_embd: nn.LayerNorm(n_embd, elementwise_affine=False),
}


@dataclass(frozen=True)
class GPTConfig:
    """The settings of a GPT. Each is declared here and nowhere else.

    Its flag, its key in a configuration file and in a checkpoint, its help text and the check of
    its type follow from the field.

    Raises:
        ValueError: a setting that cannot be; the message names it.
    """

    block_size: int = 256
    """The most characters of context that the network looks at."""
    n_embd: int = 384
    """Channels of the residual stream, C."""
    n_head: int = 6
    """Attention heads, H; they share the channels, so H divides C."""
    n_layer: int = 6
    """Blocks, one after the other."""
    dropout: float = 0.2
    """Share of activations set to zero while training, in [0, 1)."""
    attention_dropout: float | None = None
    """The same for attention weights, where it is slow on a CPU; null takes dropout's."""
    position: Literal["learned", "rotary"] = "learned"
    """learned: an embedding of each position; rotary: queries and keys are rotated by theirs."""
    norm: Literal[tuple(NORMS)] = "layer"  # type: ignore[valid-type]
    """layer: LayerNorm; plain: LayerNorm without gain and bias, on the embeddings as well."""
    bias: bool = True
    """Whether linear layers add a bias (qkv_bias says so for query, key and value)."""
    qkv_bias: bool = False
    """Whether query, key and value add a bias, as in GPT-2."""
    activation: Literal[tuple(ACTIVATIONS)] = "relu"  # type: ignore[valid-type]
    """Of the feed-forward layers; relu2 is ReLU squared."""
    zero_init: bool = False
    """Start each residual branch and the head at zero: every block begins as the identity, and
    every character as equally likely."""
    ngrams: dict[int, int] | None = None
    """Hashed n-gram embeddings: with {2: 8192, 3: 8192} the last two and the last three characters
    each add a vector, from tables of that many rows."""
    ngram_dropout: float = 0.0
    """Share of n-gram vectors left out while training, in [0, 1): they learn by heart."""

    def __post_init__(self) -> None:
        for field in fields(self):
            check_type(field.name, getattr(self, field.name), field.type)
        check(self, "block_size n_embd n_head n_layer", "at least 1", lambda n: n >= 1)
        check(self, "dropout attention_dropout ngram_dropout", *SHARE)
        for n, rows in (self.ngrams or {}).items():
            if type(n) is not int or not 2 <= n <= len(NgramEmbedding.FACTORS):
                most = len(NgramEmbedding.FACTORS)
                raise ValueError(
                    f"ngrams has {n!r}; it must be a number of characters, 2 to {most}"
                )
            if type(rows) is not int or rows < 1:
                raise ValueError(f"ngrams has {n}: {rows!r}; a table needs at least 1 row")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.position == "rotary" and self.head_size % 2:
            raise ValueError(
                "rotary positions rotate pairs of channels, "
                f"but n_embd {self.n_embd} / n_head {self.n_head} is odd"
            )

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def preceding(self) -> int:
        """Characters before a sequence that its first n-gram takes in."""
        return max(self.ngrams or (), default=1) - 1


# The rule of a share, and what tells whether it holds; for `check`.
SHARE = ("at least 0 and less than 1", lambda value: 0 <= value < 1)


def check(settings: Any, names: str, rule: str, holds: Callable[[Any], bool]) -> None:
    """Raise a ValueError that names the first of these settings for which a rule does not hold."""
    for name in names.split():
        value = getattr(settings, name)
        if value is not None and not holds(value):
            raise ValueError(f"{name} is {value}; it must be {rule}")


def check_type(name: str, value: object, declared: Any) -> None:
    """Raise a ValueError unless `value` is of the type that its field declares."""
    if get_origin(declared) is Literal:
        if value not in (choices := get_args(declared)):
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
        return
    members = get_args(declared) if isinstance(declared, UnionType) else (declared,)
    kinds = [get_origin(member) or member for member in members]
    if type(value) not in kinds and not (type(value) is int and float in kinds):
        expected = " or ".join(kind.__name__.replace("NoneType", "None") for kind in kinds)
        raise ValueError(f"{name} is {value!r}; it must be {expected}")


# ---- rotary positions ----


def rotary_angles(positions: Tensor, head_size: int) -> Tensor:
    """Cosine and sine of the angle by which rotary positions (RoPE) rotate each pair of channels.

    Pair i is rotated by position * 10000^(-2i / D). The dot product of a query and a key that are
    rotated so depends on the distance of their positions alone, since rotating both by the same
    angle changes nothing (Su et al. 2021, RoFormer, arXiv:2104.09864).

    Args:
        positions: (T,), or (B, T) where the sequences of a batch stand at different positions.
        head_size: channels of a head, D, even.

    Returns:
        cos + i sin as complex numbers, (1, T, D / 2) or (B, 1, T, D / 2): the same for all heads.
        While compiling, the two as real numbers, in one dimension more: TorchInductor makes no
        code for complex ones.
    """
    pairs = torch.arange(0, head_size, 2, device=positions.device)
    angles = (positions.unsqueeze(-1) * 10_000.0 ** -(pairs / head_size)).unsqueeze(-3)
    if torch.compiler.is_compiling():
        return torch.stack((angles.cos(), angles.sin()), dim=-1)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate queries or keys, (B, H, T, D), by what `rotary_angles` gives.

    Channels 2i and 2i + 1 are a point (a, b) in the plane; rotated by an angle, it is
    (a cos - b sin, a sin + b cos). That is also the product of the complex numbers a + ib and
    cos + i sin, which one kernel computes in one pass (measured: tests/benchmarks/LOG.md).
    """
    pairs = x.float().unflatten(-1, (-1, 2))  # (B, H, T, D / 2, 2)
    if angles.is_complex():
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * angles)
    else:
        (a, b), (cos, sin) = pairs.unbind(-1), angles.unbind(-1)
        rotated = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return rotated.flatten(-2).type_as(x)


# ---- the KV cache: what attention remembers while writing ----


class LayerCache(NamedTuple):
    """The KV cache of one attention layer, cut to the S characters of a step that adds T."""

    keys: Tensor  # (B, H, S, D); the last T places are for the new ones
    values: Tensor

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Remember keys and values of T more characters, (B, H, T, D) each; returns all S."""
        T = k.size(2)
        self.keys[:, :, -T:] = k
        self.values[:, :, -T:] = v
        return self.keys, self.values


class KVCache:
    """KV cache: keys and values that attention has computed for the characters so far.

    They may be kept because attention is causal: what a layer knows of a character depends on it
    and those before it alone, so nothing that comes later can change its key or its value. A new
    character then costs one position instead of a pass over all of them.

    The texts of a batch may have different lengths. They are aligned at their ends, so that the
    next characters of all of them stand in the same place; what lies before the start of a text
    is hidden by the attention mask.

    Args:
        gpt: the network that will use it.
        rows: texts in the batch, B.
        end: the first place to write to; what lies before is filled by `put`.
    """

    def __init__(self, gpt: "GPT", rows: int, end: int = 0) -> None:
        config = gpt.config
        # Half a block more than a text can have, so that it is seldom full and moved to the front.
        places = config.block_size + config.block_size // 2 + 1
        # Zeros, not empty: what a mask hides is still multiplied, and 0 * nan is nan.
        zeros = gpt.token_embedding.weight.new_zeros
        shape = (config.n_layer, 2, rows, config.n_head, places, config.head_size)
        self.memory = zeros(shape)  # keys and values of each layer
        self.starts = [end] * rows  # the place of each text's first character
        self.end = end  # the place after the newest characters
        self.newest_ids = zeros((rows, config.preceding), dtype=torch.long)  # for n-grams

    @property
    def length(self) -> int:
        """Characters of the longest text."""
        return self.end - min(self.starts)

    def advance(self, T: int) -> tuple[Tensor, Tensor | None, list[LayerCache]]:
        """Make room for T more characters of each text.

        Returns:
            positions: of the new characters in their texts, (T,), or (B, T) where they differ.
            mask: true where a new character may look, (1, 1, T, S) or (B, 1, T, S); None where
                nothing but later characters is hidden: one new character, or an empty cache.
            layers: the cache of each layer.
        """
        if self.end + T > self.memory.size(-2):
            self.move_to_front()
        device = self.memory.device
        first = min(self.starts)
        length = self.end - first  # of the longest text
        aligned = first == max(self.starts)
        positions = torch.arange(length, length + T, device=device)  # (T,)
        mask = None
        if not aligned or (T > 1 and length > 0):
            places = torch.arange(length + T, device=device)  # (S,)
            mask = (places <= positions.unsqueeze(1))[None, None]  # (1, 1, T, S): causal
        if not aligned:
            padding = torch.tensor(self.starts, device=device).unsqueeze(1) - first  # (B, 1)
            mask = mask & (places >= padding)[:, None, None]  # (B, 1, T, S)
            positions = positions - padding  # (B, T)
        self.end += T
        # The keys of the first layer, its values, the keys of the second, and so on.
        layers = self.memory[..., first : self.end, :].flatten(0, 1).unbind()
        return positions, mask, [LayerCache(*pair) for pair in zip(layers[::2], layers[1::2])]

    def move_to_front(self) -> None:
        """Leave out the places before the longest text."""
        first = min(self.starts)
        self.memory[..., : self.end - first, :] = self.memory[..., first : self.end, :].clone()
        self.starts = [start - first for start in self.starts]
        self.end -= first

    def preceding_ids(self, ids: Tensor) -> Tensor:
        """Take in the new ids, (B, T); returns those before them that n-grams need, or 0."""
        preceding = self.newest_ids
        self.newest_ids = torch.cat((preceding, ids), dim=1)[:, ids.size(1) :]
        return preceding

    def put(self, rows: list[int], source: "KVCache", source_rows: list[int]) -> None:
        """Replace the texts of `rows` by those of another cache, which have one length."""
        T = source.length
        own = self.memory[..., self.end - T : self.end, :]
        own[:, :, rows] = source.memory[:, :, source_rows, :, source.end - T : source.end]
        self.newest_ids[rows] = source.newest_ids[source_rows]
        for row in rows:
            self.starts[row] = self.end - T

    def keep(self, rows: list[int]) -> None:
        """Forget the texts of all rows but these."""
        self.memory = self.memory[:, :, rows]
        self.newest_ids = self.newest_ids[rows]
        self.starts = [self.starts[row] for row in rows]


# ---- the network ----


class MultiHeadAttention(nn.Module):
    """Causal multi-head self-attention, (B, T, C) to (B, T, C).

    In each head, softmax(q k^T / sqrt(D)) v: every position asks with its query, is answered by
    the keys of itself and the positions before it, and gathers their values in proportion
    (Vaswani et al. 2017, section 3.2).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.attention_dropout = (
            config.dropout if config.attention_dropout is None else config.attention_dropout
        )
        self.qkv = nn.Linear(C, 3 * C, config.qkv_bias)  # query, key, value of all heads
        self.projection = nn.Linear(C, C, config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def query_key_value(self, x: Tensor, angles: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all heads, (B, H, T, D) each, from x (B, T, C)."""
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, -1)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        if angles is not None:
            q, k = apply_rotary(q, angles), apply_rotary(k, angles)
        return q, k, v

    def forward(
        self,
        x: Tensor,
        angles: Tensor | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        q, k, v = self.query_key_value(x, angles)  # (B, H, T, D) each
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, S, D) each
        y = F.scaled_dot_product_attention(  # softmax(q k^T / sqrt(D)) v, in one kernel
            q,
            k,
            v,
            attn_mask=mask,
            # Causal: position t sees 0 to t alone. A mask says so itself, and a single new
            # character may see all there are.
            is_causal=mask is None and x.size(1) > 1,
            dropout_p=self.attention_dropout if self.training else 0.0,
        )  # (B, H, T, D)
        y = y.transpose(1, 2).flatten(2)  # (B, T, C): the heads side by side again
        return self.dropout(self.projection(y))


class FeedForward(nn.Module):
    """Position-wise feed-forward network, (B, T, C) to (B, T, C), four times as wide inside.

    Attention has gathered; here every position works on what it has, by itself.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.activation = ACTIVATIONS[config.activation]
        self.expansion = nn.Linear(C, 4 * C, config.bias)
        self.projection = nn.Linear(4 * C, C, config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.projection(self.activation(self.expansion(x))))


class Block(nn.Module):
    """Pre-norm residual block, (B, T, C) to (B, T, C): attention, then feed-forward.

    Each reads the residual stream through a norm and adds what it found to it.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        make_norm = NORMS[config.norm]
        self.attention_norm = make_norm(config.n_embd)
        self.attention = MultiHeadAttention(config)
        self.feed_forward_norm = make_norm(config.n_embd)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        angles: Tensor | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), angles, mask, cache)
        return x + self.feed_forward(self.feed_forward_norm(x))


class NgramEmbedding(nn.Module):
    """Hashed n-gram embeddings: the last n characters have a vector of their own, (B, T, C).

    What a few letters make likely is looked up, and need not be worked out by attention. There are
    more n-grams than rows: each is sent to a row by a hash of its ids, and many share one (hash
    embeddings: Svenstrup et al. 2017, arXiv:1709.03933).
    """

    FACTORS = (36313, 27191, 51749, 43987, 60493)  # spread neighboring ids over the table

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ngrams = dict(sorted((config.ngrams or {}).items()))
        self.dropout = config.ngram_dropout
        # All tables in one, one below the other: a single lookup is faster than many.
        self.table = nn.Embedding(sum(self.ngrams.values()), config.n_embd)

    def forward(self, ids: Tensor, preceding: Tensor) -> Tensor:
        """From ids (B, T) and those before them, (B, largest n - 1), 0 where there are none."""
        # Id 0 is a character too; that it stands for none as well costs next to nothing.
        T, start = ids.size(1), preceding.size(1)
        whole = torch.cat((preceding, ids), dim=1)  # (B, n - 1 + T)
        lookups: list[Any] = []  # the row of each n-gram, a table after the other
        first = 0
        for n, rows in self.ngrams.items():
            factors = self.FACTORS[:n]
            hashed = sum(f * whole[:, start - i : start - i + T] for i, f in enumerate(factors))
            lookups.append(first + hashed % rows)  # (B, T)
            first += rows
        vectors = self.table(torch.stack(lookups, dim=-1))  # (B, T, tables, C)
        if self.training and self.dropout:
            kept = F.dropout(vectors.new_ones(*vectors.shape[:-1], 1), self.dropout)
            vectors = kept * vectors
        return vectors.sum(dim=-2)


class GPT(nn.Module):
    """A GPT: ids of characters in, logits of every possible next character out.

    Args:
        config: the settings of the network.
        vocab_size: number of different characters, V.
    """

    def __init__(self, config: GPTConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        C = config.n_embd
        learned = config.position == "learned"
        make_norm = NORMS[config.norm]
        self.token_embedding = nn.Embedding(vocab_size, C)
        self.position_embedding = nn.Embedding(config.block_size, C) if learned else None
        self.ngram_embedding = NgramEmbedding(config) if config.ngrams else None
        self.embedding_norm = make_norm(C) if config.norm == "plain" else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(C)
        self.head = nn.Linear(C, vocab_size, config.bias)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw all weights but vectors from N(0, 0.02), biases zero (Radford et al. 2019, GPT-2).

        2 * n_layer branches add up in the residual stream: scaling each by 1 / sqrt(2 * n_layer)
        keeps its variance from growing with depth.
        """
        scale = 0.0 if self.config.zero_init else (2 * self.config.n_layer) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            if name.endswith("projection.weight"):
                parameter.mul_(scale)
        if self.config.zero_init:
            self.head.weight.zero_()
        if self.ngram_embedding is not None:
            self.ngram_embedding.table.weight.zero_()

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits of the next character at every position.

        Args:
            ids: (B, T) integers in [0, V).
            cache: keys and values of the characters before these; those of the T new ones are
                added to it. Without one, the T characters stand alone.

        Returns:
            (B, T, V); the logits at position t depend on characters 0 to t alone.

        Raises:
            ValueError: more characters than block_size.
        """
        return self.head(self.features(ids, cache))

    def features(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """What the head reads, (B, T, C): the last block's residual stream, after its norm."""
        B, T = ids.shape
        length = T if cache is None else cache.length + T
        if length > self.config.block_size:
            raise ValueError(
                f"{length} positions asked for, but block_size is {self.config.block_size}"
            )
        mask: Tensor | None = None
        layers: list[Any] = [None] * len(self.blocks)  # a LayerCache each, if there is a cache
        if cache is None:
            positions = torch.arange(T, device=ids.device)
        else:
            positions, mask, layers = cache.advance(T)
        x = self.token_embedding(ids)  # (B, T, C)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        if self.ngram_embedding is not None:
            none = ids.new_zeros(B, self.config.preceding)
            preceding = none if cache is None else cache.preceding_ids(ids)
            x = x + self.ngram_embedding(ids, preceding)
        x = self.embedding_norm(x)
        rotary = self.position_embedding is None
        angles = rotary_angles(positions, self.config.head_size) if rotary else None
        for block, layer_cache in zip(self.blocks, layers):
            x = block(x, angles, mask, layer_cache)
        return self.norm(x)
