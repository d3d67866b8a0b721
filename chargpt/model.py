"""The network: a decoder-only transformer over characters, from first principles.

The textbook form is the default (Vaswani et al. 2017, arXiv:1706.03762, with the pre-norm
residual blocks of GPT-2); what has been found since then is one switch each.

    B  sequences in a batch         V  size of the vocabulary
    T  characters in a sequence     H  attention heads
    C  channels (n_embd)            D  channels of one head (C / H)
    S  positions that can be attended to: T, and before it what a cache holds
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def squared_relu(x: Tensor) -> Tensor:
    """So et al. 2021, Primer, arXiv:2109.08668."""
    x = torch.relu(x)
    return x * x  # not x.square(), whose gradient is three times slower on a CPU


ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "relu2": squared_relu,
}
NORMS = {
    "layer": nn.LayerNorm,
    "plain": lambda n_embd: nn.LayerNorm(n_embd, elementwise_affine=False),  # no gain, no bias
}


def rotation(positions: Tensor, D: int) -> Tensor:
    """The turn of each pair of channels at each position, as complex numbers of length 1.

    A dot product of two vectors turned so depends on their distance alone: Su et al. 2021,
    RoFormer, arXiv:2104.09864.

    Args:
        positions: (T,), or (B, T) where the sequences of a batch stand at different places.
        D: channels of a head, even.

    Returns:
        (1, T, D / 2), or (B, 1, T, D / 2): one for all heads.
    """
    frequencies = 10_000.0 ** -(torch.arange(0, D, 2, device=positions.device) / D)
    angles = positions.unsqueeze(-1) * frequencies
    return torch.polar(torch.ones_like(angles), angles).unsqueeze(-3)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn queries or keys, (B, H, T, D), by what `rotation` gives."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).type_as(x)


class MultiHeadAttention(nn.Module):
    """Every position gathers what it needs from itself and the positions before it."""

    def __init__(
        self, n_embd: int, n_head: int, dropout: float, attention_dropout: float, bias: bool = True
    ) -> None:
        super().__init__()
        self.n_head = n_head
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)  # of all heads at once
        self.projection = nn.Linear(n_embd, n_embd, bias)
        self.projection_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, turn: Tensor | None = None, layer_cache=None) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # (B, H, T, D) each
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        mask = None
        if layer_cache is not None:
            k, v, mask = layer_cache.extend(k, v)  # (B, H, S, D) each: those before, then these
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.attention_dropout if self.training else 0.0,
            is_causal=mask is None and T > 1,  # one character may look at all there are
        )  # (B, H, T, D)
        y = y.transpose(1, 2).flatten(2)  # (B, T, C), the heads side by side again
        return self.projection_dropout(self.projection(y))


class FeedForward(nn.Module):
    """Every position thinks about what it has gathered, by itself."""

    def __init__(self, n_embd: int, dropout: float, bias: bool = True, activation: str = "relu") -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.expansion = nn.Linear(n_embd, 4 * n_embd, bias)
        self.projection = nn.Linear(4 * n_embd, n_embd, bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.projection(self.activation(self.expansion(x))))


class TrigramEmbedding(nn.Module):
    """A vector for each three characters in a row, out of a hashed table.

    What a few letters make likely is looked up, and need not be worked out by attention
    (hash embeddings: Svenstrup et al. 2017, arXiv:1709.03933).
    """

    FACTORS = (36313, 27191, 51749)  # spread neighbouring ids over the table

    def __init__(self, rows: int, n_embd: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, n_embd)

    def forward(self, ids: Tensor, before: Tensor) -> Tensor:
        """(B, T, C), from ids (B, T) and the two that stand before them, (B, 2); 0 where none do."""
        T = ids.size(1)
        # Id 0 is a character too; that it stands for none as well costs next to nothing.
        whole = torch.cat((before, ids), dim=1)  # (B, T + 2)
        mixed = sum(factor * whole[:, 2 - i : 2 - i + T] for i, factor in enumerate(self.FACTORS))
        return self.table(mixed % self.table.num_embeddings)


class Block(nn.Module):
    """Communication, then computation, each added to the residual stream after a norm (pre-norm)."""

    def __init__(
        self,
        attention_norm: nn.Module,
        attention: MultiHeadAttention,
        feed_forward_norm: nn.Module,
        feed_forward: FeedForward,
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.feed_forward_norm = feed_forward_norm
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, turn: Tensor | None = None, layer_cache=None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turn, layer_cache)
        return x + self.feed_forward(self.feed_forward_norm(x))


class GPT(nn.Module):
    """Ids of characters in, a score for every possible next character out.

    Args:
        vocab_size: number of different characters, V.
        block_size: most characters that the network can look at, T at most.
        n_embd: channels of the residual stream, C.
        n_head: attention heads, H; they share the channels, so H divides C.
        n_layer: blocks, one after the other.
        dropout: share of activations set to zero while training, in [0, 1).
        attention_dropout: the same for attention weights, where it is slow on a CPU; as
            `dropout` unless given.
        position: "learned" adds an embedding of the position, "rotary" turns queries and keys.
        norm: "layer" (LayerNorm), or "plain": without gain and bias, and on the embeddings as well.
        bias: whether linear layers add a bias (those of query, key and value never do).
        activation: of the feed-forward layers: "relu", "gelu" or "relu2" (ReLU squared).
        zero_init: start each residual branch and the head at zero: every block begins as the
            identity, and every character as equally likely.
        trigram_rows: add an embedding of the last three characters, out of a hashed table of this
            many rows; 0 for none.

    Raises:
        ValueError: a size that cannot be; the message names it.
    """

    def __init__(
        self,
        vocab_size: int,
        block_size: int = 256,
        n_embd: int = 384,
        n_head: int = 6,
        n_layer: int = 6,
        dropout: float = 0.2,
        attention_dropout: float | None = None,
        position: str = "learned",
        norm: str = "layer",
        bias: bool = True,
        activation: str = "relu",
        zero_init: bool = False,
        trigram_rows: int = 0,
    ) -> None:
        super().__init__()
        attention_dropout = dropout if attention_dropout is None else attention_dropout
        check_arguments(
            vocab_size=vocab_size,
            block_size=block_size,
            n_embd=n_embd,
            n_head=n_head,
            n_layer=n_layer,
            dropout=dropout,
            attention_dropout=attention_dropout,
            position=position,
            norm=norm,
            activation=activation,
            trigram_rows=trigram_rows,
        )
        self.block_size = block_size
        self.n_head = n_head
        self.head_size = n_embd // n_head
        make_norm = NORMS[norm]
        self.token_embedding = nn.Embedding(vocab_size, n_embd)
        self.position_embedding = nn.Embedding(block_size, n_embd) if position == "learned" else None
        self.trigram_embedding = TrigramEmbedding(trigram_rows, n_embd) if trigram_rows else None
        self.embedding_norm = make_norm(n_embd) if norm == "plain" else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(
                make_norm(n_embd),
                MultiHeadAttention(n_embd, n_head, dropout, attention_dropout, bias),
                make_norm(n_embd),
                FeedForward(n_embd, dropout, bias, activation),
            )
            for _ in range(n_layer)
        )
        self.norm = make_norm(n_embd)
        self.head = nn.Linear(n_embd, vocab_size, bias)
        self.initialise(zero_init)

    @torch.no_grad()
    def initialise(self, zero_init: bool) -> None:
        """Draw the weights from N(0, 0.02), biases zero (Radford et al. 2019, GPT-2).

        2 * n_layer branches add up in the residual stream: scaling each by 1 / sqrt(2 * n_layer)
        keeps its variance from growing with depth.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            for projection in (block.attention.projection, block.feed_forward.projection):
                projection.weight.mul_(0.0 if zero_init else (2 * len(self.blocks)) ** -0.5)
        if zero_init:
            self.head.weight.zero_()
        if self.trigram_embedding is not None:
            self.trigram_embedding.table.weight.zero_()

    def forward(self, ids: Tensor, cache=None) -> Tensor:
        """Score every character as the next one, at every position.

        Args:
            ids: (B, T) integers in [0, V).
            cache: keys and values of the positions before, a `chargpt.generation.KVCache`; the
                T new ones are added to it. Each block is given the part of its layer, a
                `LayerCache`. Without one, the T characters stand alone.

        Returns:
            logits: (B, T, V); those at position t depend on characters 0 to t alone.

        Raises:
            ValueError: more positions than block_size.
        """
        B, T = ids.shape
        end = T if cache is None else max(cache.lengths) + T
        if end > self.block_size:
            raise ValueError(f"{end} positions asked for, but block_size is {self.block_size}")
        if cache is None:
            positions, caches = torch.arange(T, device=ids.device), [None] * len(self.blocks)
        else:
            positions, caches = cache.advance(T)  # (T,) or (B, T)
        x = self.token_embedding(ids)  # (B, T, C)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        if self.trigram_embedding is not None:
            before = ids.new_zeros(B, 2) if cache is None else cache.shift(ids)
            x = x + self.trigram_embedding(ids, before)
        x = self.embedding_norm(x)
        turn = rotation(positions, self.head_size) if self.position_embedding is None else None
        for block, layer_cache in zip(self.blocks, caches):
            x = block(x, turn, layer_cache)
        return self.head(self.norm(x))  # (B, T, V)


def check_arguments(
    *,
    n_embd: int,
    n_head: int,
    dropout: float,
    attention_dropout: float,
    position: str,
    norm: str,
    activation: str,
    trigram_rows: int,
    **sizes: int,
) -> None:
    """Raise a ValueError that names what cannot be among the arguments of `GPT`."""
    for name, size in dict(sizes, n_embd=n_embd, n_head=n_head).items():
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")
    if trigram_rows < 0:
        raise ValueError(f"trigram_rows is {trigram_rows}; it must be at least 0")
    for name, choice, choices in (
        ("position", position, ("learned", "rotary")),
        ("norm", norm, tuple(NORMS)),
        ("activation", activation, tuple(ACTIVATIONS)),
    ):
        if choice not in choices:
            raise ValueError(f"{name} is {choice!r}; it must be one of {', '.join(choices)}")
    if n_embd % n_head:
        raise ValueError(f"n_embd {n_embd} is not divisible by n_head {n_head}")
    if position == "rotary" and (n_embd // n_head) % 2:
        raise ValueError(
            f"rotary positions turn pairs of channels, but n_embd {n_embd} / n_head {n_head} is odd"
        )
    for name, share in (("dropout", dropout), ("attention_dropout", attention_dropout)):
        if not 0 <= share < 1:
            raise ValueError(f"{name} is {share}; it must be at least 0 and less than 1")
