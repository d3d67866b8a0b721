"""Overhead of the Trainer: steps of `python -m chargpt fit` compared with a plain PyTorch loop.

The plain loop takes a step before each step of the Trainer, with a network of the same size, the same
batches and the same optimizer, because the load of a machine varies more than the difference
measured here. The Trainer has the usual progress bar, logging and checks. Validation is not counted,
since a plain loop would have to validate too, but the two checkpoints written at each validation are:
their time is divided among the steps between two validations.

    python tests/benchmarks/overhead.py --config configs/cpu.yaml --steps 300
    python tests/benchmarks/overhead.py --config configs/base.yaml --steps 12

Several ranks are compared with plain DistributedDataParallel, measured on rank 0:

    python tests/benchmarks/overhead.py --steps 100 -- --trainer.accelerator cpu --trainer.strategy ddp \\
        --trainer.devices 2 --data.batch_size 16 --trainer.max_time 00:01:00:00
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch.distributed
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from chargpt.cli.train import TrainingCLI
from chargpt.data import CharDataModule
from chargpt.training import GPTModule

CHECKPOINTS = 2  # per validation: last.ckpt and best.ckpt
WARM_UP_STEPS = 2


class PlainLoop:
    """Training without Lightning, one step at a time.

    Args:
        module: attached to a trainer; a second network and optimizer are built with its settings.
        data: provides the training sequences.
    """

    def __init__(self, module: GPTModule, data: CharDataModule) -> None:
        original = module.gpt
        module.build(data.vocabulary)
        self.optimizer = module.configure_optimizers()
        self.gpt, module.gpt = module.gpt, original
        if torch.distributed.is_initialized():
            self.gpt = DistributedDataParallel(self.gpt)
        if module.config.compile:
            self.gpt.compile()
        self.batches = iter(data.train_dataloader().dataset)

    def step(self) -> None:
        batch = next(self.batches).long()
        logits = self.gpt(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("configs/cpu.yaml"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("flags", nargs="*", help="additional flags for `fit`, after --")
    options = parser.parse_args()
    trainer_s, plain_s = [], []
    loop, plain_end = None, 0.0
    training_step = GPTModule.training_step

    def alternating_step(module: GPTModule, batch, batch_idx):
        nonlocal loop, plain_end
        if loop is None:
            loop = PlainLoop(module, module.trainer.datamodule)
        else:
            trainer_s.append(time.perf_counter() - plain_end)
        plain_s.append(seconds(loop.step))
        plain_end = time.perf_counter()
        return training_step(module, batch, batch_idx)

    GPTModule.training_step = alternating_step
    config = options.config.absolute()
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
    ):
        cli = TrainingCLI(
            "fit",
            [
                f"--config={config}",
                f"--trainer.max_steps={WARM_UP_STEPS + options.steps + 1}",
                f"--trainer.default_root_dir={folder}",
                "--trainer.limit_val_batches=0",
                "--trainer.max_time=null",
                "--model.schedule=constant",
                "--model.short_contexts=null",
                "--model.second_target=0",
                *options.flags,
            ],
        )
        cli.run()
        checkpoint = Path(folder, "timed.ckpt")
        checkpoint_s = statistics.median(
            seconds(lambda: cli.trainer.save_checkpoint(checkpoint)) for _ in range(5)
        )
    if cli.trainer.is_global_zero:
        times = trainer_s[WARM_UP_STEPS:], plain_s[WARM_UP_STEPS:-1]
        report(*times, checkpoint_s, cli.trainer.val_check_interval)


def report(
    trainer_s: list[float], plain_s: list[float], checkpoint_s: float, interval: int
) -> None:
    saving_s = CHECKPOINTS * checkpoint_s / interval
    print(
        f"{len(plain_s)} steps each, medians: Trainer {statistics.median(trainer_s) * 1e3:.1f} ms, "
        f"plain loop {statistics.median(plain_s) * 1e3:.1f} ms; "
        f"checkpoints {saving_s * 1e3:.2f} ms per step ({checkpoint_s:.3f} s each)"
    )
    parts = [
        slice(i, i + len(plain_s) // 6) for i in range(0, len(plain_s) // 6 * 6, len(plain_s) // 6)
    ]
    for name, extra in (("without", 0.0), ("with", saving_s)):
        ratios = [
            sum(plain_s[part]) / (sum(trainer_s[part]) + extra * len(plain_s[part]))
            for part in parts
        ]
        print(
            f"speed of the Trainer relative to the plain loop, {name} checkpoints: "
            f"median {statistics.median(ratios):.3f} of six parts ({min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
