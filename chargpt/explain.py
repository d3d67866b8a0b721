"""Follow one character through a small network, before and after training, in numbers.

    python -m chargpt.explain                       # half a minute
    python -m chargpt.explain path/to/input.txt     # your own text

The network is the one in chargpt/textbook.py; chargpt/README.md explains each step. Positions are
counted from 0; in tables, spaces are shown as _ and newlines as /.
"""

import argparse
import copy
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from chargpt.textbook import BigramLangModel, Head, decode, encode, prepare, read_text, train

SIZES = dict(block_size=32, n_embed=48, n_head=3, n_layer=2, dropout=0.0)
TRAINING = dict(batch_size=32, epochs=1000, lr=5e-3)
POSITION = 7  # of the character that is followed
CHANNELS = 4  # how many of a vector's numbers are printed


def visible(text: str) -> str:
    return text.replace(" ", "_").replace("\n", "/")


def row(label: str, vector: Tensor) -> str:
    """One line: a label, and the first channels of a vector."""
    return f"{label:32}" + "".join(f"{value:8.3f}" for value in vector[:CHANNELS].tolist())


def explain(text: str) -> None:
    """Print each step of the computation for one line of the validation split."""
    torch.manual_seed(1337)
    stoi, itos, data = prepare(text)
    model = BigramLangModel(len(itos), **SIZES)
    line = pick_line(decode(data["val"].tolist(), itos))
    ids = torch.tensor([encode(line, stoi)])
    idx, targets = ids[:, :-1], ids[:, 1:]  # (1, T) each
    show_ids(line, stoi)
    show_shapes(model, idx)
    print("\n--- Before training: the weights are still random")
    show_embedding(model, idx, line)
    show_head(*next(all_heads(model, idx)), line)
    show_stream(model, idx)
    show_prediction(model, idx, line, itos)
    before = show_loss(model, idx, targets)
    stepped = copy.deepcopy(model)
    index = show_gradient(stepped, idx, targets, itos)
    show_step(stepped, idx, targets, index)
    print("\n--- Training: {epochs} steps, each on {batch_size} sequences\n".format(**TRAINING))
    train(model, data, **TRAINING)
    print("\n--- After training: the same line, which was not in the training data")
    head = max(all_heads(model, idx), key=previous_weight)
    show_attention(*head, line)
    show_head(*head, line)
    show_stream(model, idx)
    show_prediction(model, idx, line, itos)
    after = show_loss(model, idx, targets)
    show_losses(line, before, after)


def pick_line(text: str) -> str:
    """The first line of suitable length, or the beginning of the text if there is none."""
    lines = (line for line in text.splitlines() if 20 <= len(line) <= SIZES["block_size"])
    return next(lines, text[: SIZES["block_size"]])


def show_ids(line: str, stoi: dict[str, int]) -> None:
    V = len(stoi)
    print(f"--- The text: {V} distinct characters, each encoded as an id from 0 to {V - 1}\n")
    for start in range(0, len(line), 16):
        part = line[start : start + 16]
        print("".join(f"{visible(character):>4}" for character in part))
        print("".join(f"{i:4}" for i in encode(part, stoi)))
    print(f"\ninput    {line[:-1]}\ntargets  {line[1:]}")
    for t in range(1, 5):
        print(f'after "{line[:t]}" comes "{line[t]}"')
    print(f"and so on: a line of {len(line)} characters gives {len(line) - 1} predictions")


def all_heads(model: BigramLangModel, idx: Tensor) -> Iterator[tuple[str, Head, Tensor]]:
    """The name, the module and the input (B, T, C) of each attention head for idx (B, T)."""
    x = model.token_embedding(idx) + model.position_embedding.weight[: idx.size(1)]
    for i, block in enumerate(model.blocks, start=1):
        normed = block.attention_norm(x)
        for j, head in enumerate(block.attention.heads, start=1):
            yield f"block {i}, head {j}", head, normed
        x = block(x)


def previous_weight(entry: tuple[str, Head, Tensor]) -> float:
    """Mean weight that a head puts on the previous character."""
    _, head, x = entry
    return head.weights(x)[0].diagonal(offset=-1).mean().item()


@torch.no_grad()
def show_shapes(model: BigramLangModel, idx: Tensor) -> None:
    block = model.blocks[0]
    _, head, normed = next(all_heads(model, idx))
    x = model.token_embedding(idx) + model.position_embedding.weight[: idx.size(1)]
    print("\n--- Shapes: B sequences of T characters, C channels, D channels per head\n")
    for name, shape, tensor in (
        ("ids", "B, T", idx),
        ("token embedding + position embedding", "B, T, C", x),
        ("query of one head (key, value: the same)", "B, T, D", head.query(normed)),
        ("attention weights of that head", "B, T, T", head.weights(normed)),
        ("its output", "B, T, D", head(normed)),
        ("all heads concatenated and projected", "B, T, C", block.attention(normed)),
        ("hidden layer of feed-forward", "B, T, 4C", block.feed_forward.expansion(x)),
        ("output of the last block", "B, T, C", model.blocks(x)),
        ("logits", "B, T, V", model(idx)[0]),
    ):
        print(f"{name:44}{shape:10}{tuple(tensor.shape)}")


@torch.no_grad()
def show_embedding(model: BigramLangModel, idx: Tensor, line: str) -> None:
    token = model.token_embedding(idx)[0, POSITION]  # (C,)
    position = model.position_embedding.weight[POSITION]
    x = token + position
    normed = model.blocks[0].attention_norm(x)
    where = f'at position {POSITION}, "{line[POSITION]}"'
    print(f"\nthe character {where}: {CHANNELS} of {len(x)} channels")
    print(row(f'embedding of "{line[POSITION]}"', token))
    print(row(f"embedding of position {POSITION}", position))
    print(row("x, their sum", x))
    print(f"mean of x {x.mean():.3f}, standard deviation {x.std(correction=0):.3f}")
    print(row("LayerNorm(x)", normed))


@torch.no_grad()
def show_head(name: str, head: Head, x: Tensor, line: str) -> None:
    """Print one row of attention: scores, weights and values of a character and those before it."""
    q, k, v = (layer(x)[0, : POSITION + 1] for layer in (head.query, head.key, head.value))
    scores = k @ q[POSITION] / math.sqrt(q.size(-1))  # (POSITION + 1,)
    weights = head.weights(x)[0, POSITION, : POSITION + 1]
    print(f"\n{name}: {CHANNELS} of {q.size(-1)} channels")
    print(row(f'query of "{line[POSITION]}"', q[POSITION]))
    print("        score  weight    value")
    for character, score, weight, value in zip(visible(line), scores, weights, v):
        print(row(f"  {character}  {score:8.3f}{weight:8.3f}", value))
    print(row("output, sum of weight x value", head(x)[0, POSITION]))


@torch.no_grad()
def show_attention(name: str, head: Head, x: Tensor, line: str) -> None:
    shown = visible(line[: POSITION + 1])
    weights = head.weights(x)[0]
    print(f"\nattention weights of {name}: each row is one character's, and sums to 1")
    print("    " + "".join(f"{character:>7}" for character in shown))
    for t, character in enumerate(shown):
        print(f"  {character}  " + "".join(f"{weight:7.2f}" for weight in weights[t, : t + 1]))


@torch.no_grad()
def show_stream(model: BigramLangModel, idx: Tensor) -> None:
    """Print what each layer adds to the residual stream at POSITION."""
    x = model.token_embedding(idx) + model.position_embedding.weight[: idx.size(1)]
    print(f"\nthe residual stream at position {POSITION}")
    print(row("x", x[0, POSITION]))
    for i, block in enumerate(model.blocks, start=1):
        attention = block.attention(block.attention_norm(x))
        feed_forward = block.feed_forward(block.feed_forward_norm(x + attention))
        x = x + attention + feed_forward
        print(row(f"+ attention of block {i}", attention[0, POSITION]))
        print(row(f"+ feed-forward of block {i}", feed_forward[0, POSITION]))
    print(row("= x after the last block", x[0, POSITION]))


@torch.no_grad()
def show_prediction(model: BigramLangModel, idx: Tensor, line: str, itos: dict[int, str]) -> None:
    logits = model(idx)[0][0, POSITION]  # (V,)
    p = logits.softmax(dim=-1)
    target = line[POSITION + 1]
    print(f'\nthe most likely characters after "{line[: POSITION + 1]}"')
    for i in p.topk(min(5, len(p))).indices.tolist():
        print(f"  {visible(itos[i])}  logit {logits[i]:6.3f}  probability {p[i]:.3f}")
    i = next(i for i, character in itos.items() if character == target)
    print(f'the next character is "{target}": loss -ln {p[i]:.4f} = {-p[i].log():.3f}')


@torch.no_grad()
def show_loss(model: BigramLangModel, idx: Tensor, targets: Tensor) -> Tensor:
    """Print the mean loss; return the probabilities of the targets, (T,)."""
    logits, loss = model(idx, targets)
    V = logits.size(-1)
    print(f"\nmean loss of the line {loss:.3f} nats = {loss / math.log(2):.3f} bits")
    print(f"guessing among {V} characters costs ln {V} = {math.log(V):.3f} nats")
    return logits[0].softmax(dim=-1).gather(1, targets[0].unsqueeze(1)).squeeze(1)


def show_gradient(
    model: BigramLangModel, idx: Tensor, targets: Tensor, itos: dict[int, str]
) -> tuple[int, int]:
    """Print the gradient of one weight of the output head, three ways; return the weight's index.

    It has the largest absolute gradient among those for the target at POSITION.
    """
    with torch.no_grad():
        x = model.token_embedding(idx) + model.position_embedding.weight[: idx.size(1)]
        h = model.norm(model.blocks(x))[0]  # (T, C), the input of the head
        p = model.head(h).softmax(dim=-1)  # (T, V)
        y = F.one_hot(targets[0], p.size(-1))  # (T, V): 1 for the target, else 0
    _, loss = model(idx, targets)
    (gradient,) = torch.autograd.grad(loss, [model.head.weight])  # (V, C)
    i = int(targets[0, POSITION])
    j = int(gradient[i].abs().argmax())
    error, T = p[POSITION, i] - y[POSITION, i], len(h)
    print(f'\nthe weight from channel {j} to the logit of "{visible(itos[i])}"')
    print(f"p - y at position {POSITION}: {p[POSITION, i]:.4f} - {y[POSITION, i]} = {error:.4f}")
    print(f"times the channel, {h[POSITION, j]:.3f}: {error * h[POSITION, j]:.4f}")
    print(f"mean over the {T} positions: {((p - y)[:, i] * h[:, j]).mean():.4f}")
    print(f"PyTorch's gradient: {gradient[i, j]:.4f}")
    with torch.no_grad():
        model.head.weight[i, j] += 0.01
        change = model(idx, targets)[1] - loss
        model.head.weight[i, j] -= 0.01
    print(f"increasing the weight by 0.01 changes the loss by {change:.6f}")
    return i, j


def show_step(model: BigramLangModel, idx: Tensor, targets: Tensor, index: tuple[int, int]) -> None:
    """Take one AdamW step on the line; print the update of one weight of the output head."""
    lr = TRAINING["lr"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    _, loss = model(idx, targets)
    loss.backward()
    weight = model.head.weight
    old, g = weight[index].item(), weight.grad[index].item()
    optimizer.step()
    m, v = (optimizer.state[weight][name][index].item() for name in ("exp_avg", "exp_avg_sq"))
    m_hat, v_hat = m / (1 - 0.9), v / (1 - 0.999)  # bias correction
    direction, new = m_hat / math.sqrt(v_hat), weight[index].item()
    with torch.no_grad():
        after = model(idx, targets)[1].item()
    print(f"\none AdamW step on this line, learning rate {lr}, for the same weight")
    print(f"gradient {g:.4f}: m = {m:.5f}, v = {v:.8f}")
    print(f"corrected m {m_hat:.4f}, v {v_hat:.6f}; m / sqrt(v) = {direction:.3f}")
    print(f"weight {old:.5f} - {lr} x ({direction:.3f} + 0.01 x {old:.5f}) = {new:.5f}")
    print(f"mean loss of the line {loss.item():.3f} before, {after:.3f} after")


def show_losses(line: str, before: Tensor, after: Tensor) -> None:
    """Print each target's probability and loss, untrained and trained, and the mean losses."""
    print("\nprobability and loss of each character of the line\n")
    print("  target   untrained       trained")
    for character, *ps in zip(line[1:], before.tolist(), after.tolist()):
        columns = "  ".join(f"{p:7.4f} {-math.log(p):6.3f}" for p in ps)
        print(f"     {visible(character)}  {columns}")
    print("    mean " + "  ".join(f"{'':6} {-ps.log().mean():6.3f}" for ps in (before, after)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m chargpt.explain", description=explain.__doc__)
    parser.add_argument("text", nargs="?", type=Path, help="a UTF-8 text file")
    text = read_text(parser.parse_args().text)
    needed = 10 * (SIZES["block_size"] + 1)
    if len(text) < needed:
        sys.exit(f"the text has {len(text):,} characters; this script needs at least {needed:,}")
    torch.set_num_threads(1)  # the same sums, whatever the number of cores; no slower at this size
    explain(text)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)  # the conventional exit status after Ctrl-C
