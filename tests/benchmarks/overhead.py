"""What the Trainer costs: steps of `python -m chargpt fit` against those of a plain PyTorch loop.

Before each step of the Trainer the plain loop takes one: same size of network, same batches, same
optimizer, and the same load of the machine, which changes more from second to second than what is
measured here. The Trainer's side has the progress bar, the logging and the checks that a user gets.
What happens at a validation is left out, since a plain loop would have to validate as well, but for
the two checkpoints written then: their time is shared among the steps between two validations.

    python tests/benchmarks/overhead.py --config configs/cpu.yaml --steps 300
    python tests/benchmarks/overhead.py --config configs/base.yaml --steps 12

Several ranks are compared with plain DistributedDataParallel, in the first of them:

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
from chargpt.data.module import ORDERS
from chargpt.training import GPTModule

CHECKPOINTS = 2  # at a validation: the last one, and the best one if it is
WARM_UP_STEPS = 2


class PlainLoop:
    """Training without Lightning, a step at a time.

    Args:
        module: knows its trainer; its network and its optimizer are made once more.
        data: gives the blocks.
    """

    def __init__(self, module: GPTModule, data: CharDataModule) -> None:
        trained = module.gpt
        module.build(data.vocabulary)
        self.optimizer = module.configure_optimizers()
        self.gpt, module.gpt = module.gpt, trained
        if torch.distributed.is_initialized():
            self.gpt = DistributedDataParallel(self.gpt)
        h, place = data.hparams, data.rank_and_world_size
        Blocks = ORDERS[h.order]
        blocks = Blocks(data.train_tokens, h.block_size, h.batch_size, h.seed, *place)
        if module.config.compile:
            self.gpt.compile()
        self.batches = iter(blocks)

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
    parser.add_argument("flags", nargs="*", help="further flags for `fit`, after --")
    options = parser.parse_args()
    trainer_s, plain_s = [], []
    loop, plain_ended = None, 0.0
    training_step = GPTModule.training_step

    def step_after_a_plain_one(module: GPTModule, batch, batch_idx):
        nonlocal loop, plain_ended
        if loop is None:
            loop = PlainLoop(module, module.trainer.datamodule)
        else:
            trainer_s.append(time.perf_counter() - plain_ended)
        plain_s.append(seconds(loop.step))
        plain_ended = time.perf_counter()
        return training_step(module, batch, batch_idx)

    GPTModule.training_step = step_after_a_plain_one
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
        f"{len(plain_s)} steps of each, medians: Trainer {statistics.median(trainer_s) * 1e3:.1f} ms, "
        f"plain loop {statistics.median(plain_s) * 1e3:.1f} ms; "
        f"checkpoints {saving_s * 1e3:.2f} ms a step ({checkpoint_s:.3f} s each)"
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
            f"speed of the Trainer as a share of the plain loop's, {name} checkpoints: "
            f"median {statistics.median(ratios):.3f} of six parts (from {min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
