"""Looking inside a network: attention weights and the residual stream of what it reads.

    model = chargpt.load()
    ids = torch.tensor([model.encode("ROMEO:")])
    with inspect(model.gpt) as seen:
        model.gpt(ids)
    seen[0].attention[0, 1]    # layer 0, head 1: how much each character (row) looks at the others

Nothing of this costs anything while it is not used: the network computes attention in one kernel
that never holds the weights, and here they are computed once more beside it.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from chargpt.model.gpt import GPT, Block, MultiHeadAttention


class Layer(NamedTuple):
    """What one block did in one pass of the network."""

    attention: Tensor  # (B, H, T, S) attention weights; each row sums to 1
    residual: Tensor  # (B, T, C) the residual stream after the block


@contextmanager
def inspect(gpt: GPT) -> Iterator[list[Layer]]:
    """Record the attention weights and the residual stream of each block, in every switch.

    Passes follow each other in the list, n_layer entries each; those with a KVCache as well, where
    a new character's row spans all S characters that the cache holds.

    Args:
        gpt: the network, called as a module inside of the `with` statement.
    """
    seen: list[Layer] = []
    weights: list[Tensor] = []

    def after_attention(module: MultiHeadAttention, args: tuple, output: Tensor) -> None:
        weights.append(attention_weights(module, *args))

    def after_block(module: Block, args: tuple, output: Tensor) -> None:
        seen.append(Layer(weights.pop(), output.detach()))

    hooks = [
        block.get_submodule("attention").register_forward_hook(after_attention)
        for block in gpt.blocks
    ]
    hooks += [block.register_forward_hook(after_block) for block in gpt.blocks]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def attention_weights(attention, x, angles=None, mask=None, cache=None) -> Tensor:
    """softmax(q k^T / sqrt(D)), causally masked: (B, H, T, S), of what attention has just read."""
    q, k, _ = attention.query_key_value(x, angles)
    if cache is not None:
        k = cache.keys.to(q.dtype)  # the new ones are among them by now
    T, S = q.size(2), k.size(2)
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
    scores = q @ k.mT / math.sqrt(q.size(-1))  # (B, H, T, S)
    return scores.masked_fill(~mask, -math.inf).softmax(-1)
