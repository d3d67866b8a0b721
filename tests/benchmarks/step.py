"""A training step: its share of the machine's peak, and where its time goes.

    python tests/benchmarks/step.py --config cpu
    python tests/benchmarks/step.py --config laptop --steps 10

For each length of context that the configuration uses, in turns with a matrix product of 1,024 by
1,024 that stands for the peak: forward and backward, and the optimizer. Operations are counted as the
textbook does: six for each weight of a matrix and character, and attention's products over half of
the square, since it is causal; the head of a second target counts, embeddings and all else are no
operations. Then torch.profiler says where the time goes, in percent of the step. Ids are random: the
time does not depend on them.
"""

import argparse
import logging
import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile

from chargpt.cli.train import TrainingCLI, keep_freed_memory
from chargpt.vocabulary import Vocabulary

VOCABULARY = Vocabulary("".join(map(chr, range(32, 97))))  # 65 characters, as tiny Shakespeare has
PEAK_SIZE = 1024
GROUPS = {  # kinds of work, by what the profiler calls them
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
    """A step of a configuration, without its Trainer."""

    def __init__(self, config: str) -> None:
        cli = TrainingCLI("fit", [f"--config={config}", "--trainer.fast_dev_run=true"])
        self.module, self.batch_size = cli.model, cli.datamodule.hparams.batch_size
        self.module.trainer = cli.trainer
        self.module.build(VOCABULARY)
        self.gpt = self.module.gpt.train()
        self.optimizer = self.module.configure_optimizers()

    @property
    def contexts(self) -> list[int]:
        config = self.module.config
        return [*sorted(config.short_contexts or {}), config.block_size]

    def ids(self, context: int) -> torch.Tensor:
        rows = self.batch_size * self.module.config.block_size // context
        return torch.randint(len(VOCABULARY), (rows, context + 1))

    def forward_backward(self, batch: torch.Tensor) -> None:
        ids, targets = batch[:, :-1], batch[:, 1:]
        hidden = self.module.hidden_states(self.gpt, ids)
        loss = self.module.loss(hidden, targets)
        if self.module.second_head is not None:
            loss = loss + self.module.second_loss(hidden, targets)
        loss.backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def operations(self, context: int) -> float:
        """Of forward and backward together."""
        c, characters = self.module.config, self.batch_size * self.module.config.block_size
        layers = [m for m in self.module.modules() if isinstance(m, torch.nn.Linear)]
        weights = sum(layer.weight.numel() for layer in layers)
        attention = 2 * context * c.n_embd * c.n_layer  # q k^T and its product with v, half of each
        return characters * (6 * weights + 3 * attention)


def seconds(work, *args) -> float:
    start = time.perf_counter()
    work(*args)
    return time.perf_counter() - start


def measure(step: Step, context: int, turns: int) -> None:
    a = torch.randn(PEAK_SIZE, PEAK_SIZE)
    batch = step.ids(context)
    step.forward_backward(batch)  # warms up
    step.update()
    times = [
        (seconds(torch.mm, a, a), seconds(step.forward_backward, batch), seconds(step.update))
        for _ in range(turns)
    ]
    product, passes, update = (statistics.median(column) for column in zip(*times))
    peak, rate = 2 * PEAK_SIZE**3 / product, step.operations(context) / passes
    print(
        f"context {context:4}  forward and backward {passes * 1e3:6.1f} ms, {rate / 1e9:4.0f} of "
        f"{peak / 1e9:4.0f} GFLOP/s: {rate / peak:.2f} of the peak; optimizer {update * 1e3:5.1f} ms, "
        f"{update / (passes + update):.0%} of the step"
    )


def shares(step: Step, context: int, turns: int) -> None:
    batch = step.ids(context)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(turns):
            step.forward_backward(batch)
            step.update()
    times = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    whole, rest = sum(times.values()), dict(times)
    print(f"\ncontext {context}, percent of the step")
    for group, names in GROUPS.items():
        members = [key for key in rest if any(name in key.lower() for name in names)]
        print(f"  {group:18}{sum(rest.pop(key) for key in members) / whole:6.1%}")
    print(f"  {'everything else':18}{sum(rest.values()) / whole:6.1%}: ", end="")
    most = sorted(rest, key=rest.__getitem__, reverse=True)[:4]
    print(", ".join(f"{key} {rest[key] / whole:.1%}" for key in most))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="cpu")
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    step = Step(options.config)
    keep_freed_memory()  # as `fit` does
    for context in step.contexts:
        measure(step, context, options.steps)
    for context in step.contexts:
        shares(step, context, options.steps)


if __name__ == "__main__":
    main()
