"""A network's loss with fixed weights, with more context, and adapting, compared with compressors.

    python tests/benchmarks/distance.py                                  # newest run's best checkpoint
    python tests/benchmarks/distance.py --ckpt_path path/to.ckpt --context 256

Losses of the validation split in nats per character, each character predicted once:

    frozen    fixed weights, consecutive sequences of block_size, as in `validate`. This is the loss
              that is reported everywhere else.
    sliding   fixed weights, but each character has at least context - piece characters of context.
    adapting  as sliding, but after each scored piece Adam takes a step on the newest `context`
              characters (dynamic evaluation: Krause et al. 2017, arXiv:1709.07432; 2019,
              arXiv:1904.08378). Compressors such as zpaq adapt too.
    zpaq, 7z  if installed: the bytes that the validation split adds to the compressed training split.

Sliding and adapting have a second figure, mixed with a neural cache (Grave et al. 2016,
arXiv:1612.04426), which predicts the characters that followed similar hidden states earlier.

The settings were chosen on the same split, so the figures for adapting and cache are slightly
optimistic.
"""

import argparse
import copy
import math
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from chargpt.checkpoints import build_network, read_checkpoint, resolve_checkpoint
from chargpt.data import CharDataModule
from chargpt.data.datasets import EvaluationSequences
from chargpt.model import GPT
from chargpt.vocabulary import Vocabulary

COMPRESSORS = {  # commands that compress a file to an archive
    "zpaq": ["zpaq", "add", "{archive}", "{file}", "-m5"],
    "7z": ["7z", "a", "-m0=PPMd:o=6:mem=256m", "{archive}", "{file}"],
}


@torch.no_grad()
def frozen(gpt: GPT, tokens: Tensor) -> float:
    total, T = 0.0, gpt.config.block_size
    for batch in EvaluationSequences(tokens.numpy(), T, batch_size=16):
        logits = gpt(batch[:, :-1])
        total += F.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
        ).item()
    return total / (len(tokens) - 1)


class NeuralCache:
    """Predicts the characters that followed hidden states with a similar direction.

    Args:
        n: maximum number of characters to store.
        channels: size of the hidden states.
        weight: of the cache's probabilities in the mixture with the network's.
        sharpness: inverse temperature of the softmax over cosine similarities.
    """

    def __init__(self, n: int, channels: int, weight: float, sharpness: float) -> None:
        self.weight, self.sharpness = weight, sharpness
        self.hidden = torch.empty(n, channels)
        self.targets = torch.empty(n, dtype=torch.long)
        self.n = 0  # number of stored characters

    def mix(self, losses: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
        """Losses (T,) of `targets` (T,) after hidden states (T, C), mixed; then store both."""
        hidden = F.normalize(hidden, dim=-1)
        if self.n:
            scores = self.sharpness * hidden @ self.hidden[: self.n].T  # (T, n)
            matches = self.targets[: self.n] == targets[:, None]
            cached = (scores.softmax(-1) * matches).sum(-1)  # probability of each target
            losses = -torch.log((1 - self.weight) * (-losses).exp() + self.weight * cached)
        new = slice(self.n, self.n + len(targets))
        self.hidden[new], self.targets[new] = hidden, targets
        self.n = new.stop
        return losses


def read(gpt: GPT, tokens: Tensor, options: argparse.Namespace, lr: float) -> tuple[float, float]:
    """Mean loss with a sliding window, without and with a cache; adapts if lr is positive."""
    gpt = copy.deepcopy(gpt)
    adam = torch.optim.Adam(gpt.parameters(), lr=lr)
    cache = NeuralCache(len(tokens), gpt.config.n_embd, options.share, options.sharpness)
    alone = mixed = 0.0
    for start in range(1, len(tokens), options.piece):
        end = min(start + options.piece, len(tokens))
        ids, new = tokens[max(0, end - options.context - 1) : end], end - start
        with torch.set_grad_enabled(lr > 0):
            hidden = gpt.hidden_states(ids[None, :-1])[0]
            losses = F.cross_entropy(gpt.head(hidden).float(), ids[1:], reduction="none")
        scored = losses[-new:].detach()
        alone += scored.sum().item()
        mixed += cache.mix(scored, hidden[-new:].detach(), ids[-new:]).sum().item()
        if lr > 0:
            adam.zero_grad()
            losses.mean().backward()
            adam.step()
    return alone / (len(tokens) - 1), mixed / (len(tokens) - 1)


def compressed(name: str, train: bytes, val: bytes, characters: int) -> float | None:
    """Nats per character of the validation split, compressed after the training split."""
    if shutil.which(COMPRESSORS[name][0]) is None:
        return None
    sizes = []
    with tempfile.TemporaryDirectory() as folder:
        for part in (train, train + val):
            file, archive = Path(folder, "text"), Path(folder, f"{len(sizes)}.{name}")
            file.write_bytes(part)
            command = [a.format(file=file, archive=archive) for a in COMPRESSORS[name]]
            subprocess.run(command, check=True, capture_output=True)
            sizes.append(archive.stat().st_size)
    return (sizes[1] - sizes[0]) * 8 * math.log(2) / characters


def show(name: str, figure: float | tuple[float, float] | None, start: float) -> None:
    loss, mixed = figure if isinstance(figure, tuple) else (figure, None)
    text = "not installed" if loss is None else f"{loss:.4f} nats, {loss / math.log(2):.4f} bits"
    if mixed is not None:
        text += f"; with a cache {mixed:.4f} nats"
    print(f"{name:10} {text}  ({time.perf_counter() - start:.0f} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt_path", default="best")
    parser.add_argument("--piece", type=int, default=32, help="characters scored at a time")
    parser.add_argument("--context", type=int, help="length of the window (default: block_size)")
    parser.add_argument("--lr", type=float, default=2e-5, help="learning rate for adapting")
    parser.add_argument("--share", type=float, default=0.2, help="weight of the cache")
    parser.add_argument("--sharpness", type=float, default=30.0, help="of the cache's softmax")
    parser.add_argument("--characters", type=int, help="score only this many, for a quick test")
    names = ["frozen", "sliding", "adapting", *COMPRESSORS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    options = parser.parse_args()

    path = resolve_checkpoint(options.ckpt_path)
    checkpoint = read_checkpoint(path)
    gpt, vocabulary = build_network(checkpoint, path)
    gpt.eval()
    options.context = options.context or gpt.config.block_size
    if not 0 < options.piece <= options.context <= gpt.config.block_size:
        parser.error(f"need --piece <= --context <= {gpt.config.block_size} (block_size)")
    saved = checkpoint["datamodule_hyper_parameters"]
    settings = ("corpus", "block_size", "val_fraction", "test_fraction")
    data = CharDataModule(**{name: saved[name] for name in settings})
    data.trained = saved
    data.setup()
    tokens = torch.from_numpy(data.val_tokens[: options.characters].astype(int))
    print(f"{path}\nblock_size {gpt.config.block_size}, {len(tokens) - 1:,} characters scored")

    def text(ids, vocabulary: Vocabulary = vocabulary) -> bytes:
        return vocabulary.decode(ids.tolist()).encode()

    train, val = text(data.train_tokens), text(tokens)
    figures = {
        "frozen": lambda: frozen(gpt, tokens),
        "sliding": lambda: read(gpt, tokens, options, lr=0.0),
        "adapting": lambda: read(gpt, tokens, options, options.lr),
        "zpaq": lambda: compressed("zpaq", train, val, len(tokens) - 1),
        "7z": lambda: compressed("7z", train, val, len(tokens) - 1),
    }
    for name in options.only:
        start = time.perf_counter()
        show(name, figures[name](), start)


if __name__ == "__main__":
    main()
