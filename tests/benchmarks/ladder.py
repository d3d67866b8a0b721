"""What each idea of a GPT is worth: a ladder of models, one idea more on each rung.

    python tests/benchmarks/ladder.py path/to/input.txt --csv ladder.csv --plot ladder.png
    python tests/benchmarks/ladder.py path/to/input.txt --steps 500 --only "without attention"

It begins with tables of counts, without any network. Each rung after that is the network of
chargpt/textbook.py, at its small size, with the parts taken out that come later; all train for the
same number of steps on the same batches. Then single parts are taken out of the whole. The last is
the engine with configs/cpu.yaml, which reads more characters in fewer steps. Losses are in nats, of
the whole validation split: every character but the first is predicted once, in contiguous blocks.
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


class Nothing(nn.Module):
    """Takes a part's place in a sum and adds 0."""

    def forward(self, x: Tensor) -> float:
        return 0.0


class BlockWithoutResiduals(Block):
    """Each layer replaces what was there."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(self.attention_norm(x))
        return self.feed_forward(self.feed_forward_norm(x))


class Rung(NamedTuple):
    """A network with some of the parts of the textbook's, and how much of the text it reads."""

    name: str
    positions: bool = True
    attention: str = "several"  # heads; or "one", or "none"
    feed_forward: bool = True
    residuals: bool = True
    norms: bool = True
    layers: int = textbook.SMALL["n_layer"]
    dropout: float = 0.0
    share: float = 1.0  # of the training split

    def build(self) -> BigramLangModel:
        sizes = {name: textbook.SMALL[name] for name in ("block_size", "n_embed", "n_head")}
        model = BigramLangModel(
            len(textbook.stoi), **sizes, n_layer=self.layers, dropout=self.dropout
        )
        if not self.positions:
            model.position_embedding = Nothing()
        if not self.norms:
            model.norm = nn.Identity()
        for block in model.blocks:
            self.take_parts_from(block)
        return model

    def take_parts_from(self, block: Block) -> None:
        none = Nothing() if self.residuals else nn.Identity()
        if self.attention == "one":
            block.attention = Head(WIDTH, WIDTH, self.dropout)  # as wide as several together
        if self.attention == "none":
            block.attention = none
        if not self.feed_forward:
            block.feed_forward = none
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
    Rung("textbook, a twentieth of the text", share=0.05),
    Rung("textbook, a twentieth, dropout 0.2", share=0.05, dropout=0.2),
]


class Result(NamedTuple):
    rung: str
    parameters: int
    loss: float
    seconds: float
    writes: str


@torch.no_grad()
def whole_split_loss(model: BigramLangModel, split: Tensor) -> float:
    """Mean over all characters of a split but its first, each predicted exactly once."""
    model.eval()
    T = model.block_size
    whole = (len(split) - 1) // T * T
    blocks = [
        *zip(split[:whole].view(-1, T).split(128), split[1 : whole + 1].view(-1, T).split(128))
    ]
    if whole < len(split) - 1:  # the rest is a shorter block
        blocks.append((split[None, whole:-1], split[None, whole + 1 :]))
    total = sum(model(x, y)[1].item() * y.numel() for x, y in blocks)
    return total / (len(split) - 1)


def a_line(text: str) -> str:
    """The first whole line that is long enough to show something."""
    lines = [line.strip() for line in text.split("\n")[1:-1] if len(line.strip()) > 20]
    return (lines or [text.replace("\n", " ").strip()])[0][:60]


def counting(name: str, order: int, seed: int) -> Result:
    """No network: how often each character followed the order - 1 before it, and a tenth more."""
    start, V = time.perf_counter(), len(textbook.stoi)
    train, val = (textbook.data[split].cpu() for split in ("train", "val"))

    def entries(ids: Tensor) -> Tensor:
        """Where each character stands in the table, by itself and those before it, (N,)."""
        padded = F.pad(ids, (order - 1, 0))
        return sum(padded[i : i + len(ids)] * V ** (order - 1 - i) for i in range(order))

    table = torch.bincount(entries(train), minlength=V**order).view(-1, V) + 0.1
    probabilities = table / table.sum(dim=-1, keepdim=True)  # (V^(order - 1), V)
    loss = -probabilities.flatten()[entries(val)][1:].log().mean().item()
    torch.manual_seed(seed)
    ids = [0] * order
    for _ in range(200):
        before = sum(i * V**place for place, i in enumerate(ids[:-order:-1]))
        ids.append(int(torch.multinomial(probabilities[before], num_samples=1)))
    seconds = time.perf_counter() - start
    return Result(name, table.numel(), loss, seconds, a_line(textbook.decode(ids)))


def climb(rung: Rung, text: str, steps: int, seed: int) -> tuple[Result, BigramLangModel]:
    textbook.prepare(
        text, **textbook.SMALL | dict(epochs=steps, eval_interval=steps + 1, eval_characters=1)
    )
    train = textbook.data["train"]
    textbook.data["train"] = train[: int(rung.share * len(train))]
    torch.manual_seed(seed)
    textbook.model = model = rung.build().to(train.device)
    torch.manual_seed(seed)  # the same batches for all, however many weights were drawn
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        textbook.train()
    seconds = time.perf_counter() - start
    return measured(rung.name, model, seconds, seed), model


def measured(name: str, model: BigramLangModel, seconds: float, seed: int) -> Result:
    loss = whole_split_loss(model, textbook.data["val"])
    torch.manual_seed(seed)
    start = torch.zeros(1, 1, dtype=torch.long, device=textbook.data["val"].device)
    sample = model.generate(start, 200)[0].tolist()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Result(name, parameters, loss, seconds, a_line(textbook.decode(sample)))


def engine(path: Path, seed: int) -> Result:
    """configs/cpu.yaml as a user would start it: the seconds hold start-up and validation too."""
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
    text = textbook.read_text(options.text)
    textbook.prepare(text)
    for order, what in enumerate(("single characters", "pairs", "triples", "fours"), start=1):
        if chosen(name := f"counting {what}", options.only):
            yield counting(name, order, options.seed)
    for rung in RUNGS:
        if not chosen(rung.name, options.only):
            continue
        result, model = climb(rung, text, options.steps, options.seed)
        yield result
        if rung.name.endswith("the textbook"):
            for block in model.blocks:
                block.attention = Nothing()
            yield measured("... its attention taken out afterwards", model, 0.0, options.seed)
    if chosen("the engine", options.only):
        yield engine(options.text, options.seed)


def chosen(name: str, only: list[str]) -> bool:
    return not only or any(part in name for part in only)


def plot(rows: list[Result], picture: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        sys.exit(f"{picture} is not drawn: matplotlib is missing (pip install matplotlib)")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.34 * len(rows) + 0.8))
    losses = [row.loss for row in rows]
    climbs = ("bigram", "+", "the engine")
    colors = ["C0" if row.rung.startswith(climbs) else "C7" for row in rows]
    axes.barh([row.rung for row in rows], losses, color=colors)
    for place, loss in enumerate(losses):
        axes.text(loss + 0.01, place, f"{loss:.3f}", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set(xlabel="validation loss, nats per character", xlim=(0, max(losses) + 0.4))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=textbook.SMALL["epochs"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--only", nargs="+", default=[], help="rungs whose names contain one of these"
    )
    parser.add_argument("--csv", type=Path, help="where the table goes for a program to read")
    parser.add_argument("--plot", type=Path, help="where the picture goes; needs matplotlib")
    options = parser.parse_args()
    rows = []
    print("| rung | parameters | validation loss | seconds | a line it writes |")
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
