"""GPT: a decoder-only transformer over characters.

The defaults are the textbook network (Vaswani et al. 2017, arXiv:1706.03762, with the pre-norm
residual blocks of GPT-2); each later improvement is one setting of `GPTConfig`. `textbook.py`
explains every part; this is the same network, written to be fast.

    B  sequences in a batch         V  size of the vocabulary
    T  characters in a sequence     H  attention heads
    C  channels (n_embd)            D  channels of one head (C / H)
    S  positions that can be attended to: the T new ones, and those in the KV cache
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ACTIVATIONS, NORMS, GPTConfig, UserError
from .kv_cache import KVCache, LayerCache
from .ngrams import NgramEmbedding
from .rotary import apply_rotary, rotary_angles


class StackedLinear(nn.Linear):
    stacked = 3  # matrices in its weight, one below the other: for query, key and value


class ResidualLinear(nn.Linear):
    residual = True  # its output is added to the residual stream


class MultiHeadAttention(nn.Module):
    """Causal multi-head self-attention, (B, T, C) -> (B, T, C).

    Each head computes softmax(q k^T / sqrt(D)) v: the query of a position is compared with the keys
    of itself and the positions before it, and their values are averaged with the resulting weights
    (Vaswani et al. 2017, section 3.2).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.dropout = config.dropout
        dropout = config.attention_dropout
        self.attention_dropout = config.dropout if dropout is None else dropout
        self.qkv = StackedLinear(C, 3 * C, config.qkv_bias)
        self.projection = ResidualLinear(C, C, config.bias)

    def query_key_value(self, x: Tensor, angles: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all heads, (B, H, T, D) each, from x (B, T, C)."""
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        if angles is None:
            q, k, v = qkv.unbind()
            return q, k, v
        qk, v = qkv.split((2, 1))
        q, k = apply_rotary(qk, angles).unbind()  # both in one pass
        return q, k, v.squeeze(0)

    def forward(
        self, x: Tensor, angles: Tensor | None, mask: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        q, k, v = self.query_key_value(x, angles)  # (B, H, T, D) each
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, S, D) each
        # Causal: position t sees positions 0 to t only. Without a cache, or with an empty one, the
        # kernel ensures that, otherwise the mask; a single new character needs neither.
        causal = cache is None or (mask is None and x.size(1) > 1)
        dropout = self.attention_dropout if self.training else 0.0
        # softmax(q k^T / sqrt(D)) v, in one kernel
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)  # (B, H, T, D)
        y = self.projection(y.transpose(1, 2).flatten(2))  # (B, T, C): the heads side by side
        return F.dropout(y, self.dropout) if self.training else y


class FeedForward(nn.Module):
    """Position-wise feed-forward network, (B, T, C) -> (B, T, C), with 4 C hidden units."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.dropout = config.dropout
        self.activation = ACTIVATIONS[config.activation]
        self.expansion = nn.Linear(C, 4 * C, config.bias)
        self.projection = ResidualLinear(4 * C, C, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.projection(self.activation(self.expansion(x)))
        return F.dropout(x, self.dropout) if self.training else x


class Block(nn.Module):
    """Pre-norm transformer block, (B, T, C) -> (B, T, C): attention, then feed-forward.

    Each reads the residual stream through a norm and adds its output to it.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        make_norm = NORMS[config.norm]
        self.attention_norm = make_norm(config.n_embd)
        self.attention = MultiHeadAttention(config)
        self.feed_forward_norm = make_norm(config.n_embd)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x: Tensor, angles: Tensor | None, mask: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), angles, mask, cache)
        return x + self.feed_forward(self.feed_forward_norm(x))


class GPT(nn.Module):
    """A GPT: ids of characters to logits of the next character, (B, T) -> (B, T, V)."""

    def __init__(self, config: GPTConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        C, make_norm = config.n_embd, NORMS[config.norm]
        learned, ngrams = config.position == "learned", config.ngrams
        self.token_embedding = nn.Embedding(vocab_size, C)
        self.position_embedding = nn.Embedding(config.block_size, C) if learned else None
        self.ngram_embedding = NgramEmbedding(ngrams, C, config.ngram_dropout) if ngrams else None
        self.embedding_norm = make_norm(C) if config.norm == "plain" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(C)
        self.head = nn.Linear(C, vocab_size, config.bias)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw weights from N(0, 0.02^2), set biases to zero (Radford et al. 2019, GPT-2).

        2 * n_layer outputs are added to the residual stream: scaling the weights of each by
        1 / sqrt(2 * n_layer) keeps its variance from growing with depth.
        """
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias":
                    nn.init.zeros_(parameter)
                elif parameter.dim() > 1:
                    nn.init.normal_(parameter, std=0.02)
                    if getattr(module, "residual", False):
                        parameter.mul_((2 * self.config.n_layer) ** -0.5)
        if self.ngram_embedding is not None:
            nn.init.zeros_(self.ngram_embedding.table.weight)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits of the next character at every position; a cache holds the characters before.

        Raises:
            UserError: more characters than block_size, or than the cache has slots.
        """
        return self.head(self.hidden_states(ids, cache))

    def hidden_states(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """The input of the head, (B, T, C): the normalized residual stream after the last block."""
        T, config = ids.size(1), self.config
        if cache is not None:
            positions, angles, mask, ngram_ids, layers = cache.append(ids)
        elif config.block_size >= T:
            positions = torch.arange(T, device=ids.device)
            learned = self.position_embedding is not None
            angles = None if learned else rotary_angles(positions, config.head_size)
            mask, layers = None, [None] * config.n_layer
            ngram_ids = F.pad(ids, (config.ngram_context, 0))
        else:
            raise UserError(f"the input has {T} characters, but block_size is {config.block_size}")

        x = self.token_embedding(ids)  # (B, T, C)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        if self.ngram_embedding is not None:
            x = x + self.ngram_embedding(ngram_ids)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        for block, layer_cache in zip(self.blocks, layers):
            x = block(x, angles, mask, layer_cache)
        return self.norm(x)
