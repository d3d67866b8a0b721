"""How far a network is from what can be known of a text: frozen, with more context, and adapting.

    python tests/benchmarks/distance.py                                  # newest run's best checkpoint
    python tests/benchmarks/distance.py --ckpt_path path/to.ckpt --lr 2e-4 --piece 64

Four figures for the validation split, in nats per character, each of them once:

    frozen    as `validate` gives it: consecutive sequences of block_size. This is *the* loss.
    sliding   frozen too, but each character sees at least block_size - piece characters before it.
    adapting  the same, and the network goes on learning from each piece after it was scored (dynamic
              evaluation: Krause et al. 2017, arXiv:1709.07432; 2019, arXiv:1904.08378). Whoever
              compresses a text may do that, and zpaq does.
    zpaq, 7z  where these programs are installed: the bytes that the validation part adds to the
              training part, as nats per character.

The settings of adapting were chosen on this very split, so its figure flatters a little.
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


def cross_entropies(gpt: GPT, ids: Tensor, scored: int) -> Tensor:
    """-ln of the probability of each of the last `scored` characters of ids (T + 1,)."""
    logits = gpt(ids[None, :-1])[0, -scored:]
    return F.cross_entropy(logits.float(), ids[-scored:], reduction="none")


@torch.no_grad()
def frozen(gpt: GPT, tokens: Tensor) -> float:
    total, T = 0.0, gpt.config.block_size
    for batch in EvaluationBlocks(tokens.numpy(), T, batch_size=16):
        logits = gpt(batch[:, :-1])
        total += F.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
        ).item()
    return total / (len(tokens) - 1)


def windows(tokens: Tensor, block_size: int, piece: int):
    """Each `piece` characters once, behind as many as the block still holds."""
    for start in range(1, len(tokens), piece):
        end = min(start + piece, len(tokens))
        yield tokens[max(0, end - block_size - 1) : end], end - start


@torch.no_grad()
def sliding(gpt: GPT, tokens: Tensor, piece: int) -> float:
    pieces = windows(tokens, gpt.config.block_size, piece)
    return sum(cross_entropies(gpt, *p).sum().item() for p in pieces) / (len(tokens) - 1)


def adapting(gpt: GPT, tokens: Tensor, piece: int, lr: float, decay: float) -> float:
    """Score a piece, then take a step of Adam on it; `decay` draws back to the first weights."""
    gpt = copy.deepcopy(gpt)
    parameters = [p for p in gpt.parameters() if p.requires_grad]
    first = [p.detach().clone() for p in parameters]
    adam = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8)
    total = 0.0
    for ids, scored in windows(tokens, gpt.config.block_size, piece):
        losses = cross_entropies(gpt, ids, scored)
        total += losses.sum().item()
        adam.zero_grad()
        losses.mean().backward()
        adam.step()
        if decay:
            with torch.no_grad():
                torch._foreach_lerp_(parameters, first, decay)
    return total / (len(tokens) - 1)


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


def show(what: str, loss: float | None, start: float) -> None:
    figure = "not installed" if loss is None else f"{loss:.4f} nats, {loss / math.log(2):.4f} bits"
    print(f"{what:10} {figure}  ({time.perf_counter() - start:.0f} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt_path", default="best")
    parser.add_argument("--piece", type=int, default=64, help="characters scored at a time")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--decay", type=float, default=0.0)
    parser.add_argument("--characters", type=int, help="only so many, for a quick look")
    names = ["frozen", "sliding", "adapting", *COMPRESSORS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    options = parser.parse_args()

    path = resolve_checkpoint(options.ckpt_path)
    checkpoint = read_checkpoint(path)
    gpt, vocabulary = network_of(checkpoint, path)
    gpt.eval()
    if not 0 < options.piece <= gpt.config.block_size:
        parser.error(f"--piece must be 1 to {gpt.config.block_size}, the network's block_size")
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
        "sliding": lambda: sliding(gpt, tokens, options.piece),
        "adapting": lambda: adapting(gpt, tokens, options.piece, options.lr, options.decay),
        "zpaq": lambda: compressed("zpaq", train, val, len(tokens) - 1),
        "7z": lambda: compressed("7z", train, val, len(tokens) - 1),
    }
    for name in options.only:
        start = time.perf_counter()
        show(name, figures[name](), start)


if __name__ == "__main__":
    main()
