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

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021, Primer, arXiv:2109.08668
}
NORMS = {
    "layer": nn.LayerNorm,
    "plain": lambda n_embd: nn.LayerNorm(n_embd, elementwise_affine=False),  # no gain, no bias
}


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Turn each pair of channels by an angle proportional to its position.

    A dot product of two rotated vectors depends on their distance alone: Su et al. 2021,
    RoFormer, arXiv:2104.09864.

    Args:
        x: queries or keys, (B, H, T, D) with D even.
        positions: (T,), or (B, T) where the sequences of a batch stand at different places.
    """
    half = x.size(-1) // 2
    frequencies = 10_000.0 ** -(torch.arange(half, device=x.device) / half)  # (D/2,)
    angles = positions.unsqueeze(-1) * frequencies  # (T, D/2) or (B, T, D/2)
    angles = angles.unsqueeze(-3)  # one for all heads
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.split(half, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class MultiHeadAttention(nn.Module):
    """Every position gathers what it needs from itself and the positions before it."""

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        dropout: float,
        bias: bool = True,
        rotary: bool = False,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.n_head = n_head
        self.dropout = dropout
        self.rotary = rotary
        self.qk_norm = qk_norm
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)  # of all heads at once
        self.projection = nn.Linear(n_embd, n_embd, bias)
        self.projection_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, positions: Tensor, cache=None) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        if self.qk_norm:  # Henry et al. 2020, arXiv:2010.04245
            q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])
        if self.rotary:
            q, k = rotate(q, positions), rotate(k, positions)
        mask = None
        if cache is not None:
            k, v, mask = cache.extend(k, v)  # (B, H, S, D) each: those before, then these
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and T > 1,  # one character may look at all there are
        )  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
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


class NgramEmbedding(nn.Module):
    """One vector for the last two characters and one for the last three, out of a hashed table.

    What a few letters make likely is then looked up, and need not be worked out by attention
    (Svenstrup et al. 2017, hash embeddings, arXiv:1709.03933).
    """

    FACTORS = (36313, 27191, 51749)  # primes that spread neighbouring ids over the table

    def __init__(self, rows: int, n_embd: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, n_embd)

    def forward(self, ids: Tensor, before: Tensor) -> Tensor:
        """(B, T, C), from ids (B, T) and the two that stand before them, (B, 2); 0 where none do."""
        T, rows = ids.size(1), self.table.num_embeddings
        whole = torch.cat((before, ids), dim=1)  # (B, T + 2)
        last, second, third = (whole[:, 2 - i : 2 - i + T] * f for i, f in enumerate(self.FACTORS))
        return self.table((last + second) % rows) + self.table((last + second + third + 1) % rows)


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

    def forward(self, x: Tensor, positions: Tensor, cache=None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), positions, cache)
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
        position: "learned" adds an embedding of the position, "rotary" turns queries and keys.
        norm: "layer" (LayerNorm), or "plain": without gain and bias, and on the embeddings as well.
        bias: whether linear layers add a bias (those of query, key and value never do).
        activation: of the feed-forward layers: "relu", "gelu" or "relu2" (ReLU squared).
        qk_norm: normalise queries and keys, which keeps attention scores bounded.
        zero_init: start each residual branch and the head at zero: every block begins as the
            identity, and every character as equally likely.
        ngram_rows: add embeddings of the last two and of the last three characters, which share
            a table of this many rows; 0 for none.

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
        position: str = "learned",
        norm: str = "layer",
        bias: bool = True,
        activation: str = "relu",
        qk_norm: bool = False,
        zero_init: bool = False,
        ngram_rows: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(vocab_size, block_size, n_embd, n_head, n_layer, dropout, position)
        self.block_size = block_size
        make_norm = NORMS[norm]
        self.token_embedding = nn.Embedding(vocab_size, n_embd)
        self.position_embedding = nn.Embedding(block_size, n_embd) if position == "learned" else None
        self.ngram_embedding = NgramEmbedding(ngram_rows, n_embd) if ngram_rows else None
        self.embedding_norm = make_norm(n_embd) if norm == "plain" else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(
                make_norm(n_embd),
                MultiHeadAttention(n_embd, n_head, dropout, bias, position == "rotary", qk_norm),
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
        if self.ngram_embedding is not None:
            self.ngram_embedding.table.weight.zero_()

    def forward(self, ids: Tensor, cache=None) -> Tensor:
        """Score every character as the next one, at every position.

        Args:
            ids: (B, T) integers in [0, V).
            cache: keys and values of the positions before, a `chargpt.generation.KVCache`; the
                T new ones are added to it. Without one, the T characters stand alone.

        Returns:
            logits: (B, T, V); those at position t depend on characters 0 to t alone.

        Raises:
            ValueError: more positions than block_size.
        """
        T = ids.size(1)
        end = T if cache is None else max(cache.lengths) + T
        if end > self.block_size:
            raise ValueError(f"{end} positions asked for, but block_size is {self.block_size}")
        if cache is None:
            positions, before = torch.arange(T, device=ids.device), ids.new_zeros(len(ids), 2)
        else:
            positions, before = cache.advance(ids)  # (B, T), (B, 2)
        x = self.token_embedding(ids)  # (B, T, C)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        if self.ngram_embedding is not None:
            x = x + self.ngram_embedding(ids, before)
        x = self.embedding_norm(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, positions, None if cache is None else cache.layers[layer])
        return self.head(self.norm(x))  # (B, T, V)


def check_sizes(
    vocab_size: int, block_size: int, n_embd: int, n_head: int, n_layer: int, dropout: float, position: str
) -> None:
    sizes = dict(
        vocab_size=vocab_size, block_size=block_size, n_embd=n_embd, n_head=n_head, n_layer=n_layer
    )
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")
    if n_embd % n_head:
        raise ValueError(f"n_embd {n_embd} is not divisible by n_head {n_head}")
    if position == "rotary" and (n_embd // n_head) % 2:
        raise ValueError(
            f"rotary positions turn pairs of channels, but n_embd {n_embd} / n_head {n_head} is odd"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must be at least 0 and less than 1")
