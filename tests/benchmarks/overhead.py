"""What the Trainer costs: steps of `python -m chargpt fit` against a plain PyTorch loop.

Same network, same batches, same optimizer, in one process and in turns. The Trainer's side has the
progress bar and the logging that a user gets. What happens at a validation is left out, since a
plain loop would have to validate as well, but for the three checkpoints written then: their time is
shared among the steps between two validations.

    python tests/benchmarks/overhead.py --config configs/cpu.yaml --steps 100
    python tests/benchmarks/overhead.py --config configs/base.yaml --steps 3 --rounds 2
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch.nn.functional as F

from chargpt.cli import ChargptCLI
from chargpt.data import TrainingBatches
from chargpt.module import GPTModule


CHECKPOINTS = 3  # at a validation: the last one before and after it, and perhaps the best


def trainer_round(config: Path, steps: int, monkeypatched_times: list[float]) -> tuple[ChargptCLI, float]:
    """Run `steps` steps after a first one; returns the command line object and seconds per step."""
    monkeypatched_times.clear()
    cli = ChargptCLI(
        [
            "fit",
            f"--config={config}",
            f"--trainer.max_steps={steps + 1}",
            "--trainer.limit_val_batches=0",
            "--trainer.max_time=null",
            "--model.schedule=constant",
            "--model.short_contexts=null",
        ]
    )
    seconds = (monkeypatched_times[-1] - monkeypatched_times[0]) / steps
    begin = time.perf_counter()
    cli.trainer.save_checkpoint("timed.ckpt")
    checkpoint_s = time.perf_counter() - begin
    return cli, seconds + CHECKPOINTS * checkpoint_s / cli.trainer.val_check_interval


def plain_round(cli: ChargptCLI, steps: int) -> float:
    """The same steps without Lightning; returns seconds per step."""
    module, data = cli.model, cli.datamodule
    module.build(data.vocabulary)
    optimizer = module.configure_optimizers()
    h = data.hparams
    batches = TrainingBatches(data.train_tokens, h.block_size, h.batch_size, h.seed)
    for k, batch in zip(range(steps + 1), batches):
        if k == 1:
            start = time.perf_counter()
        batch = batch.long()
        logits = module.gpt(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - start) / steps


def record_starts_of_steps() -> list[float]:
    times: list[float] = []
    step = GPTModule.training_step

    def timed_step(self, batch, batch_idx):
        times.append(time.perf_counter())
        return step(self, batch, batch_idx)

    GPTModule.training_step = timed_step
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/cpu.yaml"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    config, times = options.config.absolute(), record_starts_of_steps()

    trainer_s, plain_s = [], []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for _ in range(options.rounds):
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
                cli, seconds = trainer_round(config, options.steps, times)
            trainer_s.append(seconds)
            plain_s.append(plain_round(cli, options.steps))
            print(f"Trainer {trainer_s[-1] * 1e3:8.2f} ms/step   plain loop {plain_s[-1] * 1e3:8.2f} ms/step", flush=True)
    ratios = [p / t for p, t in zip(plain_s, trainer_s)]
    print(
        f"speed of the Trainer as a share of the plain loop's: median {statistics.median(ratios):.3f} "
        f"(from {min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
