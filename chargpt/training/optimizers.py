"""Optimizers: Muon and AdamW, and the learning rate schedule."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

# Polar Express (Amsel et al. 2025, arXiv:2505.16932): for each iteration the odd polynomial of
# degree five that brings singular values in the range left by the iterations before closest to 1.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)


def orthogonalize(matrices: Tensor, iterations: int) -> Tensor:
    """Orthogonalize matrices by a Newton-Schulz iteration: every singular value comes close to 1.

    Their singular vectors stay. It is made of matrix products alone, so it is fast where they are.
    In bfloat16 on GPUs; in float32 elsewhere, since a processor without bfloat16 crawls in it.

    Args:
        matrices: (..., rows, columns).
        iterations: at most len(POLAR_EXPRESS); more come closer to 1.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    if tall := x.size(-2) > x.size(-1):
        x = x.mT  # the products below are then of the smaller side
    x = x / (1.01 * x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in POLAR_EXPRESS[:iterations]:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the parameter groups that say `muon: True`, AdamW for all others, in one optimizer.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) steps by the momentum
    with its singular values set to 1: every direction of a matrix moves by the same amount, the
    rare ones too. AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) divides a running mean of
    the gradients by the root of a running mean of their squares, for each weight alone.

    Args:
        groups: parameter groups. Of each: `lr` and `weight_decay` (decoupled); for Muon
            `momentum`, `iterations` and `parts`, the number of matrices that stand one above the
            other in each parameter (3 where query, key and value are fused); for AdamW `betas` and
            `eps`.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        defaults = dict(
            lr=1e-3,
            weight_decay=0.0,
            muon=False,
            betas=(0.9, 0.95),
            eps=1e-8,
            momentum=0.95,
            iterations=4,
            parts=1,
        )
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable | None = None):  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                (self.muon if group["muon"] else self.adamw)(group, parameters)
        return loss

    def buffers(self, parameters: list[Tensor], name: str) -> list[Tensor]:
        for p in parameters:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [self.state[p][name] for p in parameters]

    def muon(self, group: dict, parameters: list[Tensor]) -> None:
        gradients = [p.grad for p in parameters]
        momenta = self.buffers(parameters, "momentum")
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(
            gradients, momenta, group["momentum"]
        )  # Nesterov's look ahead
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])

        by_shape: dict[torch.Size, list[int]] = {}  # matrices of one shape go through together
        for i, p in enumerate(parameters):
            by_shape.setdefault(p.shape, []).append(i)
        for (rows, columns), members in by_shape.items():
            rows //= group["parts"]
            stack = torch.stack([updates[i] for i in members]).view(-1, rows, columns)
            stack = orthogonalize(stack, group["iterations"]).reshape(len(members), -1, columns)
            scale = max(1, rows / columns) ** 0.5  # keeps the size of the outputs' change
            torch._foreach_add_(
                [parameters[i] for i in members], list(stack.unbind()), alpha=-group["lr"] * scale
            )

    def adamw(self, group: dict, parameters: list[Tensor]) -> None:
        for p in parameters:
            if "step" not in self.state[p]:
                self.state[p]["step"] = torch.zeros((), device=p.device)
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [p.grad for p in parameters],
            self.buffers(parameters, "mean"),
            self.buffers(parameters, "square"),
            [],
            [self.state[p]["step"] for p in parameters],
            fused=parameters[0].device.type in ("cpu", "cuda"),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


# ---- which optimizer takes which parameter ----

# The matrices of a block that Muon takes, and how many stand one above the other in each.
MUON_MATRICES = {
    "attention.qkv.weight": 3,  # query, key and value
    "attention.projection.weight": 1,
    "feed_forward.expansion.weight": 1,
    "feed_forward.projection.weight": 1,
}


def make_optimizer(
    parameters: list[nn.Parameter],
    blocks: nn.ModuleList,
    adamw: dict[str, Any],
    weight_decay: float,
    muon: dict[str, Any] | None,
    fused: bool,
) -> torch.optim.Optimizer:
    """AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the rest.

    Vectors (biases, gains of norms) are not decayed: they do not multiply with each other, and
    drawing them to zero would only take away what the norms set.

    Args:
        parameters: all that learn.
        blocks: those of the network.
        adamw: AdamW's learning rate, betas and eps.
        weight_decay: AdamW's, on embeddings and matrices.
        muon: Muon's lr, weight_decay, momentum and iterations; None leaves all to AdamW.
        fused: whether AdamW may use its fused kernel.

    Raises:
        ValueError: a block has a matrix of which MUON_MATRICES does not say how to take it.
    """
    decayed = [p for p in parameters if p.dim() > 1]
    vectors = dict(params=[p for p in parameters if p.dim() <= 1], weight_decay=0.0)
    if muon is None:
        groups = [dict(params=decayed, weight_decay=weight_decay), vectors]
        return torch.optim.AdamW(groups, fused=fused, **adamw)
    hidden: dict[int, list[Tensor]] = {}  # by the number of matrices in each
    for block in blocks:
        for name, parameter in block.named_parameters():
            if parameter.dim() > 1:
                if name not in MUON_MATRICES:
                    raise ValueError(
                        f"Muon has no rule for the weight {name} of a block\n"
                        "add it to MUON_MATRICES in training/optimizers.py, or leave out muon_lr"
                    )
                hidden.setdefault(MUON_MATRICES[name], []).append(parameter)
    taken = {id(p) for matrices in hidden.values() for p in matrices}
    rest = dict(params=[p for p in decayed if id(p) not in taken], weight_decay=weight_decay)
    groups = [rest | adamw, vectors | adamw]
    for parts, matrices in sorted(hidden.items()):
        groups.append(dict(params=matrices, muon=True, parts=parts, **muon))
    return MuonAdamW(groups)


# ---- the learning rate over a run ----

# Share of the highest learning rate when `progress`, 0 to 1, of the run is over.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
}
