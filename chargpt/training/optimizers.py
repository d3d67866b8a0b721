"""Optimizers (AdamW, Muon) and learning rate schedules; add your own to the tables below."""

import math
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

# Polar Express (Amsel et al. 2025, arXiv:2505.16932): for each Newton-Schulz step the odd
# polynomial of degree five that brings singular values closest to 1, given the range that the
# steps before it leave.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)


def orthogonalize(matrices: Tensor, ns_steps: int) -> Tensor:
    """Orthogonalize matrices (..., rows, columns) by a Newton-Schulz iteration.

    Every singular value becomes close to 1, closer with more steps (at most len(POLAR_EXPRESS));
    singular vectors stay. It consists of matrix products only, which are fast: on CUDA in bfloat16,
    elsewhere in float32, since CPUs without bfloat16 instructions are very slow in it.
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

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) steps by the momentum
    with its singular values set to 1: every direction of a matrix moves by the same amount, rare
    ones too. Parameters hold `stacked` matrices, one below the other (3 for query, key and value),
    and more if they have leading dimensions. AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)
    divides the running mean of a weight's gradients by the root of that of their squares.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        adamw = dict(lr=1e-3, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8)
        super().__init__(groups, adamw | dict(muon=False, momentum=0.95, ns_steps=4, stacked=1))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                (self.muon if group["muon"] else self.adamw)(group, parameters)
        return loss

    def buffers(self, parameters: list[Tensor], name: str) -> list[Tensor]:
        """The state of that name of each parameter, at first zeros; a step counter is a scalar."""
        for p in parameters:
            if name not in self.state[p]:
                scalar = torch.zeros((), device=p.device)
                self.state[p][name] = scalar if name == "step" else torch.zeros_like(p)
        return [self.state[p][name] for p in parameters]

    def muon(self, group: dict[str, Any], parameters: list[Any]) -> None:
        gradients, momenta = [p.grad for p in parameters], self.buffers(parameters, "momentum")
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

    def adamw(self, group: dict[str, Any], parameters: list[Any]) -> None:
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [p.grad for p in parameters],
            self.buffers(parameters, "mean"),
            self.buffers(parameters, "square"),
            [],  # maxima, for amsgrad
            self.buffers(parameters, "step"),
            fused=parameters[0].device.type in ("cpu", "cuda"),
            beta1=beta1,
            beta2=beta2,
            **{name: group[name] for name in ("lr", "weight_decay", "eps")},
            amsgrad=False,
            maximize=False,
        )


def matrices_in(module: nn.Module) -> dict[nn.Parameter, int]:
    """The matrices of a module and how many each parameter stacks; biases of any shape are none."""
    matrices: dict[nn.Parameter, int] = {}
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            if p.dim() > 1 and name != "bias":
                matrices.setdefault(p, getattr(part, "stacked", 1))
    return matrices


def adamw_groups(
    module: nn.Module, config: Any, without: Container[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Two parameter groups for AdamW: matrices, which are decayed, and vectors, which are not.

    Vectors are biases and gains of norms: a gain pulled to 0 would remove its
    channel, and biases are too few to overfit.
    """
    betas = (config.beta1, config.beta2)
    adamw = dict(lr=config.lr, initial_lr=config.lr, betas=betas, eps=config.eps)
    parameters = [p for p in module.parameters() if p not in without]
    decayed = matrices_in(module)
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
    muon = dict(
        muon=True,
        lr=config.muon_lr,
        initial_lr=config.muon_lr,
        weight_decay=config.muon_weight_decay,
        momentum=config.muon_momentum,
        ns_steps=config.muon_iterations,
    )
    for stacked in sorted(set(hidden.values())):
        matrices = [p for p in hidden if hidden[p] == stacked]
        groups.append(dict(params=matrices, stacked=stacked, **muon))
    return MuonAdamW(groups)


# Each takes the module whose parameters learn, the blocks of its network, the TrainingConfig, and
# whether a fused kernel may be used. A group's `initial_lr` is its peak learning rate.
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adamw": make_adamw, "muon": make_muon}

# The fraction of the peak learning rate as a function of the optimizer steps so far, the fraction
# of the run that is over, in [0, 1], and the run's number of steps (None if only time limits it).
SCHEDULES: dict[str, Callable[[int, float, int | None], float]] = {
    "constant": lambda step, progress, total_steps: 1.0,
    "cosine": lambda step, progress, total_steps: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda step, progress, total_steps: 1 - progress,
}
