"""Validation loss as a function of training time, for several configurations on one machine.

    python tests/benchmarks/recipes.py compare --seeds 3 --json out.json
    python tests/benchmarks/recipes.py compare --configs configs/cpu.yaml configs/laptop.yaml --seeds 1
    python tests/benchmarks/recipes.py compare --reference tests/benchmarks/nanogpt-gpu.yaml --configs configs/best.yaml
    python tests/benchmarks/recipes.py ablate --config configs/cpu.yaml --steps 250 --seeds 3
    python tests/benchmarks/recipes.py plot out.json --picture curves.png      # needs matplotlib

Each run is a `python -m chargpt fit` as a user would start it. Training time excludes validation,
text samples and checkpoints, which all happen at validations and are reported separately.
`compare` starts with the reference, by default nanoGPT's CPU settings on the textbook model.
"""

import argparse
import contextlib
import json
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer

from chargpt.cli.train import TrainingCLI

HERE = Path(__file__).resolve().parent
NANOGPT = HERE / "nanogpt-cpu.yaml"
CPU = HERE.parents[1] / "configs" / "cpu.yaml"

# Changes to a configuration, one at a time.
ABLATIONS = {
    "the full recipe": [],
    "learned positions instead of rotary": ["--model.position=learned"],
    "LayerNorm as in the textbook": ["--model.norm=layer"],
    "biases": ["--model.bias=true"],
    "squared ReLU": ["--model.activation=relu2"],
    "sequences at random offsets": ["--data.order=random"],
    "no n-gram embeddings": ["--model.ngrams=null"],
    "only n-grams of three characters": ["--model.ngrams={3: 8192}"],
    "no n-gram dropout": ["--model.ngram_dropout=0"],
    "no weight decay": ["--model.weight_decay=0"],
    "AdamW's default eps": ["--model.eps=1e-8"],
    "no second target": ["--model.second_target=0"],
    "full context from the start": ["--model.short_contexts=null"],
    "AdamW alone": ["--model.optimizer=adamw", "--model.muon_lr=null"],
    "constant learning rate": ["--model.schedule=constant"],
}


class Clock(Callback):
    """Records the loss at each validation, with the training time until then, and validation time."""

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self.start = time.perf_counter()
        self.validating_s = 0.0
        self.curve: list[tuple[int, float, float]] = []  # step, seconds of training, loss

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        self.paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        training_s = self.paused - self.start - self.validating_s
        self.curve.append(
            (trainer.global_step, training_s, trainer.callback_metrics["val_loss"].item())
        )
        self.validating_s += time.perf_counter() - self.paused


class MeasuredCLI(TrainingCLI):
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        self.clock = Clock()
        trainer.callbacks.append(self.clock)  # last: the validation time includes other callbacks
        return trainer


def run(config: Path, seed: int, flags: list[str]) -> dict[str, Any]:
    """Train once in a temporary folder and return the curve and the times."""
    home, config = Path.cwd(), config.absolute()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        os.chdir(folder)
        try:
            with contextlib.redirect_stderr(nowhere):
                cli = MeasuredCLI(
                    "fit", [f"--config={config}", f"--seed_everything={seed}", *flags]
                )
                cli.run()
                clock = cli.clock
        finally:
            os.chdir(home)
    step, seconds, loss = clock.curve[-1]
    return dict(
        config=config.stem,
        seed=seed,
        steps=step,
        training_s=seconds,
        validating_s=clock.validating_s,
        val_loss=loss,
        best_val_loss=min(loss for *_, loss in clock.curve),
        curve=clock.curve,
    )


def show(title: str, runs: list[dict[str, Any]]) -> None:
    losses = [run["val_loss"] for run in runs]
    print(
        f"{title:40}  val_loss {statistics.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f}, "
        f"{len(runs)} seeds)  training {statistics.median(r['training_s'] for r in runs):6.1f} s  "
        f"validation {statistics.median(r['validating_s'] for r in runs):5.1f} s  "
        f"{runs[0]['steps']:,} steps",
        flush=True,
    )


def seconds_to(loss: float, run: dict[str, Any]) -> float | None:
    """Training time until the first validation with at most this loss."""
    return next((seconds for _, seconds, value in run["curve"] if value <= loss), None)


def compare(options: argparse.Namespace) -> None:
    reference_config = options.reference
    configs = [reference_config, *options.configs]
    # Alternate between configurations, because the speed of a machine varies.
    runs = [
        run(config, seed, options.flags)
        for seed in range(1, options.seeds + 1)
        for config in configs
    ]
    for config in configs:
        show(config.stem, [r for r in runs if r["config"] == config.stem])
    reference = [r for r in runs if r["config"] == reference_config.stem]
    target = statistics.mean(r["val_loss"] for r in reference)
    whole = statistics.median(r["training_s"] for r in reference)
    for config in options.configs:
        times = [seconds_to(target, r) for r in runs if r["config"] == config.stem]
        if all(times):
            print(
                f"{config.stem} reaches {target:.4f}, the final loss of {reference_config.stem}, after "
                f"{statistics.median(times):.1f} s: 1/{whole / statistics.median(times):.1f} of the time"
            )
    if options.json:
        options.json.write_text(json.dumps(runs))


def ablate(options: argparse.Namespace) -> None:
    """Compare at equal steps, because the speed of a machine varies; times are reported as well."""
    steps = [
        f"--trainer.max_steps={options.steps}",
        f"--trainer.val_check_interval={options.steps}",
    ]
    flags = [*steps, *options.flags]
    for title, changes in ABLATIONS.items():
        show(
            title,
            [run(options.config, seed, flags + changes) for seed in range(1, options.seeds + 1)],
        )


def plot(options: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    runs = json.loads(options.json.read_text())
    for number, config in enumerate(dict.fromkeys(run["config"] for run in runs)):
        same = [run for run in runs if run["config"] == config]
        mean = statistics.mean(run["val_loss"] for run in same)
        for i, run in enumerate(same):
            label = None if i else f"{config} ({mean:.3f}, mean of {len(same)})"
            points = [(seconds, loss) for _, seconds, loss in run["curve"]]
            axes.plot(*zip(*points), color=f"C{number}", label=label, alpha=0.8)
    axes.set(
        xlabel="seconds of training", ylabel="validation loss, nats per character", xscale="log"
    )
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(options.picture, dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for command in (compare, ablate):
        sub = commands.add_parser(command.__name__)
        sub.set_defaults(command=command)
        sub.add_argument("--seeds", type=int, default=3)
        sub.add_argument("flags", nargs="*", help="additional flags for `fit`, after --")
        if command is compare:
            sub.add_argument("--reference", type=Path, default=NANOGPT)
            sub.add_argument("--configs", type=Path, nargs="+", default=[CPU])
            sub.add_argument("--json", type=Path)
        else:
            sub.add_argument("--config", type=Path, default=CPU)
            sub.add_argument("--steps", type=int, default=250)
    sub = commands.add_parser("plot")
    sub.set_defaults(command=plot)
    sub.add_argument("json", type=Path)
    sub.add_argument("--picture", type=Path, default=Path("curves.png"))
    options = parser.parse_args()
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    options.command(options)


if __name__ == "__main__":
    main()
