"""A training step: its fraction of peak performance, and a profile.

    python tests/benchmarks/step.py --config cpu
    python tests/benchmarks/step.py --config laptop --steps 10
    python tests/benchmarks/step.py --config best --contexts 64 1024
    python tests/benchmarks/step.py --config base -- --trainer.accelerator gpu --trainer.precision bf16-mixed

For each context length of the configuration, alternating with a large matrix product that stands for
peak performance: forward and backward pass, and the optimizer. Operations are those of matrix products:
six per weight of a linear layer and character, and attention over half of the square, since it is
causal; the second target's head counts, embeddings and elementwise operations do not. Then
torch.profiler shows where the time goes: on a CPU in percent of the step; on a GPU the time that its
kernels take (a GPU that is idle for much of the step waits for kernels to be launched), and the
slowest kernels. Ids are random: the time does not depend on them.
"""

import argparse
import logging
import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile

from chargpt.cli.train import TrainingCLI, keep_freed_memory
from chargpt.model import GPTConfig
from chargpt.vocabulary import Vocabulary

VOCABULARY = Vocabulary("".join(map(chr, range(32, 97))))  # 65 characters, as tiny Shakespeare has
PEAK_SIZE = {"cpu": 1024, "cuda": 8192}  # rows and columns of the matrices
KERNELS = 12  # to list
GROUPS = {  # kinds of operations, by their names in the profiler
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn"),
    "attention": ("attention",),
    "LayerNorm": ("layer_norm",),
    "activation": ("relu", "threshold", "clamp_min", "gelu"),
    "embeddings": ("embedding", "aten::index"),
    "dropout": ("dropout", "bernoulli"),
    "AdamW": ("adamw",),
    "copies, fills": ("aten::copy_", "aten::fill_", "aten::zero_", "aten::cat", "aten::clone"),
    "sums, products": ("aten::add", "aten::mul", "aten::sum", "aten::lerp", "foreach"),
    "softmax and loss": ("softmax", "nll_loss"),
}


class Step:
    """A step of a configuration, without its Trainer's loop.

    Args:
        config: path or name.
        flags: additional flags for `fit`.
    """

    def __init__(self, config: str, flags: list[str]) -> None:
        cli = TrainingCLI("fit", [f"--config={config}", "--trainer.fast_dev_run=true", *flags])
        self.module, self.batch_size = cli.model, cli.datamodule.hparams.batch_size
        self.module.trainer, self.device = cli.trainer, cli.trainer.strategy.root_device
        self.module.build(VOCABULARY)
        self.module.to(self.device)
        self.gpt = self.module.gpt.train()
        self.optimizer = self.module.configure_optimizers()

    @property
    def contexts(self) -> list[int]:
        config = self.module.config
        return [*sorted(config.short_contexts or {}), config.block_size]

    def ids(self, context: int) -> torch.Tensor:
        rows = self.batch_size * self.module.config.block_size // context
        return torch.randint(len(VOCABULARY), (rows, context + 1), device=self.device)

    def forward_backward(self, batch: torch.Tensor) -> None:
        ids, targets = batch[:, :-1], batch[:, 1:]
        with self.module.trainer.precision_plugin.forward_context():
            hidden = self.module.hidden_states(self.gpt, ids)
            loss = self.module.loss(hidden, targets)
            if self.module.second_head is not None:
                loss = loss + self.module.second_loss(hidden, targets)
        loss.backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, batch: torch.Tensor, steps: int) -> None:
        for _ in range(steps):
            self.forward_backward(batch)
            self.update()

    def operations(self, context: int) -> float:
        """Of the forward and backward pass together."""
        characters = self.batch_size * self.module.config.block_size
        return characters * operations_per_character(self.module, self.module.config, context)


def operations_per_character(module: torch.nn.Module, config: GPTConfig, context: int) -> int:
    """Of the forward and backward pass: 6 per weight of a linear layer, and causal attention."""
    layers = [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)]
    weights = sum(layer.weight.numel() for layer in layers)
    # q k^T and the product with v, 2 T C each, of which causal attention needs half
    attention = 2 * context * config.n_embd * config.n_layer
    return 6 * weights + 3 * attention


def seconds(work, *args) -> float:
    synchronize()
    start = time.perf_counter()
    work(*args)
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(step: Step, context: int, turns: int) -> None:
    size = PEAK_SIZE[step.device.type]
    with step.module.trainer.precision_plugin.forward_context():
        a = torch.randn(size, size, device=step.device) @ torch.eye(size, device=step.device)
    batch = step.ids(context)
    step.run(batch, 3)  # warms up
    times = [
        (seconds(torch.mm, a, a), seconds(step.forward_backward, batch), seconds(step.update))
        for _ in range(turns)
    ]
    product, passes, update = (statistics.median(column) for column in zip(*times))
    peak, rate = 2 * size**3 / product, step.operations(context) / passes
    print(
        f"context {context:4}  forward and backward {passes * 1e3:6.1f} ms, {rate / 1e9:4.0f} of "
        f"{peak / 1e9:4.0f} GFLOP/s: {rate / peak:.2f} of the peak; optimizer {update * 1e3:5.1f} ms, "
        f"{update / (passes + update):.0%} of the step"
    )


def print_profile(step: Step, context: int, turns: int) -> None:
    batch = step.ids(context)
    if step.device.type == "cuda":
        return print_kernels(step, batch, turns)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step.run(batch, turns)
    times = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    whole, rest = sum(times.values()), dict(times)
    print(f"\ncontext {context}, percent of the step")
    for group, names in GROUPS.items():
        members = [key for key in rest if any(name in key.lower() for name in names)]
        print(f"  {group:18}{sum(rest.pop(key) for key in members) / whole:6.1%}")
    print(f"  {'everything else':18}{sum(rest.values()) / whole:6.1%}: ", end="")
    most = sorted(rest, key=rest.__getitem__, reverse=True)[:4]
    print(", ".join(f"{key} {rest[key] / whole:.1%}" for key in most))


def print_kernels(step: Step, batch: torch.Tensor, turns: int) -> None:
    """The time of the GPU's kernels in a step, compared with that of a step without the profiler."""
    wall_s = seconds(step.run, batch, turns) / turns
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step.run(batch, turns)
        synchronize()
    kernels = [
        event
        for event in profiled.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    kernels.sort(key=lambda event: event.self_device_time_total, reverse=True)
    busy_s = sum(event.self_device_time_total for event in kernels) / turns / 1e6
    launches = sum(event.count for event in kernels) / turns
    print(
        f"\ncontext {batch.size(1) - 1}: a step takes {wall_s * 1e3:.2f} ms, its {launches:,.0f} kernels "
        f"{busy_s * 1e3:.2f} ms: the GPU is busy for {busy_s / wall_s:.0%} of the time"
    )
    for event in kernels[:KERNELS]:
        share, count = event.self_device_time_total / turns / 1e6 / busy_s, event.count / turns
        print(f"  {share:6.1%} of the kernels' time, {count:5.0f} per step: {event.key[:60]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="cpu")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--contexts", type=int, nargs="+", help="default: all of the configuration")
    parser.add_argument("flags", nargs="*", help="additional flags for `fit`, after --")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    step = Step(options.config, options.flags)
    keep_freed_memory()  # as `fit` does
    contexts = options.contexts or step.contexts
    for context in contexts:
        measure(step, context, options.steps)
    for context in contexts:
        print_profile(step, context, options.steps)


if __name__ == "__main__":
    main()
