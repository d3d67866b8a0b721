"""Time and memory to encode a large text, and the cost of its size for later steps.

    python tests/benchmarks/encode.py [--gigabytes 2]

Writes the texts to a temporary folder and measures in a child process on one core. The child also
encodes a slice with `[stoi[c] for c in text]`, so that both are timed under the same conditions.
Needs three times the text's size on disk.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml

MB = 1_000_000
SLICE = 10 * MB  # number of characters for the list comprehension
LETTERS = "etaoinshrdlu" * 40 + "cmwfgypbvkjxqz" * 10 + "ETAOINSHRDLUCMWFGYPBVKJXQZ"
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "cpu.yaml"
STEPS = 110  # training steps on each text; the first ten are not counted
BATCH, BLOCK = 64, 257  # shape of a batch of the base configuration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the large text")
    parser.add_argument("--measure", metavar="FOLDER", help=argparse.SUPPRESS)  # the child's
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(Path(arguments.measure))
    with tempfile.TemporaryDirectory() as folder:
        size = int(arguments.gigabytes * 1000 * MB)
        write_text(Path(folder, "large.txt"), size, letters=LETTERS)
        write_text(Path(folder, "accented.txt"), size // 4, letters=LETTERS + "é")
        write_text(Path(folder, "small.txt"), MB, letters=LETTERS)
        subprocess.run([sys.executable, __file__, "--measure", folder], check=True)


def write_text(path: Path, n_bytes: int, letters: str) -> None:
    """Write 20,000 lines of random words, repeated to fill the file."""
    draw = random.Random(0)
    words = ["".join(draw.choices(letters, k=draw.randint(1, 10))) for _ in range(20_000)]
    lines = [" ".join(draw.choices(words, k=12)) + draw.choice(".,;:!?") for _ in range(20_000)]
    block = "\n".join([*lines, ""]).encode()
    with open(path, "wb") as file:
        for _ in range(n_bytes // len(block)):
            file.write(block)
        file.write(block[: n_bytes % len(block)].decode(errors="ignore").encode())


def measure(folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from chargpt.data.texts import resolve_corpus
    from chargpt.data.token_file import open_corpus

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    imports = peak_memory()
    for name in ("large", "accented"):
        path = folder / f"{name}.txt"
        size = path.stat().st_size / MB
        start, start_cpu = time.perf_counter(), time.process_time()
        corpus = open_corpus(resolve_corpus(str(path), folder))
        seconds, seconds_cpu = time.perf_counter() - start, time.process_time() - start_cpu
        peak = peak_memory()  # since the start, so meaningful only for the first text
        text = corpus.vocabulary.decode(corpus.tokens[:SLICE])
        print(f"{name}: {size:,.0f} MB, {len(corpus.vocabulary)} distinct characters")
        print(f"  encoded in {seconds:.1f} s: {size / seconds:.0f} MB/s")
        print(f"  CPU time {seconds_cpu:.1f} s: {size / seconds_cpu:.0f} MB/s")
        if name == "large":
            print(f"  peak memory {peak / MB:.0f} MB, {imports / MB:.0f} MB of it for imports")
        compare(text, corpus.vocabulary.characters, seconds_cpu / len(corpus.tokens))

    for name in ("large", "small"):
        path = str(folder / f"{name}.txt")
        tokens = open_corpus(resolve_corpus(path, folder)).tokens
        opening = median_seconds(lambda: open_corpus(resolve_corpus(path, folder)), 20)
        draw = random.Random(0)
        starts = lambda: (draw.randrange(len(tokens) - BLOCK) for _ in range(BATCH))
        reading = median_seconds(lambda: [tokens[i : i + BLOCK].copy() for i in starts()], 500)
        print(f"{name}: reopened in {opening * 1e3:.2f} ms, ", end="")
        print(f"a batch of {BATCH} x {BLOCK} read in {reading * 1e3:.3f} ms")
    train(folder)


def train(folder: Path) -> None:
    """Alternate training steps of configs/cpu.yaml's network on the large and the small text."""
    from overhead import PlainLoop

    from chargpt.data import CharDataModule
    from chargpt.training import GPTModule, make_trainer

    settings = yaml.safe_load(CONFIG.read_text())
    loops, times = {}, {"large": [], "small": []}
    for name in times:
        paths = dict(corpus=str(folder / f"{name}.txt"), data_dir=str(folder))
        data = CharDataModule(**settings["data"] | paths)
        data.setup("fit")
        module = GPTModule(block_size=data.hparams.block_size, **settings["model"])
        module.trainer = make_trainer(fast_dev_run=True, accelerator="cpu")  # has its settings
        module.build(data.vocabulary)
        loops[name] = PlainLoop(module, data)
    for n in range(STEPS):
        for name in sorted(times, reverse=n % 2 == 1):
            start = time.perf_counter()
            loops[name].step()
            times[name].append(time.perf_counter() - start)
    large, small = (statistics.median(seconds[10:]) for seconds in times.values())
    print(
        f"a training step: {large * 1e3:.1f} ms on the large text, {small * 1e3:.1f} ms on the small one: ",
        end="",
    )
    print(f"{small / large:.3f} of its steps per second")


def compare(text: str, characters: str, chargpt_s: float) -> None:
    """Compare `chargpt_s`, in CPU seconds per character, with other ways to encode a text.

    These are a list comprehension by itself, and everything that nanoGPT's prepare.py does with a
    text in memory. CPU time, because wall time depends on the load of a shared machine.
    """
    stoi = {character: id for id, character in enumerate(characters)}
    clock = time.process_time
    alone = median_seconds(lambda: [stoi[c] for c in text], 3, clock) / len(text)

    def prepare() -> None:
        sorted(set(text))
        np.array([stoi[c] for c in text], dtype=np.uint16)

    whole = median_seconds(prepare, 3, clock) / len(text)
    print(f"  per character {chargpt_s * 1e9:.1f} ns")
    print(f"  list comprehension {alone * 1e9:.1f} ns, {alone / chargpt_s:.1f} times as long")
    print(
        f"  with set() and np.array() {whole * 1e9:.1f} ns, {whole / chargpt_s:.1f} times as long"
    )


def median_seconds(
    function: Callable[[], object], times: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    seconds = []
    for _ in range(times):
        start = clock()
        function()
        seconds.append(clock() - start)
    return statistics.median(seconds)


def peak_memory() -> int:
    """Peak resident memory in bytes, or 0 where it is unavailable."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
