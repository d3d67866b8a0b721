"""Kill runs with SIGKILL at random moments, go on, and compare with a run that was left alone.

    python tests/benchmarks/soak.py --runs 10          # so many with one process, so many with two

Each run trains in a folder of its own, is killed (all its processes at once) in turn at any moment
between its first checkpoint and its end, while it saves a checkpoint, and while it validates; then it
goes on with `--ckpt_path last`. What the kill left must be whole checkpoints, the final weights and the
optimizer's state must be, bit for bit, those of a run with as many processes that was never killed, and
nothing half-written may be left at the end.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from chargpt.checkpoints import last_checkpoint, newest_run, read_checkpoint

SETTINGS = """
trainer: {max_steps: 150, val_check_interval: 30, log_every_n_steps: 10, accumulate_grad_batches: 2,
          accelerator: cpu, enable_progress_bar: false}
model: {n_embd: 32, n_head: 2, n_layer: 2, dropout: 0.1, lr: 3.0e-3, muon_lr: 0.02, schedule: linear}
data: {corpus: python-reference, block_size: 32, batch_size: 4, val_fraction: 0.005}
"""


def start(folder: Path, world: int, *more: str) -> subprocess.Popen:
    config = folder.parent / "soak.yaml"
    config.write_text(SETTINGS)
    command = [sys.executable, "-m", "chargpt", "fit", "--config", str(config), "--data.data_dir"]
    command += [str(folder.parent / "texts"), f"--trainer.devices={world}", *more]
    command += ["--trainer.strategy=ddp"] if world > 1 else []
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def wait_for_checkpoint(folder: Path, process: subprocess.Popen) -> None:
    while not list(folder.glob("lightning_logs/*/checkpoints/last.ckpt")):
        if process.poll() is not None:
            raise SystemExit(f"the run ended with {process.returncode}; see {folder / 'log.txt'}")
        time.sleep(0.005)


def wait_for_moment(kind: str, folder: Path, moments: random.Random, seconds: float) -> None:
    """Wait for the moment of the kill: a run of `seconds` has five validations, each with a save."""
    end = time.monotonic() + 0.9 * seconds  # whatever happens, before the run is over
    if kind == "any":
        return time.sleep(moments.uniform(0, seconds))
    last = next(folder.glob("lightning_logs/*/checkpoints/last.ckpt"))
    if kind == "saving":
        time.sleep(moments.uniform(0, 0.7 * seconds))
    for _ in range(moments.randint(1, 3) if kind == "validating" else 1):
        saved = last.stat().st_mtime_ns
        while time.monotonic() < end:
            if kind == "saving" and any(name.endswith(".tmp") for name in os.listdir(last.parent)):
                break
            if (
                kind == "validating" and last.stat().st_mtime_ns != saved
            ):  # saved, then it validates
                break


def finish(folder: Path, process: subprocess.Popen) -> dict:
    if process.wait():
        raise SystemExit(f"the run ended with {process.returncode}; see {folder / 'log.txt'}")
    return read_checkpoint(last_checkpoint(newest_run(folder)))


def same(a, b) -> bool:
    """Bit for bit, through nested dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--runs", type=int, default=10, help="runs to kill, with one process and with two"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument(
        "--folder", type=Path, help="where to work; by default a temporary folder, kept"
    )
    args = parser.parse_args()
    moments = random.Random(args.seed)
    root = args.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    failures = 0
    print(
        f"working in {root}\nprocesses  run      killed  at step  checkpoints  half-written  same end",
        flush=True,
    )
    for world in (1, 2):
        alone = root / f"{world}-alone"
        alone.mkdir(parents=True)
        process = start(alone, world)
        wait_for_checkpoint(alone, process)
        begin = time.monotonic()
        expected = finish(alone, process)
        seconds = time.monotonic() - begin
        for run in range(1, args.runs + 1):
            folder = root / f"{world}-{run}"
            folder.mkdir()
            process = start(folder, world)
            wait_for_checkpoint(folder, process)
            kind = ("any", "saving", "validating")[run % 3]
            wait_for_moment(kind, folder, moments, seconds)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            half = len(list(folder.rglob("*.tmp")))
            left = [
                read_checkpoint(path) for path in folder.glob("lightning_logs/*/checkpoints/*.ckpt")
            ]
            step = read_checkpoint(last_checkpoint(newest_run(folder)))["global_step"]
            end = finish(folder, start(folder, world, "--ckpt_path=last"))
            equal = all(
                same(end[k], expected[k]) for k in ("global_step", "state_dict", "optimizer_states")
            )
            equal &= len(list(folder.glob("lightning_logs/version_*"))) == 1
            equal &= not list(folder.rglob("*.tmp"))
            failures += not equal
            print(
                f"{world:9} {run:4}  {kind:>10} {step:8} {len(left):12} {half:13}  "
                f"{'yes' if equal else 'NO'}",
                flush=True,
            )
    print(f"{2 * args.runs - failures} of {2 * args.runs} runs went on to the same end")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
