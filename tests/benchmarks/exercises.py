"""Results of the lesson's exercises (chargpt/README.md): change the textbook, train, compare.

    python tests/benchmarks/exercises.py path/to/input.txt           # 10 to 15 minutes on two cores
    python tests/benchmarks/exercises.py path/to/input.txt --only 4 5 --steps 500
    python tests/benchmarks/exercises.py path/to/input.txt --only 0  # seconds

0 prints the numbers of the section on residual connections. Exercises 2 and 8 are in ladder.py,
exercise 10 in generate.py.
"""

import argparse
import math
import re
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from ladder import Rung, Text, whole_split_loss
from torch import Tensor

from chargpt import textbook
from chargpt.explain import all_heads
from chargpt.textbook import BigramLangModel, Head


def untrained(text: Text) -> BigramLangModel:
    torch.manual_seed(1337)
    return BigramLangModel(len(text.itos), **textbook.SMALL)


def train(text: Text, **changes: float) -> tuple[BigramLangModel, float]:
    """Train the small textbook network; returns it with its loss on the whole validation split."""
    model = untrained(text)
    data = {"train": text.train, "val": text.val}
    textbook.train(model, data, **textbook.SMALL_TRAINING | changes)
    return model, whole_split_loss(model, text.val)


def residuals(text: Text, with_them: bool) -> None:
    """What reaches the last block from the last character, and the embeddings from the loss."""
    label = "with residuals" if with_them else "without residuals"
    torch.manual_seed(1)
    idx, _ = textbook.get_batch(text.val, textbook.SMALL["block_size"], batch_size=64)
    other = idx.clone()
    other[:, -1] = (other[:, -1] + 1) % len(text.itos)
    for layers in (1, 2, 3):
        torch.manual_seed(1)
        model = Rung("", residuals=with_them, layers=layers).build(len(text.itos))
        with torch.no_grad():
            a, b = (model.norm(last_stream(model, ids)[:, -1]) for ids in (idx, other))
        change = ((a - b).norm(dim=-1) / a.norm(dim=-1)).mean()
        print(f"0. {label}, blocks {layers}: another last character changes it by {change:.4f}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=textbook.SMALL_TRAINING["lr"])
    for _ in range(16):
        loss = model(*textbook.get_batch(text.train, model.block_size, batch_size=16))[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = {f"block {i}": b.feed_forward.expansion.weight for i, b in enumerate(model.blocks, 1)}
    weights["embeddings"] = model.token_embedding.weight
    norms = ", ".join(f"{name} {weight.grad.norm():.1e}" for name, weight in weights.items())
    print(f"0. {label}, 3 blocks, gradient after 15 steps: {norms}")


def last_stream(model: BigramLangModel, idx: Tensor) -> Tensor:
    """The residual stream after the last block, (B, T, C)."""
    x = model.token_embedding(idx) + model.position_embedding.weight[: idx.size(1)]
    return model.blocks(x)


def temperature(model: BigramLangModel, text: Text) -> None:
    known = set(re.findall(r"[A-Za-z']+", textbook.decode(text.train.tolist(), text.itos)))
    weight, bias = model.head.weight.clone(), model.head.bias.clone()
    for value in (0.5, 1.0, 1.5):
        with torch.no_grad():  # logits / temperature
            model.head.weight.copy_(weight / value)
            model.head.bias.copy_(bias / value)
        torch.manual_seed(1)
        ids = model.generate(torch.zeros(16, 1, dtype=torch.long), 500)
        generated = "\n".join(textbook.decode(row, text.itos) for row in ids.tolist())
        words = re.findall(r"[A-Za-z']+", generated)
        fraction = sum(word in known for word in words) / len(words)
        print(
            f"1. temperature {value}: {fraction:.0%} of {len(words)} words are in the training text"
        )
    with torch.no_grad():
        model.head.weight.copy_(weight)
        model.head.bias.copy_(bias)


def without_root(head: Head, x: Tensor) -> Tensor:
    q, k = head.query(x), head.key(x)
    future = torch.ones(x.size(1), x.size(1)).triu(diagonal=1).bool()
    return (q @ k.transpose(1, 2)).masked_fill(future, -math.inf).softmax(dim=-1)


@torch.no_grad()
def largest_weights(model: BigramLangModel, text: Text) -> str:
    """Summary of the largest attention weight of each row, in rows of the second half."""
    torch.manual_seed(1)
    idx, _ = textbook.get_batch(text.val, model.block_size, batch_size=64)
    rows = [head.weights(x)[:, model.block_size // 2 :] for _, head, x in all_heads(model, idx)]
    largest = torch.stack(rows).amax(dim=-1)
    above = (largest > 0.9).float().mean()
    return f"largest weight of a row {largest.mean():.2f} on average, above 0.9 in {above:.1%}"


def without_mask(head: Head, x: Tensor) -> Tensor:
    q, k = head.query(x), head.key(x)
    return (q @ k.transpose(1, 2) / math.sqrt(q.size(-1))).softmax(dim=-1)


def rotary(head: Head, x: Tensor) -> Tensor:
    T = x.size(1)

    def rotate(x: Tensor) -> Tensor:
        D = x.size(-1)
        angle = torch.arange(T)[:, None] * 10_000.0 ** (-torch.arange(0, D, 2) / D)
        a, b = x[..., ::2], x[..., 1::2]
        pairs = (a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos())
        return torch.stack(pairs, dim=-1).flatten(-2)

    q, k = rotate(head.query(x)), rotate(head.key(x))
    future = torch.ones(T, T).triu(diagonal=1).bool()
    scores = q @ k.transpose(1, 2) / math.sqrt(q.size(-1))
    return scores.masked_fill(future, -math.inf).softmax(dim=-1)


def without_positions(model: BigramLangModel, idx: Tensor, targets: Tensor | None = None):
    logits = model.head(model.norm(model.blocks(model.token_embedding(idx))))
    if targets is None:
        return logits, None
    return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def by_position(model: BigramLangModel, text: Text) -> None:
    val, T = text.val, model.block_size
    whole = (len(val) - 1) // T * T
    x, y = val[:whole].view(-1, T), val[1 : whole + 1].view(-1, T)
    losses = torch.cat(
        [
            F.cross_entropy(model(a)[0].transpose(1, 2), b, reduction="none")
            for a, b in zip(x.split(128), y.split(128))
        ]
    ).mean(0)
    some = ", ".join(f"{n}: {losses[n - 1]:.2f}" for n in (1, 2, 4, 8, 16, 32))
    print(f"6. loss at position {some}; second half {losses[T // 2 :].mean():.2f}")


@torch.no_grad()
def without_each_head(model: BigramLangModel, text: Text) -> None:
    print(f"7. all heads: {whole_split_loss(model, text.val):.3f}")
    for number, block in enumerate(model.blocks, start=1):
        weight, n_head = block.attention.projection.weight, len(block.attention.heads)
        kept, D = weight.clone(), weight.size(1) // n_head
        for head in range(n_head):
            weight[:, head * D : (head + 1) * D] = 0
            loss = whole_split_loss(model, text.val)
            print(f"7. without head {head + 1} of block {number}: {loss:.3f}")
            weight.copy_(kept)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("--only", nargs="+", type=int, default=[0, 1, 3, 4, 5, 6, 7, 9])
    parser.add_argument("--steps", type=int, default=textbook.SMALL_TRAINING["epochs"])
    options = parser.parse_args()
    text, only = Text.of(textbook.read_text(options.text)), options.only
    steps = dict(epochs=options.steps)
    changes = {
        3: (
            "a tenth of the learning rate",
            Head.weights,
            {"lr": textbook.SMALL_TRAINING["lr"] / 10},
        ),
        4: ("no square root", without_root, {}),
        5: ("no mask", without_mask, {}),
        9: ("rotary positions", rotary, {}),
    }
    if 0 in only:
        for with_them in (True, False):
            residuals(text, with_them)
    if {1, 4, 6, 7} & set(only):
        model, loss = train(text, **steps)
        print(f"the unchanged textbook: {loss:.3f}")
        if 4 in only:
            print(f"4. before training: {largest_weights(untrained(text), text)}")
            print(f"4. after training: {largest_weights(model, text)}")
        for number, measure in ((1, temperature), (6, by_position), (7, without_each_head)):
            if number in only:
                measure(model, text)
    for number in sorted(changes.keys() & set(only)):
        name, weights, sizes = changes[number]
        forward = without_positions if number == 9 else BigramLangModel.forward
        with (
            patch.object(Head, "weights", weights),
            patch.object(BigramLangModel, "forward", forward),
        ):
            if number == 4:
                print(f"4. {name}, before training: {largest_weights(untrained(text), text)}")
            model, loss = train(text, **steps, **sizes)
            print(f"{number}. {name}: {loss:.3f}", flush=True)
            if number == 4:
                print(f"4. {name}, after training: {largest_weights(model, text)}")


if __name__ == "__main__":
    sys.exit(main())
