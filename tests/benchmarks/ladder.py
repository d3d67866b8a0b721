"""Ablation, from letter counts to a full GPT: each model adds one idea.

    python tests/benchmarks/ladder.py path/to/input.txt --csv ladder.csv --plot ladder.png
    python tests/benchmarks/ladder.py path/to/input.txt --steps 500 --only "without attention"
    python tests/benchmarks/ladder.py path/to/input.txt --lr 1e-2 --only "+ 3 layers" "without norms"

It starts with tables of counts. Each model after that is the small network of chargpt/textbook.py
without the parts that are added later; all train for the same number of steps on the same batches.
Then single parts are removed from the full network. The last row is the engine with
configs/cpu.yaml, which reads more characters in fewer steps. Losses are in nats, over the whole
validation split: every character but the first is predicted once, in consecutive sequences.
"""

import argparse
import contextlib
import csv
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chargpt import textbook
from chargpt.textbook import BigramLangModel, Block, Head

CPU = Path(__file__).resolve().parents[2] / "configs" / "cpu.yaml"
WIDTH = textbook.SMALL["n_embed"]


class Zero(nn.Module):
    """Replaces a layer in a sum and adds 0."""

    def forward(self, x: Tensor) -> float:
        return 0.0


class BlockWithoutResiduals(Block):
    """A block whose layers replace their input instead of adding to it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(self.attention_norm(x))
        return self.feed_forward(self.feed_forward_norm(x))


class Rung(NamedTuple):
    """A network with a subset of the textbook's parts, trained on a fraction of the text."""

    name: str
    positions: bool = True
    attention: str = "several"  # heads: "several", "one" or "none"
    feed_forward: bool = True
    residuals: bool = True
    norms: bool = True
    layers: int = textbook.SMALL["n_layer"]
    dropout: float = 0.0
    fraction: float = 1.0  # of the training split

    def build(self, V: int) -> BigramLangModel:
        changes = dict(n_layer=self.layers, dropout=self.dropout)
        model = BigramLangModel(V, **textbook.SMALL | changes)
        if not self.positions:
            model.position_embedding = Zero()
        if not self.norms:
            model.norm = nn.Identity()
        for block in model.blocks:
            self.remove_parts(block)
        return model

    def remove_parts(self, block: Block) -> None:
        nothing = Zero() if self.residuals else nn.Identity()
        if self.attention == "one":
            block.attention = Head(WIDTH, WIDTH, self.dropout)  # as wide as all heads together
        if self.attention == "none":
            block.attention = nothing
        if not self.feed_forward:
            block.feed_forward = nothing
        if not self.norms:
            block.attention_norm = block.feed_forward_norm = nn.Identity()
        if not self.residuals:
            block.__class__ = BlockWithoutResiduals


FIRST = dict(feed_forward=False, residuals=False, norms=False, layers=1)
RUNGS = [
    Rung("bigram", **FIRST | dict(positions=False, layers=0)),
    Rung("+ positions", **FIRST | dict(layers=0)),
    Rung("+ one head of attention", **FIRST | dict(attention="one")),
    Rung("+ several heads", **FIRST),
    Rung("+ feed-forward", **FIRST | dict(feed_forward=True)),
    Rung("+ residuals", norms=False, layers=1),
    Rung("+ norms", layers=1),
    Rung("+ 3 layers: the textbook"),
    Rung("textbook without attention", attention="none"),
    Rung("textbook without feed-forward", feed_forward=False),
    Rung("textbook without residuals", residuals=False),
    Rung("textbook without norms", norms=False),
    Rung("textbook without positions", positions=False),
    Rung("textbook, dropout 0.1", dropout=0.1),
    Rung("textbook, 5 % of the text", fraction=0.05),
    Rung("textbook, 5 % of the text, dropout 0.2", fraction=0.05, dropout=0.2),
]


class Text(NamedTuple):
    """A text as the textbook prepares it."""

    itos: dict[int, str]
    train: Tensor  # ids
    val: Tensor

    @classmethod
    def of(cls, text: str) -> "Text":
        _, itos, data = textbook.prepare(text)
        return cls(itos, **data)


class Result(NamedTuple):
    rung: str
    parameters: int
    loss: float
    seconds: float
    writes: str


@torch.no_grad()
def whole_split_loss(model: BigramLangModel, split: Tensor) -> float:
    """Mean loss over all characters of a split but the first, each predicted exactly once."""
    model.eval()
    T = model.block_size
    whole = (len(split) - 1) // T * T
    blocks = [
        *zip(split[:whole].view(-1, T).split(128), split[1 : whole + 1].view(-1, T).split(128))
    ]
    if whole < len(split) - 1:  # the last sequence is shorter
        blocks.append((split[None, whole:-1], split[None, whole + 1 :]))
    total = sum(model(x, y)[1].item() * y.numel() for x, y in blocks)
    return total / (len(split) - 1)


def a_line(text: str) -> str:
    """The first complete line that is long enough to be representative."""
    lines = [line.strip() for line in text.split("\n")[1:-1] if len(line.strip()) > 20]
    return (lines or [text.replace("\n", " ").strip()])[0][:60]


def counting(name: str, text: Text, order: int, seed: int) -> Result:
    """Counts of how often each character followed the `order` - 1 before it, plus 0.1."""
    start, V = time.perf_counter(), len(text.itos)

    def entries(ids: Tensor) -> Tensor:
        """The index in the table of each character with the ones before it, (N,)."""
        padded = F.pad(ids, (order - 1, 0))
        return sum(padded[i : i + len(ids)] * V ** (order - 1 - i) for i in range(order))

    table = torch.bincount(entries(text.train), minlength=V**order).view(-1, V) + 0.1
    probabilities = table / table.sum(dim=-1, keepdim=True)  # (V^(order - 1), V)
    loss = -probabilities.flatten()[entries(text.val)][1:].log().mean().item()
    torch.manual_seed(seed)
    ids = [0] * order
    for _ in range(200):
        row = sum(i * V**power for power, i in enumerate(ids[:-order:-1]))
        ids.append(int(torch.multinomial(probabilities[row], num_samples=1)))
    seconds = time.perf_counter() - start
    return Result(name, table.numel(), loss, seconds, a_line(textbook.decode(ids, text.itos)))


def train(
    rung: Rung, text: Text, steps: int, lr: float, seed: int
) -> tuple[Result, BigramLangModel]:
    data = {"train": text.train[: int(rung.fraction * len(text.train))], "val": text.val}
    torch.manual_seed(seed)
    model = rung.build(len(text.itos))
    torch.manual_seed(seed)  # the same batches for all, however many weights were initialized
    start = time.perf_counter()
    changes = dict(epochs=steps, lr=lr, eval_interval=steps + 1, eval_characters=1)
    with contextlib.redirect_stdout(sys.stderr):
        textbook.train(model, data, **textbook.SMALL_TRAINING | changes)
    seconds = time.perf_counter() - start
    return measure(rung.name, model, text, seconds, seed), model


def measure(name: str, model: BigramLangModel, text: Text, seconds: float, seed: int) -> Result:
    loss = whole_split_loss(model, text.val)
    torch.manual_seed(seed)
    sample = model.generate(torch.zeros(1, 1, dtype=torch.long), 200)[0].tolist()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Result(name, parameters, loss, seconds, a_line(textbook.decode(sample, text.itos)))


def engine(path: Path, seed: int) -> Result:
    """configs/cpu.yaml as a user would run it; the time includes start-up and validation."""
    path = path.resolve()
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, sys.path)))

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "chargpt", *arguments]
        return subprocess.run(
            command,
            cwd=folder,
            env=environment,
            check=True,
            stdout=-1,
            stderr=sys.stderr,
            text=True,
        ).stdout

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run("fit", f"--config={CPU}", f"--data.corpus={path}", f"--seed_everything={seed}")
        seconds = time.perf_counter() - start
        loss = float(re.search(r"val_loss\D+(\d+\.\d+)", run("validate")).group(1))
        text = run(
            "predict", "--generate.prompt=\n", "--generate.temperature=1", f"--generate.seed={seed}"
        )
        (checkpoint,) = Path(folder).glob("lightning_logs/*/checkpoints/last.ckpt")
        weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    return Result(
        "the engine, configs/cpu.yaml",
        sum(w.numel() for name, w in weights.items() if name.startswith("gpt.")),
        loss,
        seconds,
        a_line(text),
    )


def results(options: argparse.Namespace) -> Iterator[Result]:
    text = Text.of(textbook.read_text(options.text))
    for order, unit in enumerate(("single characters", "pairs", "triples", "fours"), start=1):
        if selected(name := f"counts of {unit}", options.only):
            yield counting(name, text, order, options.seed)
    for rung in RUNGS:
        if not selected(rung.name, options.only):
            continue
        result, model = train(rung, text, options.steps, options.lr, options.seed)
        yield result
        if rung.name.endswith("the textbook"):
            for block in model.blocks:
                block.attention = Zero()
            yield measure("... attention removed after training", model, text, 0.0, options.seed)
    if selected("the engine", options.only):
        yield engine(options.text, options.seed)


def selected(name: str, only: list[str]) -> bool:
    return not only or any(part in name for part in only)


def plot(rows: list[Result], picture: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        sys.exit(f"cannot draw {picture}: matplotlib is not installed (pip install matplotlib)")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.34 * len(rows) + 0.8))
    losses = [row.loss for row in rows]
    ladder = ("bigram", "+", "the engine")  # the models that add an idea
    colors = ["C0" if row.rung.startswith(ladder) else "C7" for row in rows]
    axes.barh([row.rung for row in rows], losses, color=colors)
    for y, loss in enumerate(losses):
        axes.text(loss + 0.01, y, f"{loss:.3f}", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set(xlabel="validation loss, nats per character", xlim=(0, max(losses) + 0.4))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=textbook.SMALL_TRAINING["epochs"])
    parser.add_argument("--lr", type=float, default=textbook.SMALL_TRAINING["lr"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--only", nargs="+", default=[], help="models whose names contain one of these"
    )
    parser.add_argument("--csv", type=Path, help="CSV file for the table")
    parser.add_argument("--plot", type=Path, help="image file for the chart; needs matplotlib")
    options = parser.parse_args()
    rows = []
    print("| model | parameters | validation loss | seconds | a line it generates |")
    print("|---|---|---|---|---|")
    for row in results(options):
        rows.append(row)
        line = row.writes.replace("|", "\\|").replace("`", "'")
        print(
            f"| {row.rung} | {row.parameters:,} | {row.loss:.3f} | {row.seconds:.0f} | `{line}` |",
            flush=True,
        )
    if options.csv:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([Result._fields, *rows])
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
