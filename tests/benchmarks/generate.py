"""Generation speed at the base size: against recomputing, against a lower bound, from a cold start.

    python tests/benchmarks/generate.py                  # a minute or two
    python tests/benchmarks/generate.py --chars 300 --every 60 --no-cold-start

Recomputing processes the whole window for each character, as the textbook's generate does. It is
timed at every N-th of the same characters, between those generated with the cache, so that both run
under the same load. The lower bound is the time to read the blocks' weights: matrix-vector products
with each of them, layer by layer, as one character requires. It is measured twice: with one network,
whose weights fit in the CPU's cache if that is large enough, and alternating between several networks,
whose weights together exceed the cache and are read from main memory.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F

import chargpt
from chargpt.generation import GenerationConfig, generate
from chargpt.model import GPT, GPTConfig

CHARACTERS = "".join(map(chr, range(32, 97)))  # as many as tiny Shakespeare has
REPOSITORY = Path(__file__).parents[2]
PROMPT = "THE BASE SIZE WRITES. " * 10

COLD_START = """
import time
start = time.perf_counter()
def lap(what):
    global start
    print(f"  {what:32s} {time.perf_counter() - start:6.3f} s")
    start = time.perf_counter()
import torch; lap("import torch")
import chargpt.cli.predict; lap("import what predict needs")
generator = chargpt.load(PATH); lap("load the checkpoint")
from chargpt import generation
stream = generator.stream(PROMPT)
prefill = generation.prefill
def timed(*arguments):
    global start
    start = time.perf_counter()
    prefill(*arguments); lap(f"prefill {len(PROMPT)} characters")
    generation.prefill = prefill
generation.prefill = timed
next(stream); lap("first character")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chars", type=int, default=1000, help="characters to generate")
    parser.add_argument("--every", type=int, default=50, help="recompute every N-th of them")
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 16], help="texts in a batch")
    parser.add_argument(
        "--networks",
        type=int,
        default=8,
        help="to alternate between, together larger than the cache",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cold-start", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(), len(CHARACTERS)).eval()
    parameters = sum(parameter.numel() for parameter in gpt.parameters())
    print(f"{parameters:,} parameters, {args.threads} threads, {args.chars:,} characters")
    for samples in args.samples:
        against_recomputing(gpt, samples, args.chars, args.every)
    against_lower_bound([gpt], args.chars)
    against_lower_bound([deepcopy(gpt) for _ in range(args.networks)], args.chars)
    if args.cold_start:
        cold_start(gpt)


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def write(gpt: GPT, samples: int, chars: int):
    return generate(gpt, [[0]] * samples, GenerationConfig(max_new_chars=chars), range(samples))


@torch.inference_mode()
def against_recomputing(gpt: GPT, samples: int, chars: int, every: int) -> None:
    cached, recomputed = [], []
    steps = write(gpt, samples, chars)
    for n in range(1, chars + 1):
        cached.append(seconds(lambda: next(steps)))
        if n % every == 0:
            window = torch.randint(len(CHARACTERS), (samples, min(n, gpt.config.block_size)))
            recomputed.append(seconds(lambda: recompute(gpt, window)))
    fast, slow = (samples / statistics.mean(times) for times in (cached, recomputed))
    print(
        f"{samples:3d} samples: {fast:7.0f} characters per second with the cache, {slow:5.1f} recomputing: "
        f"{fast / slow:.1f} times"
    )


def recompute(gpt: GPT, window: torch.Tensor) -> torch.Tensor:
    """One character, sampled as in the textbook's generate."""
    return torch.multinomial(gpt(window)[:, -1].softmax(-1), num_samples=1)


@torch.inference_mode()
def against_lower_bound(gpts: list[GPT], chars: int) -> None:
    weights = [
        [
            layer.weight
            for block in gpt.blocks
            for layer in (
                block.attention.qkv,
                block.attention.projection,
                block.feed_forward.expansion,
                block.feed_forward.projection,
            )
        ]
        for gpt in gpts
    ]
    rows = {weight.size(1): torch.randn(1, weight.size(1)) for weight in weights[0]}
    megabytes = sum(weight.numel() * weight.element_size() for weight in weights[0]) / 1e6
    # At least ten characters, then as many passes of products, so that neither evicts the other's cache.
    passes = -(-10 // len(gpts))
    texts = [write(gpt, 1, chars + passes) for gpt in gpts]
    for text in texts:
        next(text)  # the first also prefills
    generated, products = [], []
    for _ in range(max(chars // passes, 1)):
        generated += [seconds(lambda: next(text)) for text in texts * passes]
        products += [
            seconds(lambda: [F.linear(rows[w.size(1)], w) for w in ws]) for ws in weights * passes
        ]
    print(
        f"against the lower bound, {len(gpts)} alternating, {len(gpts) * megabytes:.0f} MB of weights:"
    )
    for name, figure in (("median", statistics.median), ("best", min)):
        character, bound = figure(generated), figure(products)
        print(
            f"{name:>8}: {1000 * character:.2f} ms a character; reading {megabytes:.0f} MB at "
            f"{megabytes / bound / 1000:.1f} GB/s takes {1000 * bound:.2f} ms: {character / bound:.2f} times"
        )


def cold_start(gpt: GPT) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "base.ckpt"))
        chargpt.save(gpt, chargpt.Vocabulary(CHARACTERS), path)
        print("from a cold start, each part separately:", flush=True)
        program = f"PATH, PROMPT = {path!r}, {PROMPT!r}\n{COLD_START}"
        subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY)

        command = [sys.executable, "-m", "chargpt", "predict"]
        command += ["--ckpt_path", path, "--generate.prompt", PROMPT]
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY
        )
        process.stdout.read(len(PROMPT) + 1)
        print(f"  python -m chargpt predict, in all {time.perf_counter() - start:6.3f} s")
        process.stdout.close()
        process.communicate()


if __name__ == "__main__":
    main()
