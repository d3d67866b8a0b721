"""How fast a large text is encoded, and how much memory that takes.

    python tests/benchmarks/encode.py [--gigabytes 2]

Makes a text in a temporary folder, encodes it in a child process on one core, and sets that
against `[stoi[c] for c in text]` in the same process. Needs three times the text's size on disk.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
MB = 1_000_000
SLICE = 10 * MB  # characters that the list comprehension encodes


def write_text(path: Path, n_bytes: int) -> None:
    """English-like lines; one character in about a thousand is not ASCII."""
    draw = random.Random(0)
    letters = "etaoinshrdlu" * 8 + "cmwfgypbvkjxqz" * 3 + "ETAOINSHRDLUCMWFGYPBVKJXQZ" + "éèöü—’“”"
    words = ["".join(draw.choices(letters, k=draw.randint(1, 10))) for _ in range(20_000)]
    lines = [" ".join(draw.choices(words, k=12)) + draw.choice(".,;:!?") for _ in range(20_000)]
    block = "\n".join(lines).encode() + b"\n"
    with open(path, "wb") as file:
        while file.tell() < n_bytes:
            file.write(block)


def encode(path: str, data_dir: str) -> None:
    """The child: prints its figures as JSON."""
    sys.path.insert(0, str(ROOT))
    from chargpt.corpus import open_corpus

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    start, start_cpu = time.perf_counter(), time.process_time()
    corpus = open_corpus(path, data_dir)
    seconds, seconds_cpu = time.perf_counter() - start, time.process_time() - start_cpu
    peak = peak_memory()

    text = corpus.vocabulary.decode(corpus.tokens[:SLICE])
    stoi = {character: id for id, character in enumerate(corpus.vocabulary.characters)}
    comprehension = []
    for _ in range(3):
        start = time.perf_counter()
        ids = [stoi[c] for c in text]
        comprehension.append((time.perf_counter() - start) / len(ids))
    print(
        json.dumps(
            {
                "characters": len(corpus.tokens),
                "vocabulary": len(corpus.vocabulary),
                "seconds": seconds,
                "seconds_cpu": seconds_cpu,
                "peak": peak,
                "comprehension": statistics.median(comprehension),
                "torch": "torch" in sys.modules,
            }
        )
    )


def peak_memory() -> int | None:
    """Bytes resident at most so far, where the system tells."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
