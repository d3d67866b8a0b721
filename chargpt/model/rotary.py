"""Rotary position embedding (RoPE): attention that depends on relative positions."""

import torch
from torch import Tensor


def rotary_angles(positions: Tensor, head_size: int) -> Tensor:
    """Angles by which pairs of channels are rotated, (T,) -> (T, D / 2): cos + i sin of each.

    Pair i is rotated by position * 10000^(-2i / D). The dot product of a rotated query and key
    depends on the distance between their positions only, since rotating both by the same angle
    changes nothing (Su et al. 2021, RoFormer, arXiv:2104.09864).

    While compiling, (T, D / 2, 2), cosine and sine: TorchInductor has no complex numbers.
    """
    pairs = torch.arange(0, head_size, 2, device=positions.device)
    angles = positions.unsqueeze(-1) * 10_000.0 ** -(pairs / head_size)
    if torch.compiler.is_compiling():
        return torch.stack((angles.cos(), angles.sin()), dim=-1)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate queries or keys, (..., T, D), by the angles that `rotary_angles` returns.

    Channels 2i and 2i + 1 are a point (a, b) in the plane; rotated by an angle, it is
    (a cos - b sin, a sin + b cos). That is also the product of the complex numbers a + ib and
    cos + i sin, which one kernel computes in one pass (measured: tests/benchmarks/LOG.md).
    """
    pairs = x.float().unflatten(-1, (-1, 2))  # (..., T, D / 2, 2)
    if angles.is_complex():
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * angles)
    else:
        (a, b), (cos, sin) = pairs.unbind(-1), angles.unbind(-1)
        rotated = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return rotated.flatten(-2).type_as(x)
