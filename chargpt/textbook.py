"""A GPT in one file: data, model, training and generation. Read it from top to bottom.

    python -m chargpt.textbook --small                       # two minutes on two cores
    python -m chargpt.textbook --explain                     # one line of text, step by step
    python -m chargpt.textbook path/to/input.txt --small     # your own text

A language model predicts a probability for every possible next character, given the characters
before it. Training teaches it spelling, words and style, because all of them help to predict the
next character. To generate text, sample a character from these probabilities, append it, repeat.

Three names come from the lecture this script follows: `BigramLangModel` is the whole GPT (it grew
out of a bigram model), `epochs` counts training steps, and `n_embed` is `n_embd` everywhere else.

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

# --- Hyperparameters: chosen by hand; all other numbers are learned ----------------------------

block_size = 256  # T: maximum context length, in characters
batch_size = 64  # B: sequences per training step
epochs = 5000  # training steps (a true epoch would be one pass over the text)
lr = 3e-4  # learning rate: roughly how far one step moves each weight
n_embed = 384  # C: the size of the vector that represents each character
n_head = 6  # H
n_layer = 6  # number of transformer blocks
dropout = 0.2  # fraction of activations set to zero during training
eval_interval = 500  # steps between loss estimates
eval_characters = 50_000  # characters of each split per estimate

# Trains in two minutes on two CPU cores. A network this small can take larger steps, and it sees
# too little text to overfit, so it needs no dropout.
SMALL = dict(
    block_size=64, batch_size=16, epochs=1500, lr=3e-3, n_embed=128, n_head=4, n_layer=3, dropout=0
)

# --- Data --------------------------------------------------------------------------------------

# Set by `prepare` below, so that importing this file neither reads data nor trains.
stoi: dict[str, int] = {}  # character to id
itos: dict[int, str] = {}  # id to character
data: dict[str, Tensor] = {}  # "train": ids of the first 90 % of the text; "val": of the rest
model: "BigramLangModel"  # the network below


def encode(text: str) -> list[int]:
    return [stoi[character] for character in text]


def decode(ids: list[int]) -> str:
    return "".join(itos[i] for i in ids)


def get_batch(split: str) -> tuple[Tensor, Tensor]:
    """Random inputs and targets, (B, T) each; targets are the inputs shifted by one character.

    For the input "hell" the targets are "ello". Each row is T training examples: predict "e" from
    "h", "l" from "he", "l" from "hel", and so on.
    """
    ids = data[split]
    starts = torch.randint(len(ids) - block_size, (batch_size,))
    x = torch.stack([ids[i : i + block_size] for i in starts])
    y = torch.stack([ids[i + 1 : i + block_size + 1] for i in starts])
    return x, y


@torch.no_grad()
def estimate_loss() -> dict[str, float]:
    """Mean loss of each split over random batches, with dropout off.

    While both losses fall, the model is learning. If "val" rises while "train" keeps falling, it
    is overfitting: memorizing the training text.
    """
    model.eval()
    losses = {}
    for split in ("train", "val"):
        batches = range(0, eval_characters, batch_size * block_size)
        losses[split] = sum(model(*get_batch(split))[1].item() for _ in batches) / len(batches)
    model.train()
    return losses


# --- Model -------------------------------------------------------------------------------------


class Head(nn.Module):
    """One head of causal self-attention, (B, T, C) -> (B, T, D): softmax(Q K^T / sqrt(D)) V.

    Attention lets each position read from earlier positions. Every position projects its vector
    to a query (what am I looking for?), a key (what do I contain?) and a value (what do I pass
    on?). Where a query and a key point the same way, their dot product is large and the value gets
    a large weight. The three projections are learned.
    """

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
        # A dot product sums D terms, so its standard deviation grows like sqrt(D). Dividing by
        # sqrt(D) makes it independent of D. Large scores would saturate the softmax: nearly all
        # weight on one position, and nearly no gradient.
        scores = q @ k.transpose(1, 2) / math.sqrt(q.size(-1))  # (B, T, D) @ (B, D, T) -> (B, T, T)
        # Causal mask: no position attends to a later one. In training, all T predictions of a row
        # are made in one pass and the target of each is the next input. Without the mask the
        # network would copy it and learn nothing. In generation there are no later characters.
        future = torch.ones(T, T, device=x.device).triu(diagonal=1).bool()  # above the diagonal
        scores = scores.masked_fill(future, -math.inf)  # exp(-inf) is 0
        return scores.softmax(dim=-1)  # exp(score) / sum of exp(score): positive, sums to 1

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.weights(x)) @ self.value(x)  # (B, T, T) @ (B, T, D) -> (B, T, D)


class MultiHeadAttention(nn.Module):
    """Multi-head causal self-attention, (B, T, C) -> (B, T, C).

    A single softmax tends to focus on one place. Several heads can attend to the last letter, the
    start of the word and the speaker's name at once. The projection combines their outputs.
    """

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
    """A position-wise two-layer MLP, (B, T, C) -> (B, T, C): max(0, x W1 + b1) W2 + b2.

    Attention moves information between positions; the MLP processes it at each position. A hidden
    unit detects a pattern and adds a vector when it fires. Without the ReLU, the two matrices would
    collapse into one. The hidden layer is four times as wide by convention, which puts two thirds
    of a block's weights here.
    """

    def __init__(self, n_embed: int = n_embed, dropout: float = dropout) -> None:
        super().__init__()
        self.expansion = nn.Linear(n_embed, 4 * n_embed)
        self.projection = nn.Linear(4 * n_embed, n_embed)
        # Dropout zeroes a random fraction of its input and scales up the rest. Units cannot rely
        # on each other, which reduces overfitting. In eval mode it does nothing.
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.projection(torch.relu(self.expansion(x))))


class Block(nn.Module):
    """A pre-norm transformer block, (B, T, C) -> (B, T, C): attention, then feed-forward.

    Residual connections: each layer adds to x instead of replacing it. Information is preserved
    unless a layer changes it, and gradients reach every depth through the sum. Without them, three
    blocks learn nothing beyond character frequencies (chargpt/README.md, the ablation).

    LayerNorm normalizes each vector to mean 0 and variance 1, then applies a learned scale and
    shift, so layers see inputs of constant scale however much the residual stream has grown.
    Placed before each layer (pre-norm), it keeps the residual path purely additive.
    """

    def __init__(
        self, n_embed: int = n_embed, n_head: int = n_head, dropout: float = dropout
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(n_embed)
        self.attention = MultiHeadAttention(n_head, n_embed // n_head, n_embed, dropout)
        self.feed_forward_norm = nn.LayerNorm(n_embed)
        self.feed_forward = FeedForward(n_embed, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class BigramLangModel(nn.Module):
    """A GPT, ids (B, T) -> logits (B, T, V): a score for each possible next character.

    The lecture grows it from a bigram model, which predicts the next character from the current
    one alone. Remove everything between the token embedding and the head, and it is one again.
    """

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
        self.token_embedding = nn.Embedding(vocab_size, n_embed)  # one vector per character
        # A weighted sum ignores order, so each position has a learned vector too.
        self.position_embedding = nn.Embedding(block_size, n_embed)
        self.blocks = nn.Sequential(*[Block(n_embed, n_head, dropout) for _ in range(n_layer)])
        self.norm = nn.LayerNorm(n_embed)
        self.head = nn.Linear(n_embed, vocab_size)
        # PyTorch initializes weights at random, so that no two units learn the same function. The
        # head starts with small weights: logits near 0 give nearly uniform probabilities.
        nn.init.normal_(self.head.weight, std=0.002)
        nn.init.zeros_(self.head.bias)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, V) and, given targets (B, T), the cross-entropy loss in nats.

        Softmax turns logits into probabilities. The loss is the mean of -ln p over all positions,
        where p is the probability of the correct next character: 0 if certain and right, large if
        certain and wrong. Uniform guessing among 65 characters costs ln 65 = 4.17, where an
        untrained network starts. A loss of 1.5 nats (1.5 / ln 2 = 2.16 bits) is the uncertainty of
        choosing among e^1.5 = 4.5 equally likely characters.
        """
        positions = torch.arange(idx.size(1), device=idx.device)
        x = self.token_embedding(idx) + self.position_embedding(positions)  # (B, T, C)
        x = self.blocks(x)  # (B, T, C)
        logits = self.head(self.norm(x))  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # (B*T, V), (B*T,)

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int) -> Tensor:
        """Append sampled characters, (B, T) -> (B, T + max_new_tokens).

        The whole context is recomputed for each new character. Until the context is full this is
        redundant: attention is causal, so a new character changes no earlier key or value. The
        engine caches them (the KV cache, chargpt/model) and computes only the new position.
        """
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.block_size :])
            probabilities = logits[:, -1].softmax(dim=-1)  # of the last position, (B, V)
            sampled = torch.multinomial(probabilities, num_samples=1)  # (B, 1)
            idx = torch.cat((idx, sampled), dim=1)
        return idx


# --- Training ----------------------------------------------------------------------------------


def prepare(text: str, **sizes: float) -> None:
    """Set the globals of this script: hyperparameters given in `sizes`, vocabulary, data, model."""
    global stoi, itos, data, model
    globals().update(sizes)  # override the hyperparameters above
    needed = 10 * (block_size + 1)  # the validation tenth must hold one sequence and its targets
    if len(text) < needed:
        sys.exit(f"the text has {len(text):,} characters; this size needs at least {needed:,}")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    itos = dict(enumerate(sorted(set(text))))
    stoi = {character: i for i, character in itos.items()}
    ids = torch.tensor(encode(text), device=device)
    end = int(0.9 * len(ids))
    data = {"train": ids[:end], "val": ids[end:]}
    model = BigramLangModel(len(itos), block_size, n_embed, n_head, n_layer, dropout).to(device)


def train() -> None:
    """Gradient descent: compute the loss, then move each weight slightly to reduce it."""
    # AdamW keeps two moments per weight: m, the running mean of its gradient, and v, of the squared
    # gradient. The update is lr * m / sqrt(v): about lr where successive gradients agree, less
    # where they disagree. Their scale cancels, so weights with small gradients learn too. Weight
    # decay multiplies each weight by 1 - lr * 0.01 at every step, to keep it from growing
    # needlessly. It is decoupled (the W): applied to the weight directly, because as part of the
    # gradient it would be divided by sqrt(v) and barely affect weights with large gradients.
    # (This script decays every parameter, for brevity; the engine decays only matrices.)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    for step in range(epochs + 1):
        if step % eval_interval == 0 or step == epochs:
            losses = estimate_loss()
            train_loss, val_loss = losses["train"], losses["val"]
            print(f"step {step:5}: train {train_loss:.3f}, val {val_loss:.3f}", flush=True)
        if step < epochs:
            remaining = 1 - step / epochs
            optimizer.param_groups[0]["lr"] = lr * remaining  # large steps first, then smaller ones
            _, loss = model(*get_batch("train"))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def read_text(path: Path | None) -> str:
    """Read a UTF-8 text file; without a path, use the reference manual that ships with Python."""
    if path is None:
        from pydoc_data.topics import topics

        print("no text found: using Python's reference manual instead", file=sys.stderr)
        return "\n".join(topics[name] for name in sorted(topics))
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
    default = tiny_shakespeare()
    parser = argparse.ArgumentParser(prog="python -m chargpt.textbook", description="Train a GPT.")
    parser.add_argument(
        "text",
        nargs="?",
        type=Path,
        default=default if default.is_file() else None,
        help="a UTF-8 text file (default: tiny Shakespeare where `chargpt fit` has stored it, "
        "otherwise Python's reference manual)",
    )
    parser.add_argument("--small", action="store_true", help="train for two minutes on two cores")
    parser.add_argument("--explain", action="store_true", help="one line of text, step by step")
    options = parser.parse_args()
    torch.manual_seed(1337)
    text = read_text(options.text)
    if options.explain:
        from chargpt.textbook_walk import walk

        return walk(text)
    prepare(text, **(SMALL if options.small else {}))
    V, parameters = len(itos), sum(parameter.numel() for parameter in model.parameters())
    end = "1.8 in two minutes" if options.small else "1.5 in many hours (minutes on a GPU)"
    print(f"{len(text):,} characters, {V} distinct; guessing costs ln {V} = {math.log(V):.2f} nats")
    print(f"{parameters:,} parameters, {epochs:,} steps of {batch_size} x {block_size} characters")
    print(f"expected loss on tiny Shakespeare: from 4.17 to about {end}")
    train()
    model.eval()  # no dropout during generation
    start = torch.tensor([[0]], device=data["val"].device)  # in most texts, id 0 is the newline
    print(decode(model.generate(start, 500)[0].tolist()))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)  # the conventional exit status after Ctrl-C
