"""Optimizers (AdamW, Muon) and learning rate schedules; add your own to the tables below."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Polar Express (Amsel et al. 2025, arXiv:2505.16932): for each Newton-Schulz step, the odd
# polynomial that brings singular values, within the range left by earlier steps, closest to 1.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)


def orthogonalize(matrices: Tensor, ns_steps: int) -> Tensor:
    """Orthogonalize matrices (..., rows, columns) with Newton-Schulz iterations.

    Nonzero singular values are brought near 1, nearer with more steps (up to len(POLAR_EXPRESS));
    singular vectors are unchanged. It computes in bfloat16 on CUDA, and in float32 elsewhere:
    bfloat16 is very slow on CPUs that lack instructions for it.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    if tall := x.size(-2) > x.size(-1):
        x = x.mT  # so that x @ x.mT has the smaller dimension
    x = x / (1.01 * x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in POLAR_EXPRESS[:ns_steps]:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class MuonAdamW(Optimizer):
    """Muon for the parameter groups with `muon: True`, AdamW for all others, in one optimizer.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) updates a matrix by its
    momentum with all singular values set to 1: every direction moves by the same amount, even rare
    ones. A parameter holds `stacked` matrices, one below the other (3 for query, key and value),
    and more if it has leading dimensions.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        fused = groups[0]["params"][0].device.type in ("cpu", "cuda")
        self.adamw = torch.optim.AdamW(groups, fused=fused)  # completes the groups
        muon = dict(muon=False, momentum=0.95, ns_steps=4, stacked=1)
        super().__init__(self.adamw.param_groups, muon)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure() if closure else None
        self.adamw.state = self.state
        self.adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self.adamw.step()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["muon"] and parameters:
                self.muon_step(group, parameters)
        return loss

    def muon_step(self, group: dict[str, Any], parameters: list[Any]) -> None:
        for p in parameters:
            if p not in self.state:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum"] for p in parameters]
        gradients = [p.grad for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov momentum
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        for shape in dict.fromkeys(p.shape for p in parameters):  # a batch for each shape
            members = [i for i, p in enumerate(parameters) if p.shape == shape]
            rows, columns = shape[-2] // group["stacked"], shape[-1]
            matrices = torch.stack([updates[i] for i in members]).view(-1, rows, columns)
            matrices = orthogonalize(matrices, group["ns_steps"]).reshape(len(members), *shape)
            lr = group["lr"] * max(1, rows / columns) ** 0.5  # output change independent of shape
            torch._foreach_add_([parameters[i] for i in members], matrices.unbind(), alpha=-lr)


def matrices_in(module: nn.Module) -> dict[nn.Parameter, int]:
    """The parameters of a module that are matrices, never biases, and how many each stacks."""
    matrices: dict[nn.Parameter, int] = {}
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            if p.dim() > 1 and name != "bias":
                matrices.setdefault(p, getattr(part, "stacked", 1))
    return matrices


def adamw_groups(module: nn.Module, config: Any, without: Any = ()) -> list[dict[str, Any]]:
    """Two parameter groups for AdamW: matrices, which are decayed, and vectors, which are not.

    A gain pulled to 0 would remove its channel, and biases are too few to overfit.
    """
    betas = (config.beta1, config.beta2)
    adamw = dict(lr=config.lr, initial_lr=config.lr, betas=betas, eps=config.eps)
    parameters, decayed = [p for p in module.parameters() if p not in without], matrices_in(module)
    matrices = [p for p in parameters if p in decayed]
    vectors = [p for p in parameters if p not in decayed]
    return [
        dict(params=matrices, weight_decay=config.weight_decay, **adamw),
        dict(params=vectors, weight_decay=0.0, **adamw),
    ]


def make_adamw(module: nn.Module, blocks: nn.Module, config: Any, fused: bool) -> Optimizer:
    """AdamW for all parameters."""
    return torch.optim.AdamW(adamw_groups(module, config), fused=fused)


def make_muon(module: nn.Module, blocks: nn.Module, config: Any, fused: bool) -> Optimizer:
    """Muon for the matrices of the blocks, AdamW for embeddings, heads and vectors."""
    hidden = matrices_in(blocks)
    groups = adamw_groups(module, config, without=hidden)
    lr, weight_decay = config.muon_lr, config.muon_weight_decay
    muon = dict(muon=True, lr=lr, initial_lr=lr, weight_decay=weight_decay)
    muon |= dict(momentum=config.muon_momentum, ns_steps=config.muon_iterations)
    for stacked in sorted(set(hidden.values())):
        matrices = [p for p in hidden if hidden[p] == stacked]
        groups.append(dict(params=matrices, stacked=stacked, **muon))
    return MuonAdamW(groups)


# Each takes the module whose parameters are trained, the blocks of its network, the TrainingConfig,
# and whether a fused kernel may be used (Muon decides itself). `initial_lr` is a group's peak rate.
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adamw": make_adamw, "muon": make_muon}

# Each returns a factor from 1 (the peak learning rate) to 0 (min_lr_ratio of it) for the optimizer
# steps so far, the fraction of the run completed, and its steps (None if only time limits it).
SCHEDULES: dict[str, Callable[[int, float, int | None], float]] = {
    "constant": lambda step, progress, total_steps: 1.0,
    "cosine": lambda step, progress, total_steps: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda step, progress, total_steps: 1 - progress,
}
