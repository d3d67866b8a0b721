"""Follow one line of text through a small network, before and after training, with all numbers.

    python -m chargpt.textbook --explain

The network is the one in chargpt/textbook.py, small enough to train in 15 seconds. Shapes use the
same letters. Spaces are shown as _ and newlines as /.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from chargpt import textbook
from chargpt.textbook import BigramLangModel, Head

TINY = dict(
    block_size=32, batch_size=32, epochs=1000, lr=5e-3, n_embed=48, n_head=3, n_layer=2, dropout=0.0
)
SHOWN = 8  # rows and columns of the printed attention matrix


def visible(text: str) -> str:
    return text.replace(" ", "_").replace("\n", "/")


def walk(text: str) -> None:
    """Print each step of the computation for one line of the validation split."""
    textbook.prepare(text, **TINY)
    line = pick_line(textbook.decode(textbook.data["val"].tolist()))
    ids = torch.tensor([textbook.encode(line)], device=textbook.data["val"].device)
    idx, targets = ids[:, :-1], ids[:, 1:]  # (1, T) each
    show_ids(line, len(textbook.stoi))
    show_shapes(textbook.model, idx)
    print("\n--- Before training: all weights are random\n")
    before = show_prediction(textbook.model, idx, targets)
    show_step(textbook.model, idx, targets)
    steps, sequences = TINY["epochs"], TINY["batch_size"]
    print(f"\n--- Training: {steps} such steps, each on {sequences} random sequences\n")
    textbook.train()
    print("\n--- After training: the same line, which was not in the training data\n")
    after = show_prediction(textbook.model.eval(), idx, targets)
    show_losses(line, before, after)


def pick_line(text: str) -> str:
    """The first line of suitable length, or the beginning of the text if there is none."""
    lines = (line for line in text.splitlines() if 20 <= len(line) <= TINY["block_size"])
    return next(lines, text[: TINY["block_size"]])


def show_ids(line: str, V: int) -> None:
    print(f"--- The text: {V} distinct characters, each encoded as an id from 0 to {V - 1}\n")
    for start in range(0, len(line), SHOWN * 2):
        part = line[start : start + SHOWN * 2]
        print("".join(f"{visible(character):>4}" for character in part))
        print("".join(f"{i:4}" for i in textbook.encode(part)))
    print(f'\ninput    "{line[:-1]}"\ntargets  "{line[1:]}": the input shifted by one character')
    for t in range(1, 5):
        print(f'  after "{line[:t]}" comes "{line[t]}"')
    print(f"  and so on: a line of {len(line)} characters gives {len(line) - 1} predictions")


def all_heads(model: BigramLangModel, idx: Tensor) -> Iterator[tuple[str, Head, Tensor]]:
    """The name, the module and the input (B, T, C) of each attention head for idx (B, T)."""
    x = model.token_embedding(idx) + model.position_embedding.weight[: idx.size(1)]
    for i, block in enumerate(model.blocks, start=1):
        normed = block.attention_norm(x)
        for j, head in enumerate(block.attention.heads, start=1):
            yield f"block {i}, head {j}", head, normed
        x = block(x)


@torch.no_grad()
def show_shapes(model: BigramLangModel, idx: Tensor) -> None:
    block = model.blocks[0]
    _, head, normed = next(all_heads(model, idx))
    x = model.token_embedding(idx) + model.position_embedding.weight[: idx.size(1)]
    print("\n--- Shapes: B sequences of T characters, C channels, D channels per head\n")
    for name, shape, tensor in (
        ("ids", "B, T", idx),
        ("token embedding + position embedding", "B, T, C", x),
        ("query of one head (key and value alike)", "B, T, D", head.query(normed)),
        ("attention weights of that head", "B, T, T", head.weights(normed)),
        ("its output", "B, T, D", head(normed)),
        ("all heads concatenated and projected", "B, T, C", block.attention(normed)),
        ("hidden layer of feed-forward", "B, T, 4C", block.feed_forward.expansion(x)),
        ("output of the last block", "B, T, C", model.blocks(x)),
        ("logits", "B, T, V", model(idx)[0]),
    ):
        print(f"{name:44}{shape:10}{tuple(tensor.shape)}")


@torch.no_grad()
def show_prediction(model: BigramLangModel, idx: Tensor, targets: Tensor) -> Tensor:
    """Print attention, top predictions and loss; return the probabilities of the targets, (T,)."""
    show_attention(model, idx)
    logits, loss = model(idx, targets)  # (1, T, V) and one number
    probabilities = logits[0].softmax(dim=-1)  # (T, V)
    text = textbook.decode(idx[0].tolist())
    print(f'\nthe five most likely characters after "{text}":')
    top = probabilities[-1].topk(min(5, len(textbook.stoi)))
    for p, i in zip(top.values.tolist(), top.indices.tolist()):
        character, logit = visible(textbook.itos[i]), logits[0, -1, i]
        print(f"  {character}  logit {logit:6.3f}  probability {p:.3f}")
    V = probabilities.size(-1)
    print(
        f"loss on this line, the mean of -ln(probability of the target): {loss:.3f} nats "
        f"= {loss / math.log(2):.3f} bits\n"
        f"random guessing among {V} characters costs ln {V} = {math.log(V):.3f} nats"
    )
    return probabilities.gather(1, targets[0].unsqueeze(1)).squeeze(1)


def show_attention(model: BigramLangModel, idx: Tensor) -> None:
    """Print the attention weights of the head that attends most to the previous character."""

    def previous_weight(entry: tuple[str, Head, Tensor]) -> float:
        _, head, x = entry
        return head.weights(x)[0].diagonal(offset=-1).mean().item()

    name, head, x = max(all_heads(model, idx), key=previous_weight)
    weights = head.weights(x)[0, :SHOWN, :SHOWN]  # causal: cropped rows still sum to 1
    characters = visible(textbook.decode(idx[0, :SHOWN].tolist()))
    print(f"attention weights of {name}: each row is one character's, and sums to 1")
    print("    " + "".join(f"{character:>7}" for character in characters))
    for t, character in enumerate(characters):
        print(f"  {character}  " + "".join(f"{weight:7.2f}" for weight in weights[t, : t + 1]))
    q, k = head.query(x)[0, SHOWN - 1], head.key(x)[0, :SHOWN]  # (D,) and (SHOWN, D)
    scores = k @ q / math.sqrt(len(q))
    print(f"the last row is the softmax of its scores, query times key / sqrt({len(q)}):")
    print("    " + "".join(f"{score:7.2f}" for score in scores))


def show_step(model: BigramLangModel, idx: Tensor, targets: Tensor) -> None:
    """Take one AdamW step on the line; print the update of the weight with the largest gradient."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=textbook.lr)
    _, loss = model(idx, targets)
    loss.backward()
    weight = model.head.weight
    index = divmod(int(weight.grad.abs().argmax()), weight.size(1))
    old, g = weight[index].item(), weight.grad[index].item()
    optimizer.step()
    m, v = (optimizer.state[weight][name][index].item() for name in ("exp_avg", "exp_avg_sq"))
    m, v = m / (1 - 0.9), v / (1 - 0.999)  # bias correction: both averages start at 0
    new, direction = weight[index].item(), m / math.sqrt(v)
    optimizer.zero_grad()
    with torch.no_grad():
        _, after = model(idx, targets)
    lr = textbook.lr
    print(f"\none AdamW step on this line, learning rate {lr}, for one weight of the head:")
    print(f"  gradient {g:.4f}, so m = {m:.4f}, v = {v:.6f}, m / sqrt(v) = {direction:.3f}")
    print(f"  weight {old:.5f} - {lr} x ({direction:.3f} + decay 0.01 x {old:.5f}) = {new:.5f}")
    print(f"  loss {loss:.3f} before, {after:.3f} after")


def show_losses(line: str, before: Tensor, after: Tensor) -> None:
    """Print each target's probability and loss, untrained and trained, and the mean losses."""
    print("\nprobability and loss of each character of the line:\n")
    print("  target   untrained       trained")
    for character, *ps in zip(line[1:], before.tolist(), after.tolist()):
        columns = "  ".join(f"{p:7.4f} {-math.log(p):6.3f}" for p in ps)
        print(f"     {visible(character)}  {columns}")
    print("    mean " + "  ".join(f"{'':6} {-ps.log().mean():6.3f}" for ps in (before, after)))
