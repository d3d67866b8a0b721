"""One line of text through a small network, untrained and trained, with the numbers on the way.

    python -m chargpt.textbook --explain

The network is that of chargpt/textbook.py, small enough to learn something in a quarter of a
minute. Letters for shapes as there; a space is shown as _ and the end of a line as /.
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
SHOWN = 8  # characters in a matrix of attention weights


def visible(text: str) -> str:
    return text.replace(" ", "_").replace("\n", "/")


def walk(text: str) -> None:
    """Print what happens to one line of the part of the text that is not trained on."""
    textbook.prepare(text, **TINY)
    line = a_line_of(textbook.decode(textbook.data["val"].tolist()))
    ids = torch.tensor([textbook.encode(line)], device=textbook.data["val"].device)
    idx, targets = ids[:, :-1], ids[:, 1:]  # (1, T) each
    show_ids(line, len(textbook.stoi))
    show_shapes(textbook.model, idx)
    print("\n--- Before training: every weight is a random number\n")
    before = show_prediction(textbook.model, idx, targets)
    show_step(textbook.model, idx, targets)
    steps, pieces = TINY["epochs"], TINY["batch_size"]
    print(f"\n--- Training: {steps} such steps, each on {pieces} pieces of the text\n")
    textbook.train()
    print("\n--- After training: the same line, which the network has never seen\n")
    after = show_prediction(textbook.model.eval(), idx, targets)
    show_costs(line, before, after)


def a_line_of(text: str) -> str:
    """The first line of middling length, or what stands at the beginning where there is none."""
    lines = (line for line in text.splitlines() if 20 <= len(line) <= TINY["block_size"])
    return next(lines, text[: TINY["block_size"]])


def show_ids(line: str, V: int) -> None:
    print(f"--- The text: {V} different characters, of which each is a number from 0 to {V - 1}\n")
    for start in range(0, len(line), SHOWN * 2):
        part = line[start : start + SHOWN * 2]
        print("".join(f"{visible(character):>4}" for character in part))
        print("".join(f"{i:4}" for i in textbook.encode(part)))
    print(f'\ninput    "{line[:-1]}"\ntargets  "{line[1:]}": the same, one character later')
    for t in range(1, 5):
        print(f'  after "{line[:t]}" comes "{line[t]}"')
    print("  and so on: a line asks one question fewer than it has characters")


def heads_at_work(model: BigramLangModel, idx: Tensor) -> Iterator[tuple[str, Head, Tensor]]:
    """Each attention head by block and number, with what it is given for idx (B, T): (B, T, C)."""
    x = model.token_embedding(idx) + model.position_embedding.weight[: idx.size(1)]
    for i, block in enumerate(model.blocks, start=1):
        normed = block.attention_norm(x)
        for j, head in enumerate(block.attention.heads, start=1):
            yield f"block {i}, head {j}", head, normed
        x = block(x)


@torch.no_grad()
def show_shapes(model: BigramLangModel, idx: Tensor) -> None:
    block = model.blocks[0]
    _, head, normed = next(heads_at_work(model, idx))
    x = model.token_embedding(idx) + model.position_embedding.weight[: idx.size(1)]
    print(
        "\n--- The shapes on the way: B sequences of T characters, C channels, D of them a head's\n"
    )
    for what, shape, tensor in (
        ("ids", "B, T", idx),
        ("embeddings of character and place, added", "B, T, C", x),
        ("query of one head (key and value alike)", "B, T, D", head.query(normed)),
        ("its weights: who takes how much from whom", "B, T, T", head.weights(normed)),
        ("what it gathers", "B, T, D", head(normed)),
        ("all heads side by side, projected", "B, T, C", block.attention(normed)),
        ("inside feed-forward, four times as wide", "B, T, 4C", block.feed_forward.expansion(x)),
        ("after the blocks: as it went in", "B, T, C", model.blocks(x)),
        ("logits", "B, T, V", model(idx)[0]),
    ):
        print(f"{what:44}{shape:10}{tuple(tensor.shape)}")


@torch.no_grad()
def show_prediction(model: BigramLangModel, idx: Tensor, targets: Tensor) -> Tensor:
    """Attention, logits, likeliest characters, loss; returns the targets' probabilities, (T,)."""
    show_attention(model, idx)
    logits, loss = model(idx, targets)  # (1, T, V) and one number
    probabilities = logits[0].softmax(dim=-1)  # (T, V)
    text = textbook.decode(idx[0].tolist())
    print(f'\nwhat comes after "{text}"? The five likeliest:')
    likeliest = probabilities[-1].topk(min(5, len(textbook.stoi)))
    for p, i in zip(likeliest.values.tolist(), likeliest.indices.tolist()):
        character, logit = visible(textbook.itos[i]), logits[0, -1, i]
        print(f"  {character}  logit {logit:6.3f}  probability {p:.3f}")
    V = probabilities.size(-1)
    print(
        f"loss on this line, the mean of -ln(probability of what came): {loss:.3f} nats "
        f"= {loss / math.log(2):.3f} bits\na guess among {V} costs ln {V} = {math.log(V):.3f} nats"
    )
    return probabilities.gather(1, targets[0].unsqueeze(1)).squeeze(1)


def show_attention(model: BigramLangModel, idx: Tensor) -> None:
    """The weights of the head that looks most at the character before, and how a row is made."""

    def at_previous(found: tuple[str, Head, Tensor]) -> float:
        _, head, x = found
        return head.weights(x)[0].diagonal(offset=-1).mean().item()

    name, head, x = max(heads_at_work(model, idx), key=at_previous)
    weights = head.weights(x)[0, :SHOWN, :SHOWN]  # a row needs no later column: still adds up to 1
    characters = visible(textbook.decode(idx[0, :SHOWN].tolist()))
    print(f"attention of {name}; a row says where its character looks, and adds up to 1")
    print("    " + "".join(f"{character:>7}" for character in characters))
    for t, character in enumerate(characters):
        print(f"  {character}  " + "".join(f"{weight:7.2f}" for weight in weights[t, : t + 1]))
    q, k = head.query(x)[0, SHOWN - 1], head.key(x)[0, :SHOWN]  # (D,) and (SHOWN, D)
    scores = k @ q / math.sqrt(len(q))
    print(f"the last row is the softmax of its query times each key, divided by sqrt({len(q)}):")
    print("    " + "".join(f"{score:7.2f}" for score in scores))


def show_step(model: BigramLangModel, idx: Tensor, targets: Tensor) -> None:
    """One step of AdamW on the line, and what it does to the weight with the steepest gradient."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=textbook.lr)
    _, loss = model(idx, targets)
    loss.backward()
    weight = model.head.weight
    place = divmod(int(weight.grad.abs().argmax()), weight.size(1))
    old, g = weight[place].item(), weight.grad[place].item()
    optimizer.step()
    m, v = (optimizer.state[weight][name][place].item() for name in ("exp_avg", "exp_avg_sq"))
    m, v = m / (1 - 0.9), v / (1 - 0.999)  # both averages began at 0: corrected for that
    new, direction = weight[place].item(), m / math.sqrt(v)
    optimizer.zero_grad()
    with torch.no_grad():
        _, after = model(idx, targets)
    lr = textbook.lr
    print(
        f"\none step of AdamW on this line, learning rate {lr}, seen at one weight of the output:"
    )
    print(f"  gradient {g:.4f}, so m = {m:.4f}, v = {v:.6f}, m / sqrt(v) = {direction:.3f}")
    print(f"  weight {old:.5f} - {lr} x ({direction:.3f} + decay 0.01 x {old:.5f}) = {new:.5f}")
    print(f"  loss {loss:.3f} before, {after:.3f} after")


def show_costs(line: str, before: Tensor, after: Tensor) -> None:
    """The loss, character by character: the mean of the third and of the fifth column."""
    print("\nwhat each character of the line had as its probability, and cost:\n")
    print("   comes   untrained       trained")
    for character, *ps in zip(line[1:], before.tolist(), after.tolist()):
        columns = "  ".join(f"{p:7.4f} {-math.log(p):6.3f}" for p in ps)
        print(f"     {visible(character)}  {columns}")
    print("    mean " + "  ".join(f"{'':6} {-ps.log().mean():6.3f}" for ps in (before, after)))
