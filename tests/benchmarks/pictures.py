"""Pictures of a small textbook model while and after it learns: attention, and text as it grows.

    python tests/benchmarks/pictures.py path/to/input.txt --folder tests/benchmarks/figures

Trains the small size of chargpt/textbook.py once (two minutes on two cores) and draws
`attention.png`: what three of its heads look at in a line, each the one that does one thing most,
by its mean weight over the validation split; and `growth.png`: the loss, and what the model writes
after 0, 100, 500, 1000 and all steps. Needs matplotlib.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from chargpt import textbook
from chargpt.textbook import BigramLangModel
from chargpt.textbook_walk import heads_at_work, visible

LINE = "But, soft! what light through yonder"
STOPS = (0, 100, 500, 1000)  # steps after which it writes, and at the end
SAMPLE = 200


def main() -> None:
    try:
        import matplotlib
    except ImportError:
        sys.exit("nothing is drawn: matplotlib is missing (pip install matplotlib)")
    matplotlib.use("Agg")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("--line", default=LINE, help="what attention is drawn over")
    parser.add_argument("--steps", type=int, default=textbook.SMALL["epochs"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "figures")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    textbook.prepare(
        textbook.read_text(options.text), **textbook.SMALL | dict(epochs=options.steps)
    )
    curve, samples = watch_training()
    draw_growth(curve, samples, options.folder / "growth.png")
    draw_attention(textbook.model, options.line, options.folder / "attention.png")


# --- Growth ------------------------------------------------------------------------------------


def watch_training() -> tuple[list[tuple[int, float]], list[tuple[int, float, str]]]:
    """Train; returns (step, validation loss) now and then, and (step, loss, text) at the stops."""
    curve, samples = [], []
    estimate = textbook.estimate_loss

    def look() -> dict[str, float]:
        step = len(curve) * textbook.eval_interval
        losses = estimate()
        curve.append((step, losses["val"]))
        if step in STOPS or step == textbook.epochs:
            samples.append((step, losses["val"], written()))
        return losses

    textbook.eval_interval = 100
    textbook.estimate_loss = look  # `train` calls it: what it prints, we keep
    textbook.train()
    return curve, samples


def written() -> str:
    textbook.model.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        start = torch.zeros(1, 1, dtype=torch.long, device=textbook.data["val"].device)
        ids = textbook.model.generate(start, SAMPLE)
    textbook.model.train()
    return textbook.decode(ids[0].tolist()).strip()


def draw_growth(curve: list, samples: list, picture: Path) -> None:
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, figsize=(8, 9), height_ratios=(1, 1.9))
    above.plot(*zip(*curve), marker=".", color="C0")
    guess = torch.tensor(len(textbook.stoi)).log().item()
    above.axhline(guess, color="C7", linestyle=":", linewidth=1)
    above.annotate(
        f"a guess: ln {len(textbook.stoi)} = {guess:.2f}", (curve[-1][0], guess - 0.2), ha="right"
    )
    above.set(xlabel="step", ylabel="validation loss, nats", ylim=(1.5, guess + 0.2))
    above.spines[["top", "right"]].set_visible(False)
    below.axis("off")
    for i, (step, loss, text) in enumerate(samples):
        top = 1 - i / len(samples)
        below.text(0, top, f"step {step}\n{loss:.2f} nats", va="top", color="C0")
        lines = [line[:62] for line in text.splitlines() if line.strip()][:4]
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
def mean_weights(model: BigramLangModel) -> dict[str, dict[str, float]]:
    """How much each head looks at what, over a batch of the validation split."""
    idx, _ = textbook.get_batch("val")
    T = idx.size(1)
    previous = torch.eye(T).roll(1, 0).tril(-1)  # row t, column t - 1
    gap = torch.tensor([textbook.itos[i] in " \n" for i in range(len(textbook.itos))])[idx.cpu()]
    at = torch.arange(T)
    last_gap = torch.where(gap, at, -1).cummax(dim=1).values  # (B, T): -1 before the first
    starts = (at == last_gap.unsqueeze(-1)).float()  # (B, T, T)
    far = (at.unsqueeze(1) - at >= 8).float()
    found = {}
    for name, head, x in heads_at_work(model, idx):
        weights = head.weights(x).cpu()
        found[name] = {
            "the character before": (weights * previous).sum(-1).mean().item(),
            "the gap before the word": (weights * starts).sum(-1).mean().item(),
            "characters eight and more back": (weights * far).sum(-1).mean().item(),
        }
    return found


@torch.no_grad()
def draw_attention(model: BigramLangModel, line: str, picture: Path) -> None:
    from matplotlib import pyplot

    model.eval()
    idx: Tensor = torch.tensor([textbook.encode(line)], device=textbook.data["val"].device)
    weights = {name: head.weights(x)[0].cpu() for name, head, x in heads_at_work(model, idx)}
    shares = mean_weights(model)
    kinds = next(iter(shares.values())).keys()
    figure, panels = pyplot.subplots(1, len(kinds), figsize=(5.6 * len(kinds), 6))
    for panel, kind in zip(panels, kinds):
        name = max(shares, key=lambda head: shares[head][kind])
        panel.imshow(weights[name], cmap="Blues", vmin=0, vmax=1)
        panel.set_title(f"{name}: {shares[name][kind]:.0%} of its weight on\n{kind}")
        panel.set_xticks(range(len(line)), visible(line), family="monospace", fontsize=9)
        panel.set_yticks(range(len(line)), visible(line), family="monospace", fontsize=9)
        panel.tick_params(length=0)
    panels[0].set_ylabel("this character looks ...")
    panels[0].set_xlabel("... at these")
    figure.savefig(picture, dpi=90, bbox_inches="tight")
    for name, share in shares.items():
        print(name, {kind: round(value, 2) for kind, value in share.items()})


if __name__ == "__main__":
    main()
