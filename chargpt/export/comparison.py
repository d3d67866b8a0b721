"""The last step of an export: does the result compute the same logits as the network?"""

from collections.abc import Callable

import torch
from torch import Tensor

from chargpt.model import GPT

TOLERANCE = 1e-4  # of logits, relative to the largest if that is above 1


def random_ids(gpt: GPT, length: int | None = None) -> Tensor:
    """Random ids (2, length), by default of the maximum context."""
    V, T = gpt.token_embedding.num_embeddings, gpt.config.block_size if length is None else length
    return torch.randint(V, (2, T), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def same_logits(other: Callable[[Tensor], Tensor], gpt: GPT, length: int | None = None) -> bool:
    """Whether a function of ids (B, T) returns the logits of `gpt`, which is in evaluation mode."""
    ids = random_ids(gpt, length)
    expected, logits = gpt(ids).float(), other(ids).float()
    tolerance = TOLERANCE * max(1.0, expected.abs().max().item())
    return logits.shape == expected.shape and bool((logits - expected).abs().max() <= tolerance)
