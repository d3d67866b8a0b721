"""Attention weights and the residual stream of each block, recorded while a network runs.

    model = chargpt.load()
    ids = torch.tensor([model.encode("ROMEO:")])
    with inspect(model.gpt) as layers:
        model.gpt(ids)
    layers[0].attention[0, 1]    # layer 0, head 1: each row has the weights of one position

The network's fused attention kernel never stores the weights; here they are computed once more
in forward hooks, so nothing costs anything outside of the `with` statement.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from chargpt.model import GPT
from chargpt.model.gpt import Block, MultiHeadAttention
from chargpt.model.kv_cache import LayerCache


class Layer(NamedTuple):
    """What one block computed in one forward pass."""

    attention: Tensor  # (B, H, T, S) attention weights; each row sums to 1
    residual: Tensor  # (B, T, C) the residual stream after the block


@contextmanager
def inspect(gpt: GPT) -> Iterator[list[Layer]]:
    """Record the attention weights and the residual stream of each block.

    Each forward pass appends n_layer entries. With a KVCache, the attention weights of new
    characters cover all S positions in the cache.

    Args:
        gpt: the network, called as a module inside of the `with` statement.
    """
    layers: list[Layer] = []
    weights: list[Tensor] = []

    def after_attention(module: MultiHeadAttention, args: tuple, output: Tensor) -> None:
        weights.append(attention_weights(module, *args))

    def after_block(module: Block, args: tuple, output: Tensor) -> None:
        layers.append(Layer(weights.pop(), output.detach()))

    hooks = [
        block.get_submodule("attention").register_forward_hook(after_attention)
        for block in gpt.blocks
    ]
    hooks += [block.register_forward_hook(after_block) for block in gpt.blocks]
    try:
        yield layers
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def attention_weights(
    attention: MultiHeadAttention,
    x: Tensor,
    angles: Tensor | None = None,
    mask: Tensor | None = None,
    cache: LayerCache | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) with the causal mask, (B, H, T, S), for the input of attention."""
    q, k, _ = attention.query_key_value(x, angles)
    if cache is not None:
        k = cache.keys.to(q.dtype)  # attention has stored the new ones
    T, S = q.size(2), k.size(2)
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
    scores = q @ k.mT / math.sqrt(q.size(-1))  # (B, H, T, S)
    return scores.masked_fill(~mask, -math.inf).softmax(-1)
