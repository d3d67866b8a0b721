"""How the weights are moved: Muon, and the learning rate over a run."""

import math

import torch
from torch import Tensor
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


def orthogonalise(matrices: Tensor, iterations: int) -> Tensor:
    """Bring every singular value of every matrix close to 1, and keep its singular vectors.

    A Newton-Schulz iteration: matrix products alone, so it is fast where they are. In bfloat16 on
    GPUs; in float32 elsewhere, since a processor without bfloat16 crawls in it.

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
    """Muon for the groups that say `muon: True`, AdamW for all others, in one optimizer.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) steps by the momentum
    with its singular values set to 1: every direction of a matrix moves by the same amount, the
    rare ones too.

    Args:
        groups: parameter groups. Of each: `lr` and `weight_decay` (decoupled); for Muon
            `momentum`, `iterations` and `parts`, the number of matrices that stand one above the
            other in each parameter (3 where query, key and value are fused); for AdamW `betas`.
    """

    def __init__(self, groups: list[dict]) -> None:
        defaults = dict(
            lr=1e-3, weight_decay=0.0, muon=False, betas=(0.9, 0.95), momentum=0.95, iterations=4, parts=1
        )
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure=None):
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
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's look ahead
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])

        by_shape: dict[torch.Size, list[int]] = {}  # matrices of one shape go through together
        for i, p in enumerate(parameters):
            by_shape.setdefault(p.shape, []).append(i)
        for (rows, columns), members in by_shape.items():
            rows //= group["parts"]
            stack = torch.stack([updates[i] for i in members]).view(-1, rows, columns)
            stack = orthogonalise(stack, group["iterations"]).reshape(len(members), -1, columns)
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
            eps=1e-8,
            maximize=False,
        )


def decay(shape: str, progress: float) -> float:
    """Share of the highest learning rate when `progress` (0 to 1) of the run is over.

    Args:
        shape: "constant", "cosine" or "linear"; the last two end at 0.
    """
    progress = min(max(progress, 0.0), 1.0)
    if shape == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if shape == "linear" else 1.0
