"""The settings of a GPT, the named choices, and the error for what users can get wrong."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ngrams import FACTORS


class UserError(ValueError):
    """Invalid input; its one or two lines say what is wrong, where, and what to do.

    The command line prints it without a traceback; every other exception keeps its traceback.
    """


def squared_relu(x: Tensor) -> Tensor:
    """ReLU squared (So et al. 2021, Primer, arXiv:2109.08668)."""
    x = torch.relu(x)
    return x * x  # not x.square(), whose gradient is three times slower on a CPU


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "relu2": squared_relu,
}
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,
    "plain": partial(nn.LayerNorm, elementwise_affine=False),
}


@dataclass(frozen=True)
class GPTConfig:
    """The settings of a GPT; a UserError names an invalid one.

    Flags, YAML keys and help texts are generated from the fields.
    """

    block_size: int = 256
    """Maximum context length: the most characters that the network sees at once."""
    n_embd: int = 384
    """Channels of the residual stream, C."""
    n_head: int = 6
    """Attention heads, H; they share the channels, so H divides C."""
    n_layer: int = 6
    """Number of transformer blocks."""
    dropout: float = 0.2
    """Fraction of values set to zero during training, in [0, 1): of attention weights, and of the
    outputs of attention and feed-forward layers; of nothing else."""
    attention_dropout: float | None = None
    """Fraction of attention weights set to zero during training, which is slow on a CPU; null
    takes the value of dropout."""
    position: Literal["learned", "rotary"] = "learned"
    """learned: an embedding per position; rotary: queries and keys are rotated by an angle
    proportional to their position."""
    norm: Literal[tuple(NORMS)] = "layer"  # type: ignore[valid-type]
    """layer: LayerNorm; plain: LayerNorm without gain and bias, also after the embeddings."""
    bias: bool = True
    """Whether linear layers have a bias (for query, key and value see qkv_bias)."""
    qkv_bias: bool = False
    """Whether query, key and value have a bias, as in GPT-2."""
    activation: Literal[tuple(ACTIVATIONS)] = "relu"  # type: ignore[valid-type]
    """Activation of the feed-forward layers; relu2 is ReLU squared."""
    ngrams: dict[int, int] | None = None
    """Hashed n-gram embeddings, {n: rows of its table}: with {2: 8192, 3: 8192} the last two and
    the last three characters each add a vector."""
    ngram_dropout: float = 0.0
    """Fraction of n-gram vectors set to zero during training, in [0, 1); their tables overfit."""

    def __post_init__(self) -> None:
        for field in fields(self):
            check_type(field.name, getattr(self, field.name), field.type)
        check(self, "block_size n_embd n_head n_layer", "at least 1", lambda n: n >= 1)
        check(self, "dropout attention_dropout ngram_dropout", *FRACTION)
        for n, rows in (self.ngrams or {}).items():
            if not (type(n) is type(rows) is int and 2 <= n <= len(FACTORS) and rows >= 1):
                limits = f"n must be 2 to {len(FACTORS)}, and a table needs at least 1 row"
                raise UserError(f"ngrams has {n!r}: {rows!r}; {limits}")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.position == "rotary" and self.head_size % 2:
            raise UserError(f"rotary positions need an even n_embd / n_head, not {self.head_size}")

    @property
    def head_size(self) -> int:
        """Channels of one attention head, D."""
        return self.n_embd // self.n_head

    @property
    def ngram_context(self) -> int:
        """How many ids before a character its longest n-gram includes."""
        return max(self.ngrams or (), default=1) - 1


FRACTION = ("at least 0 and less than 1", lambda value: 0 <= value < 1)  # arguments of `check`


def check(settings: object, names: str, rule: str, predicate: Callable[[Any], bool]) -> None:
    """Raise a UserError that names the first of these settings for which the predicate fails."""
    for name in names.split():
        value = getattr(settings, name)
        if value is not None and not predicate(value):
            raise UserError(f"{name} is {value}; it must be {rule}")


def check_type(name: str, value: object, declared: Any) -> None:
    """Raise a UserError unless a setting has its declared type; an int passes for a float."""
    kinds = get_args(declared) if get_origin(declared) in (Literal, UnionType) else (declared,)
    if get_origin(declared) is Literal:
        valid, expected = value in kinds, f"one of {', '.join(kinds)}"
    else:
        types = [get_origin(kind) or kind for kind in kinds]
        valid = type(value) in types or (type(value) is int and float in types)
        expected = declared.__name__ if isinstance(declared, type) else str(declared)
    if not valid:
        raise UserError(f"{name} is {value!r}; it must be {expected}")
