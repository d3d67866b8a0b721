"""How far a network is from what can be known of a text: frozen, with more context, and adapting.

    python tests/benchmarks/distance.py                                  # newest run's best checkpoint
    python tests/benchmarks/distance.py --ckpt_path path/to.ckpt --context 256

Figures for the validation split, in nats per character, each of them once:

    frozen    as `validate` gives it: consecutive sequences of block_size. This is *the* loss.
    sliding   frozen too, but each character sees at least context - piece characters before it.
    adapting  the same, and the network goes on learning: after each piece was scored, Adam takes a step
              on the newest `context` characters (dynamic evaluation: Krause et al. 2017,
              arXiv:1709.07432; 2019, arXiv:1904.08378). Whoever compresses a text may do that, and
              zpaq does.
    zpaq, 7z  where these programs are installed: the bytes that the validation part adds to the
              training part, as nats per character.

Sliding and adapting have a second figure: mixed with a neural cache (Grave et al. 2016,
arXiv:1612.04426), which remembers what followed features like these in what was scored before.

The settings were chosen on this very split, so the figures of adapting and cache flatter a little.
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

from chargpt.checkpoints import network_of, read_checkpoint, resolve_checkpoint
from chargpt.data import CharDataModule
from chargpt.data.blocks import EvaluationBlocks
from chargpt.model import GPT
from chargpt.vocabulary import Vocabulary

COMPRESSORS = {  # command to pack a file into an archive
    "zpaq": ["zpaq", "add", "{archive}", "{file}", "-m5"],
    "7z": ["7z", "a", "-m0=PPMd:o=6:mem=256m", "{archive}", "{file}"],
}


@torch.no_grad()
def frozen(gpt: GPT, tokens: Tensor) -> float:
    total, T = 0.0, gpt.config.block_size
    for batch in EvaluationBlocks(tokens.numpy(), T, batch_size=16):
        logits = gpt(batch[:, :-1])
        total += F.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
        ).item()
    return total / (len(tokens) - 1)


class NeuralCache:
    """Neural cache: what followed features like these, by their cosine.

    Args:
        n: characters that it can remember.
        channels: of the features.
        share: of its probabilities in the mixture with the network's.
        sharpness: the larger, the more alike features must be to count.
    """

    def __init__(self, n: int, channels: int, share: float, sharpness: float) -> None:
        self.share, self.sharpness = share, sharpness
        self.features = torch.empty(n, channels)
        self.followers = torch.empty(n, dtype=torch.long)
        self.n = 0  # remembered so far

    def mixed(self, losses: Tensor, features: Tensor, followers: Tensor) -> Tensor:
        """Losses (T,) of the characters that follow features (T, C), mixed; takes both in."""
        features = F.normalize(features, dim=-1)
        if self.n:
            alike = self.sharpness * features @ self.features[: self.n].T  # (T, n)
            same = self.followers[: self.n] == followers[:, None]
            # The share of the remembered weight that lies on the right character.
            cached = (alike.softmax(-1) * same).sum(-1)
            losses = -torch.log((1 - self.share) * (-losses).exp() + self.share * cached)
        new = slice(self.n, self.n + len(followers))
        self.features[new], self.followers[new] = features, followers
        self.n = new.stop
        return losses


def read(gpt: GPT, tokens: Tensor, options: argparse.Namespace, lr: float) -> tuple[float, float]:
    """Mean loss of a sliding window, alone and with a cache; with a learning rate it learns."""
    gpt = copy.deepcopy(gpt)
    adam = torch.optim.Adam(gpt.parameters(), lr=lr)
    cache = NeuralCache(len(tokens), gpt.config.n_embd, options.share, options.sharpness)
    alone = mixed = 0.0
    for start in range(1, len(tokens), options.piece):
        end = min(start + options.piece, len(tokens))
        ids, new = tokens[max(0, end - options.context - 1) : end], end - start
        with torch.set_grad_enabled(lr > 0):
            features = gpt.features(ids[None, :-1])[0]
            losses = F.cross_entropy(gpt.head(features).float(), ids[1:], reduction="none")
        scored = losses[-new:].detach()
        alone += scored.sum().item()
        mixed += cache.mixed(scored, features[-new:].detach(), ids[-new:]).sum().item()
        if lr > 0:
            adam.zero_grad()
            losses.mean().backward()
            adam.step()
    return alone / (len(tokens) - 1), mixed / (len(tokens) - 1)


def compressed(name: str, train: bytes, val: bytes, characters: int) -> float | None:
    """Nats per character of the validation part, read after the training part."""
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


def show(what: str, figure: float | tuple[float, float] | None, start: float) -> None:
    loss, mixed = figure if isinstance(figure, tuple) else (figure, None)
    said = "not installed" if loss is None else f"{loss:.4f} nats, {loss / math.log(2):.4f} bits"
    if mixed is not None:
        said += f"; with a cache {mixed:.4f} nats"
    print(f"{what:10} {said}  ({time.perf_counter() - start:.0f} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt_path", default="best")
    parser.add_argument("--piece", type=int, default=32, help="characters scored at a time")
    parser.add_argument("--context", type=int, help="of a window; block_size unless given")
    parser.add_argument("--lr", type=float, default=2e-5, help="of adapting")
    parser.add_argument("--share", type=float, default=0.2, help="of the cache")
    parser.add_argument("--sharpness", type=float, default=30.0, help="of the cache")
    parser.add_argument("--characters", type=int, help="only so many, for a quick look")
    names = ["frozen", "sliding", "adapting", *COMPRESSORS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    options = parser.parse_args()

    path = resolve_checkpoint(options.ckpt_path)
    checkpoint = read_checkpoint(path)
    gpt, vocabulary = network_of(checkpoint, path)
    gpt.eval()
    options.context = options.context or gpt.config.block_size
    if not 0 < options.piece <= options.context <= gpt.config.block_size:
        parser.error(f"--piece <= --context <= {gpt.config.block_size}, the network's block_size")
    saved = checkpoint["datamodule_hyper_parameters"]
    settings = ("corpus", "block_size", "val_fraction", "test_fraction")
    data = CharDataModule(**{name: saved[name] for name in settings})
    data.expected_digest = saved.get("corpus_digest")
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
