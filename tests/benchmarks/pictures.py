"""Figures of the small textbook network: attention weights, and generated text during training.

    python tests/benchmarks/pictures.py path/to/input.txt --folder tests/benchmarks/figures

Trains the small size of chargpt/textbook.py once (two minutes on two cores) and draws two figures.
`attention.png` shows the attention weights of two heads on one line, selected by their mean
weights on a batch of the validation split. `growth.png` shows the loss on the whole validation
split, and text generated after 0, 100, 500, 1000 and all steps. Needs matplotlib.
"""

import argparse
import contextlib
import math
import sys
from pathlib import Path

import torch
from ladder import Text, whole_split_loss

from chargpt import textbook
from chargpt.explain import all_heads, visible
from chargpt.textbook import BigramLangModel

LINE = "But, soft! what light through yonder"
SAMPLE_STEPS = (0, 100, 500, 1000)  # steps at which text is generated, in addition to the last
SAMPLE_CHARS = 200


def main() -> None:
    try:
        import matplotlib
    except ImportError:
        sys.exit("matplotlib is not installed (pip install matplotlib)")
    matplotlib.use("Agg")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("--line", default=LINE, help="the line whose attention weights are drawn")
    parser.add_argument("--steps", type=int, default=textbook.SMALL_TRAINING["epochs"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "figures")
    options = parser.parse_args()
    text = Text.of(textbook.read_text(options.text))
    torch.manual_seed(options.seed)
    model = BigramLangModel(len(text.itos), **textbook.SMALL)
    curve, samples = train(model, text, options.steps)
    draw_growth(curve, samples, len(text.itos), options.folder / "growth.png")
    draw_attention(model, text, options.line, options.folder / "attention.png")


# --- Growth ------------------------------------------------------------------------------------


Curve = list[tuple[int, float]]  # (step, validation loss)
Samples = list[tuple[int, float, str]]  # (step, validation loss, text)


def train(model: BigramLangModel, text: Text, steps: int) -> tuple[Curve, Samples]:
    """Train; return the loss every 100 steps, and the samples."""
    curve, samples, every = [], [], 100

    def record(*_: object) -> dict[str, float]:
        step, loss = len(curve) * every, whole_split_loss(model, text.val)
        curve.append((step, loss))
        if step in SAMPLE_STEPS or step == steps:
            samples.append((step, loss, generate(model, text)))
        print(f"step {step}: {loss:.3f}", file=sys.stderr)
        model.train()
        return {"train": loss, "val": loss}

    textbook.estimate_loss = record  # called by `textbook.train`
    changes = dict(epochs=steps, eval_interval=every)
    data = {"train": text.train, "val": text.val}
    with contextlib.redirect_stdout(None):  # its estimates are those of `record`
        textbook.train(model, data, **textbook.SMALL_TRAINING | changes)
    return curve, samples


def generate(model: BigramLangModel, text: Text) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        ids = model.generate(torch.zeros(1, 1, dtype=torch.long), SAMPLE_CHARS)
    return textbook.decode(ids[0].tolist(), text.itos).strip()


def draw_growth(curve: Curve, samples: Samples, V: int, picture: Path) -> None:
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(
        2, figsize=(8, 9), height_ratios=(1, 1.9), gridspec_kw={"hspace": 0.3}
    )
    above.plot(*zip(*curve), marker=".", color="C0")
    guess = math.log(V)
    above.axhline(guess, color="C7", linestyle=":", linewidth=1)
    above.annotate(
        f"random guessing: ln {V} = {guess:.2f}",
        (curve[-1][0], guess - 0.2),
        ha="right",
    )
    ylabel = "validation loss\n(nats per character)"
    above.set(xlabel="step", ylabel=ylabel, ylim=(1.5, guess + 0.2))
    above.xaxis.set_major_formatter("{x:,.0f}")
    above.spines[["top", "right"]].set_visible(False)
    below.axis("off")
    below.set_title("generated text", x=0.17, ha="left", fontsize="medium")
    for i, (step, loss, text) in enumerate(samples):
        top = 1 - i / len(samples)
        below.text(0, top, f"step {step:,}\nloss {loss:.2f}", va="top", color="C0")
        lines = [line for line in text.splitlines() if line.strip()][:4]
        lines = [line if len(line) <= 62 else line[:61] + "…" for line in lines]
        below.text(
            0.17,
            top,
            "\n".join(lines).replace("$", r"\$"),
            va="top",
            family="monospace",
            fontsize=9,
        )
    figure.savefig(picture, dpi=110, bbox_inches="tight")


# --- Attention ---------------------------------------------------------------------------------


@torch.no_grad()
def mean_weights(model: BigramLangModel, text: Text) -> dict[str, dict[str, float]]:
    """Mean attention weight of each head on two kinds of positions, for a validation batch."""
    idx, _ = textbook.get_batch(text.val, model.block_size, batch_size=16)
    T = idx.size(1)
    previous = torch.eye(T).roll(1, 0).tril(-1)  # row t, column t - 1
    space = torch.tensor([character in " \n" for character in text.itos.values()])[idx]
    position = torch.arange(T)
    last_space = (
        torch.where(space, position, -1).cummax(dim=1).values
    )  # (B, T): -1 before the first
    starts = (position == last_space.unsqueeze(-1)).float()  # (B, T, T)
    means = {}
    for name, head, x in all_heads(model, idx):
        weights = head.weights(x)
        means[name] = {
            "the previous character": (weights * previous).sum(-1).mean().item(),
            "the space before the current word": (weights * starts).sum(-1).mean().item(),
        }
    return means


@torch.no_grad()
def draw_attention(model: BigramLangModel, text: Text, line: str, picture: Path) -> None:
    from matplotlib import pyplot

    model.eval()
    stoi = {character: i for i, character in text.itos.items()}
    idx = torch.tensor([textbook.encode(line, stoi)])
    weights = {name: head.weights(x)[0] for name, head, x in all_heads(model, idx)}
    means = mean_weights(model, text)
    kinds = next(iter(means.values())).keys()
    figure, panels = pyplot.subplots(
        1, len(kinds), figsize=(5.3 * len(kinds), 6), gridspec_kw={"wspace": 0.12}
    )
    for panel, kind in zip(panels, kinds):
        name = max(means, key=lambda head: means[head][kind])
        panel.imshow(weights[name], cmap="Blues", vmin=0, vmax=1)
        mean = f"mean weight over a validation batch: {means[name][kind]:.0%}"
        panel.set_title(f"{name} attends most to\n{kind}\n({mean})")
        panel.set_xticks(range(len(line)), visible(line), family="monospace", fontsize=8)
        panel.set_yticks(range(len(line)), visible(line), family="monospace", fontsize=8)
        panel.tick_params(length=0)
        panel.set_xlabel("key position (_ is a space)")
    panels[0].set_ylabel("query position")
    figure.savefig(picture, dpi=90, bbox_inches="tight")
    for name, by_kind in means.items():
        print(name, {kind: round(mean, 2) for kind, mean in by_kind.items()})


if __name__ == "__main__":
    main()
