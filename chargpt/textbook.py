"""A GPT in one file: data, model, training and generation. chargpt/README.md explains each part.

    python -m chargpt.textbook --small                       # two minutes on two cores
    python -m chargpt.textbook path/to/input.txt --small     # your own text
    python -m chargpt.textbook                               # the base size: better on a GPU

Three names need explaining:

    epochs            training steps (elsewhere, an epoch is one pass over the text)
    BigramLangModel   the whole GPT (Karpathy's lecture starts with a bigram model and extends it)
    n_embed           channels, C (`n_embd` in the rest of the package)

The letters in shapes:

    B  batch size                   V  vocabulary size
    T  sequence length              H  attention heads
    C  channels (n_embed)           D  channels per head (C / H)
"""

import argparse
import math
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --- Hyperparameters: chosen by hand; the weights are learned -----------------------------------

block_size = 256  # T: maximum context length, in characters
batch_size = 64  # B: sequences per training step
epochs = 5000  # training steps
lr = 3e-4  # learning rate: roughly how far one step moves each weight
n_embed = 384  # C: length of the vector that represents a character
n_head = 6  # H
n_layer = 6  # transformer blocks
dropout = 0.2  # fraction of activations set to zero during training
eval_interval = 500  # steps between loss estimates
eval_characters = 50_000  # of each split per estimate, at least

# Two minutes on two CPU cores. A network this small tolerates a higher learning rate, and makes too
# few passes over the text to overfit, so it needs no dropout.
SMALL = dict(block_size=64, n_embed=128, n_head=4, n_layer=3, dropout=0.0)
SMALL_TRAINING = dict(batch_size=16, epochs=1500, lr=3e-3)

# --- Data --------------------------------------------------------------------------------------


def encode(text: str, stoi: dict[str, int]) -> list[int]:
    return [stoi[character] for character in text]


def decode(ids: list[int], itos: dict[int, str]) -> str:
    return "".join(itos[i] for i in ids)


def prepare(text: str) -> tuple[dict[str, int], dict[int, str], dict[str, Tensor]]:
    """The vocabulary, character to id and id to character, and the text's ids in two splits."""
    itos = dict(enumerate(sorted(set(text))))
    stoi = {character: i for i, character in itos.items()}
    ids = torch.tensor(encode(text, stoi))
    end = int(0.9 * len(ids))  # the rest is held out: it cannot have been memorized
    return stoi, itos, {"train": ids[:end], "val": ids[end:]}


def get_batch(ids: Tensor, block_size: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """Random sequences of a split, (B, T), and their targets: the same shifted by one character."""
    starts = torch.randint(len(ids) - block_size, (batch_size,))
    x = torch.stack([ids[i : i + block_size] for i in starts])
    y = torch.stack([ids[i + 1 : i + block_size + 1] for i in starts])
    return x, y


# --- Model -------------------------------------------------------------------------------------


class Head(nn.Module):
    """One head of causal self-attention, (B, T, C) -> (B, T, D): softmax(Q K^T / sqrt(D)) V."""

    def __init__(self, head_size: int, n_embed: int = n_embed, dropout: float = dropout) -> None:
        super().__init__()
        self.query = nn.Linear(n_embed, head_size, bias=False)
        self.key = nn.Linear(n_embed, head_size, bias=False)
        self.value = nn.Linear(n_embed, head_size, bias=False)
        self.dropout = nn.Dropout(dropout)

    def weights(self, x: Tensor) -> Tensor:
        """Attention weights, (B, T, T): row t has those of positions up to t, which sum to 1."""
        T = x.size(1)
        q, k = self.query(x), self.key(x)  # (B, T, D)
        scores = q @ k.transpose(1, 2) / math.sqrt(q.size(-1))  # (B, T, D) @ (B, D, T) -> (B, T, T)
        future = torch.ones(T, T, device=x.device).triu(diagonal=1).bool()  # above the diagonal
        scores = scores.masked_fill(future, -math.inf)  # the causal mask: exp(-inf) is 0
        return scores.softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.weights(x)) @ self.value(x)  # (B, T, T) @ (B, T, D) -> (B, T, D)


class MultiHeadAttention(nn.Module):
    """Heads in parallel, and a projection that combines their outputs, (B, T, C) -> (B, T, C)."""

    def __init__(
        self, n_head: int, head_size: int, n_embed: int = n_embed, dropout: float = dropout
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(head_size, n_embed, dropout) for _ in range(n_head))
        self.projection = nn.Linear(n_head * head_size, n_embed)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([head(x) for head in self.heads], dim=-1)  # H x (B, T, D) -> (B, T, C)
        return self.dropout(self.projection(x))


class FeedForward(nn.Module):
    """A two-layer network at each position, (B, T, C) -> (B, T, C): max(0, x W1 + b1) W2 + b2."""

    def __init__(self, n_embed: int = n_embed, dropout: float = dropout) -> None:
        super().__init__()
        self.expansion = nn.Linear(n_embed, 4 * n_embed)
        self.projection = nn.Linear(4 * n_embed, n_embed)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.projection(torch.relu(self.expansion(x))))


class Block(nn.Module):
    """A pre-norm transformer block, (B, T, C) -> (B, T, C): attention, then feed-forward."""

    def __init__(
        self, n_embed: int = n_embed, n_head: int = n_head, dropout: float = dropout
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(n_embed)
        self.attention = MultiHeadAttention(n_head, n_embed // n_head, n_embed, dropout)
        self.feed_forward_norm = nn.LayerNorm(n_embed)
        self.feed_forward = FeedForward(n_embed, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))  # residual connections: layers add to x
        return x + self.feed_forward(self.feed_forward_norm(x))


class BigramLangModel(nn.Module):
    """A GPT: ids (B, T) to logits (B, T, V), a score for each possible next character."""

    def __init__(
        self,
        vocab_size: int,
        block_size: int = block_size,
        n_embed: int = n_embed,
        n_head: int = n_head,
        n_layer: int = n_layer,
        dropout: float = dropout,
    ) -> None:
        super().__init__()
        self.block_size = block_size
        self.token_embedding = nn.Embedding(vocab_size, n_embed)  # a vector for each character
        self.position_embedding = nn.Embedding(block_size, n_embed)  # and for each position
        self.blocks = nn.Sequential(*[Block(n_embed, n_head, dropout) for _ in range(n_layer)])
        self.norm = nn.LayerNorm(n_embed)
        self.head = nn.Linear(n_embed, vocab_size)
        # Logits near 0 at first: to the untrained network all characters are equally likely.
        nn.init.normal_(self.head.weight, std=0.002)
        nn.init.zeros_(self.head.bias)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, V) and, given targets (B, T), the mean cross-entropy in nats."""
        positions = torch.arange(idx.size(1), device=idx.device)
        x = self.token_embedding(idx) + self.position_embedding(positions)  # (B, T, C)
        x = self.blocks(x)  # (B, T, C)
        logits = self.head(self.norm(x))  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # (B*T, V), (B*T,)

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int) -> Tensor:
        """Append sampled characters, (B, T) -> (B, T + max_new_tokens)."""
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.block_size :])  # recomputes the whole context
            probabilities = logits[:, -1].softmax(dim=-1)  # of the last position, (B, V)
            sampled = torch.multinomial(probabilities, num_samples=1)  # (B, 1)
            idx = torch.cat((idx, sampled), dim=1)
        return idx


# --- Training ----------------------------------------------------------------------------------


@torch.no_grad()
def estimate_loss(
    model: BigramLangModel,
    data: dict[str, Tensor],
    batch_size: int = batch_size,
    eval_characters: int = eval_characters,
) -> dict[str, float]:
    """Mean loss of each split over random batches, without dropout."""
    model.eval()
    losses = {}
    for split, ids in data.items():
        batches = range(0, eval_characters, batch_size * model.block_size)
        total = sum(model(*get_batch(ids, model.block_size, batch_size))[1].item() for _ in batches)
        losses[split] = total / len(batches)
    model.train()
    return losses


def train(
    model: BigramLangModel,
    data: dict[str, Tensor],
    batch_size: int = batch_size,
    epochs: int = epochs,
    lr: float = lr,
    eval_interval: int = eval_interval,
    eval_characters: int = eval_characters,
) -> None:
    """Gradient descent with AdamW: compute the loss, then move each weight to reduce it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    for step in range(epochs + 1):
        if step % eval_interval == 0 or step == epochs:
            loss = estimate_loss(model, data, batch_size, eval_characters)
            print(f"step {step:5}: train {loss['train']:.3f}, val {loss['val']:.3f}", flush=True)
        if step < epochs:
            optimizer.param_groups[0]["lr"] = lr * (1 - step / epochs)  # falls to 0
            _, batch_loss = model(*get_batch(data["train"], model.block_size, batch_size))
            optimizer.zero_grad()
            batch_loss.backward()  # the gradient of the loss with respect to each weight
            optimizer.step()


# --- The script --------------------------------------------------------------------------------


def read_text(path: Path | None = None) -> str:
    """Read a UTF-8 text file; by default tiny Shakespeare if downloaded, else Python's manual."""
    if path is None and not tiny_shakespeare().is_file():
        from pydoc_data.topics import topics

        print("no text found: using Python's reference manual instead", file=sys.stderr)
        return "\n".join(topics[name] for name in sorted(topics))
    path = path or tiny_shakespeare()
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        sys.exit(f"{path} is not UTF-8 text")
    except OSError as error:
        sys.exit(f"cannot read {path}: {error.strerror}")


def tiny_shakespeare() -> Path:
    """The file that `python -m chargpt fit` downloads tiny Shakespeare to."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.environ.get("CHARGPT_DATA_DIR") or os.path.join(cache, "chargpt")
    return Path(folder, "tiny-shakespeare", "input.txt").expanduser()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m chargpt.textbook", description="Train a GPT.")
    parser.add_argument(
        "text",
        nargs="?",
        type=Path,
        help="a UTF-8 text file (default: tiny Shakespeare if `chargpt fit` has downloaded it, "
        "otherwise Python's reference manual)",
    )
    parser.add_argument("--small", action="store_true", help="train for two minutes on two cores")
    options = parser.parse_args()
    torch.manual_seed(1337)
    text = read_text(options.text)
    sizes, training = (SMALL, SMALL_TRAINING) if options.small else ({}, {})
    needed = 10 * (sizes.get("block_size", block_size) + 1)  # a tenth holds a sequence and a target
    if len(text) < needed:
        sys.exit(f"the text has {len(text):,} characters; this size needs at least {needed:,}")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    _, itos, data = prepare(text)
    data = {split: ids.to(device) for split, ids in data.items()}
    model = BigramLangModel(len(itos), **sizes).to(device)
    V, parameters = len(itos), sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(text):,} characters, {V} distinct; guessing costs ln {V} = {math.log(V):.2f} nats")
    end = (
        "1.8 in two minutes"
        if options.small
        else "1.5, as in the lecture, after many hours (minutes on a GPU)"
    )
    print(f"{parameters:,} parameters; expected loss on tiny Shakespeare: from 4.17 to about {end}")
    train(model, data, **training)
    model.eval()  # no dropout during generation
    start = torch.zeros(1, 1, dtype=torch.long, device=device)  # in most texts, id 0 is the newline
    print(decode(model.generate(start, 500)[0].tolist(), itos))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)  # the conventional exit status after Ctrl-C
