"""A GPT in one file: the text, the network, the training, the writing. Read it from top to bottom.

    python -m chargpt.textbook path/to/input.txt --small    # two minutes on two cores
    python -m chargpt.textbook path/to/input.txt --explain  # one line of text, step by step

A language model gives every possible next character a probability, from the characters before
it. Trained on a text it learns spelling, words and manner, because all of them help to guess
what comes next; to write is to draw a character by its probability, append it and ask again.

    B  sequences in a batch         V  different characters, the vocabulary
    T  characters in a sequence     H  attention heads
    C  channels (n_embed)           D  channels of one head (C / H)
"""

import argparse
import math
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --- Hyperparameters: what somebody has to choose; all other numbers are learned ---------------

block_size = 256  # T: the most characters that the network looks at, its context
batch_size = 64  # B: sequences that one step learns from
epochs = 5000  # training steps (a true epoch would be once through the text)
lr = 3e-4  # learning rate: about how far one step moves each weight
n_embed = 384  # C: numbers that stand for one character while it passes through the network
n_head = 6  # H
n_layer = 6  # blocks, one after the other
dropout = 0.2  # share of activations set to zero while training
eval_interval = 500  # steps between two looks at the loss
eval_characters = 50_000  # of each split, for each look

# What two processor cores train in two minutes. So small a network takes larger steps, and reads
# too little to learn anything by heart: no dropout.
SMALL = dict(
    block_size=64, batch_size=16, epochs=1500, lr=3e-3, n_embed=128, n_head=4, n_layer=3, dropout=0
)

# --- The text ----------------------------------------------------------------------------------

# Set by `prepare` below, so that importing this file reads no text and trains nothing.
stoi: dict[str, int] = {}  # character to id
itos: dict[int, str] = {}  # id to character
data: dict[str, Tensor] = {}  # "train": ids of nine tenths of the text; "val": of the rest
model: "BigramLangModel"  # the network below


def encode(text: str) -> list[int]:
    return [stoi[character] for character in text]


def decode(ids: list[int]) -> str:
    return "".join(itos[i] for i in ids)


def get_batch(split: str) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (B, T) each: random pieces of the text, and the same one character later.

    With the input "hell" the targets are "ello". One row asks T questions: what follows "h", what
    follows "he", what follows "hel", and so on.
    """
    ids = data[split]
    starts = torch.randint(len(ids) - block_size, (batch_size,))
    x = torch.stack([ids[i : i + block_size] for i in starts])
    y = torch.stack([ids[i + 1 : i + block_size + 1] for i in starts])
    return x, y


@torch.no_grad()
def estimate_loss() -> dict[str, float]:
    """Mean loss of each split over some random batches, without dropout.

    While both fall, the model learns. When "val" rises and "train" still falls, it overfits: it
    learns the text by heart.
    """
    model.eval()
    losses = {}
    for split in ("train", "val"):
        batches = range(0, eval_characters, batch_size * block_size)
        losses[split] = sum(model(*get_batch(split))[1].item() for _ in batches) / len(batches)
    model.train()
    return losses


# --- The network -------------------------------------------------------------------------------


class Head(nn.Module):
    """One head of causal self-attention, (B, T, C) to (B, T, D): softmax(Q K^T / sqrt(D)) V.

    Attention lets characters look things up in those before them. From its vector each makes
    three: a query (what am I looking for?), a key (what can I be found by?) and a value (what do I
    tell those who find me?). Where query and key point the same way their dot product is large,
    and much of that value is taken. What is worth asking is learned.
    """

    def __init__(self, head_size: int, n_embed: int = n_embed, dropout: float = dropout) -> None:
        super().__init__()
        self.query = nn.Linear(n_embed, head_size, bias=False)
        self.key = nn.Linear(n_embed, head_size, bias=False)
        self.value = nn.Linear(n_embed, head_size, bias=False)
        self.dropout = nn.Dropout(dropout)

    def weights(self, x: Tensor) -> Tensor:
        """How much position t (row) takes from position s (column), (B, T, T); a row sums to 1."""
        T = x.size(1)
        q, k = self.query(x), self.key(x)  # (B, T, D)
        # A dot product adds D products, so it spreads like sqrt(D) for vectors of ordinary numbers.
        # Divided by that it stays around 1. Else softmax would give nearly all weight to a single
        # position from the start, and where softmax is that sure no gradient comes through.
        scores = q @ k.transpose(1, 2) / math.sqrt(q.size(-1))  # (B, T, D) @ (B, D, T) -> (B, T, T)
        # The causal mask: no position sees a later one. In training all T questions of a row are
        # answered in one pass, and the answer to each stands one place to its right: unmasked, the
        # network would copy it and learn nothing. In writing the future does not exist yet.
        future = torch.ones(T, T, device=x.device).triu(diagonal=1).bool()  # above the diagonal
        scores = scores.masked_fill(future, -math.inf)  # e to the minus infinity is 0
        return scores.softmax(dim=-1)  # e^score / sum of e^score: positive, together 1

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.weights(x)) @ self.value(x)  # (B, T, T) @ (B, T, D) -> (B, T, D)


class MultiHeadAttention(nn.Module):
    """Several heads side by side, (B, T, C) to (B, T, C).

    One softmax makes one choice. Several can look at the last letter, the word's beginning and the
    speaker's name at once; the projection mixes what they bring.
    """

    def __init__(
        self, n_head: int, head_size: int, n_embed: int = n_embed, dropout: float = dropout
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(head_size, n_embed, dropout) for _ in range(n_head))
        self.projection = nn.Linear(n_head * head_size, n_embed)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([head(x) for head in self.heads], dim=-1)  # H times (B, T, D) -> (B, T, C)
        return self.dropout(self.projection(x))


class FeedForward(nn.Module):
    """A two-layer perceptron on each position by itself, (B, T, C) to (B, T, C): max(0, x W1) W2.

    Attention moves information, this works on it: each hidden unit notices a pattern and, when it
    does, adds something. Without the ReLU between them two matrices would be no more than one.
    Four times as wide: there are more patterns than channels, and two thirds of the weights of a
    block here has proved a good share; no law says four.
    """

    def __init__(self, n_embed: int = n_embed, dropout: float = dropout) -> None:
        super().__init__()
        self.expansion = nn.Linear(n_embed, 4 * n_embed)
        self.projection = nn.Linear(4 * n_embed, n_embed)
        # Dropout sets a random share of its input to 0 and scales up the rest. No unit can count on
        # another, so a text is harder to learn by heart. In evaluation it does nothing.
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.projection(torch.relu(self.expansion(x))))


class Block(nn.Module):
    """A pre-norm transformer block, (B, T, C) to (B, T, C): first look around, then think.

    Residual connections: a layer adds to x instead of replacing it, so what is known stays unless
    a layer changes it, and the gradient of a sum reaches every depth undiminished. Without them
    three blocks learn no more than how frequent each character is (chargpt/README.md, the ladder).

    LayerNorm: brings each vector to mean 0 and variance 1, then to a learned scale and shift, so
    that a layer sees numbers of one size however much has been added up. Before the layer
    (pre-norm) it leaves the path of the sum itself free; after the sum it would stand in it.
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
    """A GPT: ids (B, T) to logits (B, T, V), a score for each possible next character.

    It grew, in the lecture and in our ladder, from a table that knows only which character tends
    to follow which: a bigram model. Take everything between embedding and head away, and it is one.
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
        self.token_embedding = nn.Embedding(vocab_size, n_embed)  # a vector for each character
        # A weighted sum does not know what stood where, so each place has a vector too.
        self.position_embedding = nn.Embedding(block_size, n_embed)
        self.blocks = nn.Sequential(*[Block(n_embed, n_head, dropout) for _ in range(n_layer)])
        self.norm = nn.LayerNorm(n_embed)
        self.head = nn.Linear(n_embed, vocab_size)
        # PyTorch draws weights at random, so that no two units learn the same, and so large that
        # numbers keep their size from layer to layer. But the scores start near 0: no opinion yet.
        nn.init.normal_(self.head.weight, std=0.002)
        nn.init.zeros_(self.head.bias)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, V) and, where there are targets (B, T), the cross-entropy in nats.

        Softmax makes probabilities of logits. The loss is the mean of -ln p over all positions, p
        being what was given to the character that truly came: 0 if sure and right, large if sure
        and wrong. A guess among 65 costs ln 65 = 4.17, where an untrained network starts. A loss
        of 1.5 nats (1.5 / ln 2 = 2.16 bits) is the doubt of choosing among e^1.5 = 4.5 equally
        likely characters.
        """
        places = torch.arange(idx.size(1), device=idx.device)
        x = self.token_embedding(idx) + self.position_embedding(places)  # (B, T, C)
        x = self.blocks(x)  # (B, T, C)
        logits = self.head(self.norm(x))  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # (B T, V), (B T,)

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int) -> Tensor:
        """Append characters drawn by their probabilities, (B, T) to (B, T + max_new_tokens).

        All that is in sight is computed anew for each. Until the window is full it need not be: no
        position looks ahead, so a new character changes no earlier key or value. An engine keeps
        them (the KV cache in chargpt/model.py) and computes those of the new character alone.
        """
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.block_size :])
            probabilities = logits[:, -1].softmax(dim=-1)  # of the last position, (B, V)
            drawn = torch.multinomial(probabilities, num_samples=1)  # (B, 1)
            idx = torch.cat((idx, drawn), dim=1)
        return idx


# --- Training ----------------------------------------------------------------------------------


def prepare(text: str, **sizes: float) -> None:
    """Set what a script would set at its top: other sizes, vocabulary, data, model."""
    global stoi, itos, data, model
    globals().update(sizes)  # as if the numbers at the top had been others
    needed = 10 * (block_size + 1)  # so that a tenth holds one context and its targets
    if len(text) < needed:
        sys.exit(f"the text has {len(text):,} characters; at this size it needs {needed:,}")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    itos = dict(enumerate(sorted(set(text))))
    stoi = {character: i for i, character in itos.items()}
    ids = torch.tensor(encode(text), device=device)
    end = int(0.9 * len(ids))
    data = {"train": ids[:end], "val": ids[end:]}
    model = BigramLangModel(len(itos), block_size, n_embed, n_head, n_layer, dropout).to(device)


def train() -> None:
    """Gradient descent: predict, take the loss, and move each weight a little to where it falls."""
    # AdamW keeps two moments for each weight: m, the running mean of its gradient, and v, of the
    # gradient squared. It moves the weight by lr * m / sqrt(v): by about lr where the gradients
    # agree, by less where they contradict each other, and their size cancels, so that what is used
    # rarely learns too. Weight decay draws each weight to 0 by lr * 0.01 of itself, lest it grow
    # without need. Decoupled (the W): beside that step, not inside the gradient, where dividing
    # by sqrt(v) would decay the weights with the largest gradients least.
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    for step in range(epochs + 1):
        if step % eval_interval == 0 or step == epochs:
            losses = estimate_loss()
            train_loss, val_loss = losses["train"], losses["val"]
            print(f"step {step:5}: train {train_loss:.3f}, val {val_loss:.3f}", flush=True)
        if step < epochs:
            left = 1 - step / epochs
            optimizer.param_groups[0]["lr"] = lr * left  # large steps at first, then finer ones
            _, loss = model(*get_batch("train"))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def read_text(path: Path | None) -> str:
    """The text of a file, or of the manual that comes with every Python."""
    if path is None:
        from pydoc_data.topics import topics

        print("no text given: taking Python's own manual", file=sys.stderr)
        return "\n".join(topics[name] for name in sorted(topics))
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        sys.exit(f"{path} is not UTF-8 text")
    except OSError as error:
        sys.exit(f"{path} can't be read: {error.strerror}")


def main() -> None:
    named = Path(os.environ.get("CHARGPT_DATA_DIR", "."), "tiny-shakespeare", "input.txt")
    parser = argparse.ArgumentParser(prog="python -m chargpt.textbook", description="Train a GPT.")
    parser.add_argument("text", nargs="?", type=Path, default=named if named.exists() else None)
    parser.add_argument("--small", action="store_true", help="two minutes on two processor cores")
    parser.add_argument("--explain", action="store_true", help="one line of text, step by step")
    options = parser.parse_args()
    torch.manual_seed(1337)
    text = read_text(options.text)
    if options.explain:
        from chargpt.textbook_walk import walk

        return walk(text)
    prepare(text, **(SMALL if options.small else {}))
    V, parameters = len(itos), sum(parameter.numel() for parameter in model.parameters())
    ends = "1.8 in two minutes" if options.small else "1.5 after many hours, or minutes on a GPU"
    print(f"{len(text):,} characters, {V} different: a guess costs ln {V} = {math.log(V):.2f} nats")
    print(f"{parameters:,} parameters, {epochs:,} steps of {batch_size} x {block_size} characters")
    print(f"what to expect: tiny Shakespeare begins at 4.17 and ends near {ends}")
    train()
    model.eval()  # no dropout while writing
    start = torch.tensor([[0]], device=data["val"].device)  # of most texts, id 0 is the line's end
    print(decode(model.generate(start, 500)[0].tolist()))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)  # the status of a command that Ctrl-C ended
