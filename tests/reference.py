"""A slow and plain reference implementation of the network and of greedy decoding.

Head by head, with an explicit mask and softmax, every norm, activation and rotation written out, and
no code shared with the package. Decoding recomputes the whole window for each character.
"""

import math
from dataclasses import asdict

import torch
from torch import Tensor, nn


class Norm(nn.Module):
    def __init__(self, n_embd: int, plain: bool) -> None:
        super().__init__()
        self.weight = None if plain else nn.Parameter(torch.ones(n_embd))
        self.bias = None if plain else nn.Parameter(torch.zeros(n_embd))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-5)
        return x if self.weight is None else x * self.weight + self.bias


def rotate(x: Tensor) -> Tensor:
    """(B, T, D): channels 2i and 2i + 1 are a point in the plane, rotated by t * 10,000^(-2i / D)."""
    T, D = x.shape[1:]
    angles = [[t * 10_000 ** (-i / D) for i in range(0, D, 2)] for t in range(T)]
    cos = torch.tensor([[math.cos(angle) for angle in row] for row in angles]).to(x.dtype)
    sin = torch.tensor([[math.sin(angle) for angle in row] for row in angles]).to(x.dtype)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


class Head(nn.Module):
    def __init__(self, n_embd: int, head_size: int, rotary: bool, bias: bool) -> None:
        super().__init__()
        self.rotary = rotary
        self.query = nn.Linear(n_embd, head_size, bias)
        self.key = nn.Linear(n_embd, head_size, bias)
        self.value = nn.Linear(n_embd, head_size, bias)

    def forward(self, x: Tensor) -> Tensor:
        T = x.size(1)
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.rotary:
            q, k = rotate(q), rotate(k)
        scores = q @ k.transpose(1, 2) / math.sqrt(q.size(-1))
        future = torch.ones(T, T).triu(diagonal=1).bool()
        scores = scores.masked_fill(future, -math.inf)
        weights = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
        return weights / weights.sum(dim=-1, keepdim=True) @ v


def activate(x: Tensor, activation: str) -> Tensor:
    positive = torch.where(x > 0, x, torch.zeros_like(x))
    gelu = x * (1 + torch.erf(x / math.sqrt(2))) / 2
    return {"relu": positive, "gelu": gelu, "relu2": positive**2}[activation]


class Block(nn.Module):
    def __init__(self, n_embd, n_head, rotary, plain, bias, qkv_bias, activation) -> None:
        super().__init__()
        self.activation = activation
        self.attention_norm = Norm(n_embd, plain)
        self.heads = nn.ModuleList(
            Head(n_embd, n_embd // n_head, rotary, qkv_bias) for _ in range(n_head)
        )
        self.projection = nn.Linear(n_embd, n_embd, bias)
        self.feed_forward_norm = Norm(n_embd, plain)
        self.up = nn.Linear(n_embd, 4 * n_embd, bias)
        self.down = nn.Linear(4 * n_embd, n_embd, bias)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        x = x + self.projection(torch.cat([head(normed) for head in self.heads], dim=-1))
        return x + self.down(activate(self.up(self.feed_forward_norm(x)), self.activation))


class Reference(nn.Module):
    """A GPT with the settings of `chargpt.GPTConfig`, without dropout."""

    def __init__(
        self, vocab_size, block_size, n_embd, n_head, n_layer, position, norm, bias, qkv_bias,
        activation, ngrams, **_,
    ) -> None:  # fmt: skip
        super().__init__()
        plain, rotary = norm == "plain", position == "rotary"
        self.block_size = block_size
        self.token_embedding = nn.Embedding(vocab_size, n_embd)
        self.position_embedding = None if rotary else nn.Embedding(block_size, n_embd)
        self.ngrams = ngrams or {}
        self.table = nn.Embedding(sum(ngrams.values()), n_embd) if ngrams else None
        self.embedding_norm = Norm(n_embd, plain=True) if plain else None
        self.blocks = nn.ModuleList(
            Block(n_embd, n_head, rotary, plain, bias, qkv_bias, activation) for _ in range(n_layer)
        )
        self.norm = Norm(n_embd, plain)
        self.output = nn.Linear(n_embd, vocab_size, bias)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token_embedding(ids)
        if self.position_embedding is not None:
            x = x + self.position_embedding.weight[: ids.size(1)]
        if self.table is not None:
            x = x + self.ngram_vectors(ids)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        for block in self.blocks:
            x = block(x)
        return self.output(self.norm(x))

    def ngram_vectors(self, ids: Tensor) -> Tensor:
        """Ids before the first one count as 0."""
        tables = dict(zip(self.ngrams, self.table.weight.split(list(self.ngrams.values()))))
        vectors = []
        for text in ids.tolist():
            for end in range(1, len(text) + 1):
                fifth, fourth, third, second, last = ([0] * 4 + text)[end - 1 : end + 4]
                hashes = {
                    2: 36313 * last + 27191 * second,
                    3: 36313 * last + 27191 * second + 51749 * third,
                    4: 36313 * last + 27191 * second + 51749 * third + 43987 * fourth,
                    5: 36313 * last + 27191 * second + 51749 * third + 43987 * fourth
                    + 60493 * fifth,
                }  # fmt: skip
                vectors.append(sum(rows[hashes[n] % len(rows)] for n, rows in tables.items()))
        return torch.stack(vectors).view(*ids.shape, -1)


def named_as_in_gpt(reference: Reference) -> dict[str, list[nn.Parameter]]:
    """The parameters that each parameter of `chargpt.GPT` consists of, one after another."""
    names: dict[str, list[nn.Parameter]] = {}
    added: set[nn.Parameter] = set()

    def add(prefix: str, module: nn.Module | None) -> None:
        for name, parameter in () if module is None else module.named_parameters():
            if parameter not in added:  # a tied one has its first name
                added.add(parameter)
                names[f"{prefix}.{name}"] = [parameter]

    add("token_embedding", reference.token_embedding)
    add("position_embedding", reference.position_embedding)
    add("ngram_embedding.table", reference.table)
    for i, block in enumerate(reference.blocks):
        add(f"blocks.{i}.attention_norm", block.attention_norm)
        parts = [head.query for head in block.heads]
        parts += [head.key for head in block.heads] + [head.value for head in block.heads]
        names[f"blocks.{i}.attention.qkv.weight"] = [part.weight for part in parts]
        if parts[0].bias is not None:
            names[f"blocks.{i}.attention.qkv.bias"] = [part.bias for part in parts]
        add(f"blocks.{i}.attention.projection", block.projection)
        add(f"blocks.{i}.feed_forward_norm", block.feed_forward_norm)
        add(f"blocks.{i}.feed_forward.expansion", block.up)
        add(f"blocks.{i}.feed_forward.projection", block.down)
    add("norm", reference.norm)
    add("head", reference.output)
    return names


@torch.no_grad()
def reference_of(gpt: nn.Module) -> Reference:
    """A Reference with the settings and weights of a `chargpt.GPT`."""
    embedding = gpt.token_embedding.weight
    reference = Reference(vocab_size=len(embedding), **asdict(gpt.config)).to(embedding.dtype)
    names, weights = named_as_in_gpt(reference), dict(gpt.named_parameters())
    assert names.keys() == weights.keys()
    for name, parts in names.items():
        numbers = weights[name].flatten().split([part.numel() for part in parts])
        for part, values in zip(parts, numbers):
            part.copy_(values.view_as(part))
    return reference


def window_by_the_rule(ids: list[int], block_size: int) -> list[int]:
    """Character by character: a window that exceeds block_size is cut to its newest half."""
    window = []
    for id in ids:
        window.append(id)
        if len(window) > block_size:
            window = window[-math.ceil(block_size / 2) :]
    return window


@torch.no_grad()
def decode_greedily(network: nn.Module, prompt: list[int], n: int) -> list[int]:
    """The prompt and n greedily decoded ids, the whole window recomputed for each."""
    ids = list(prompt)
    for _ in range(n):
        window = window_by_the_rule(ids, network.block_size)
        ids.append(int(network(torch.tensor([window]))[0, -1].argmax()))
    return ids
