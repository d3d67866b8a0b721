"""A sweep: short runs over learning rates or other settings, and a table of losses, best first.

    python tests/benchmarks/sweep.py --config cpu --steps 100
    python tests/benchmarks/sweep.py --config cpu --steps 100 --set model.lr=3e-3,6e-3 model.n_layer=2,3

Runs all combinations one after another. A run of a few steps is enough to rank learning rates. Each
is a separate `python -m chargpt fit` in a temporary folder, with the same seed and so the same batches.
"""

import argparse
import itertools
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path


def val_loss(config: str, steps: int, flags: list[str]) -> float:
    """Train in a separate process, so that a diverging run does not end the sweep."""
    if Path(config).is_file():
        config = str(Path(config).resolve())
    fit = [sys.executable, "-m", "chargpt", "fit", f"--config={config}", *flags]
    fit += [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"]
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(fit, cwd=folder, capture_output=True, text=True)
    found = re.search(r"best validation loss (\S+)", run.stdout + run.stderr)
    if not found:
        print("\n".join(run.stderr.strip().splitlines()[-2:]), file=sys.stderr)
    return float(found[1]) if found else math.inf


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="cpu")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument(
        "--set",
        nargs="+",
        default=["model.lr=1.5e-3,3e-3,6e-3,1.2e-2"],
        help="name=value,value,...",
    )
    options = parser.parse_args()

    commas = re.compile(r",(?![^{\[]*[}\]])")  # not those inside {2: 8192, 3: 8192}
    pairs = [setting.partition("=") for setting in options.set]
    choices = [(name, commas.split(values)) for name, _, values in pairs]
    names = [name for name, _ in choices]
    results = []
    for values in itertools.product(*(values for _, values in choices)):
        flags = [f"--{name}={value}" for name, value in zip(names, values)]
        results.append((val_loss(options.config, options.steps, flags), values))
        print(*values, f"{results[-1][0]:.4f}", sep="\t", file=sys.stderr, flush=True)

    print(f"| {' | '.join(names)} | validation loss after {options.steps} steps |")
    print("|---" * (len(names) + 1) + "|")
    for loss, values in sorted(results):
        print(f"| {' | '.join(values)} | {loss:.4f} |")


if __name__ == "__main__":
    main()
