"""Attention and the residual stream of each block, recorded while a network runs, and a logit lens.

    import torch
    import chargpt
    from chargpt.inspection import inspect, logit_lens

    model = chargpt.load()
    ids = torch.tensor([model.encode("ROMEO:")])
    with inspect(model.gpt) as layers:
        model.gpt(ids)
    layers[0].attention[0, 1]    # layer 0, head 1: each row has the weights of one position
    logit_lens(model.gpt, layers)[1, 0, -1]    # logits, read after the first block

The network's fused attention kernel never materializes the weights; here forward hooks recompute
them, so there is no cost outside the `with` statement.
"""

import math
from collections.abc import Iterator, Sequence
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
    input: Tensor  # (B, T, C) the residual stream before the block
    queries: Tensor  # (B, H, T, D), rotated if positions are rotary
    keys: Tensor  # (B, H, S, D), rotated likewise


@contextmanager
def inspect(gpt: GPT) -> Iterator[list[Layer]]:
    """Record the attention weights and the residual stream of each block.

    Each forward pass appends n_layer entries. With a KVCache, the attention weights of new
    characters cover all S positions in the cache.

    Args:
        gpt: the network, called as a module inside the `with` statement.
    """
    layers: list[Layer] = []
    recorded: list[tuple[Tensor, Tensor, Tensor]] = []

    def after_attention(module: MultiHeadAttention, args: tuple, output: Tensor) -> None:
        recorded.append(attention_weights(module, *args))

    def after_block(module: Block, args: tuple, output: Tensor) -> None:
        weights, q, k = recorded.pop()
        layers.append(Layer(weights, output.detach(), args[0].detach(), q, k))

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
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention weights (B, H, T, S), and queries and keys, for the input x."""
    q, k, _ = attention.query_key_value(x, angles)
    if cache is not None:
        k = cache.keys.to(q.dtype)  # attention has stored the new ones
    T, S = q.size(2), k.size(2)
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
    scores = q @ k.mT / math.sqrt(q.size(-1))  # (B, H, T, S)
    return scores.masked_fill(~mask, -math.inf).softmax(-1), q, k


@torch.no_grad()
def logit_lens(gpt: GPT, layers: Sequence[Layer]) -> Tensor:
    """Logits after the embeddings and after each block, (n_layer + 1, B, T, V): a logit lens.

    The final norm and the head are applied to the residual stream at each stage, as the network
    applies them to the last ("interpreting GPT: the logit lens", nostalgebraist 2020).

    Args:
        gpt: the network.
        layers: what `inspect` recorded in one forward pass.
    """
    stages = [layers[0].input, *(layer.residual for layer in layers)]
    return torch.stack([gpt.head(gpt.norm(x)) for x in stages])
