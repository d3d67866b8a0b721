"""Text generator: a network and its vocabulary together, text in, text out."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chargpt.checkpoints import build_network, read_checkpoint, resolve_checkpoint
from chargpt.generation import GenerationConfig, eval_mode, generate
from chargpt.model import GPT, UserError
from chargpt.vocabulary import Vocabulary

MAX_ROWS = 64  # texts in one batch: at the base size their KV cache takes 300 MB


class Score(NamedTuple):
    """The cross-entropy of a text."""

    nats: float  # per character
    bits: float  # per character
    losses: Tensor  # (N - 1,) nats, for each character but the first


class TextGenerator(nn.Module):
    """A GPT and its Vocabulary.

    `complete`, `stream` and `complete_all` take the fields of `GenerationConfig` by name. An empty
    prompt starts from a newline, or from the vocabulary's first character where it has no newline.

    Raises:
        UserError: the network and the vocabulary have different sizes; in the methods, a setting is
            invalid, or a character unknown.
    """

    def __init__(self, gpt: GPT, vocabulary: Vocabulary) -> None:
        super().__init__()
        size = gpt.token_embedding.num_embeddings
        if size != len(vocabulary):
            problem = f"the network has {size:,} characters, but the vocabulary {len(vocabulary):,}"
            raise UserError(f"{problem}\nuse the vocabulary that it was trained with")
        self.gpt = gpt
        self.vocabulary = vocabulary

    def complete(self, prompt: str = "", **settings: Any) -> str:
        """The prompt and its continuation."""
        return (prompt or self.opening) + "".join(self.stream(prompt, **settings))

    def stream(self, prompt: str = "", **settings: Any) -> Iterator[str]:
        """The continuation of the prompt, streamed while it is generated.

        A chunk is one character, or several where the first ones might have started a stop string.
        """
        chunks = self.write([prompt], GenerationConfig(**settings))
        return (text for _, text, _ in chunks if text)

    def complete_all(
        self, prompts: Sequence[str], num_samples: int = 1, **settings: Any
    ) -> list[list[str]]:
        """`num_samples` texts for each prompt, in batches; the first is that of `complete`."""
        prompts = [prompt or self.opening for prompt in prompts]
        texts = [prompt for prompt in prompts for _ in range(num_samples)]
        for row, text, _ in self.write(prompts, GenerationConfig(**settings), num_samples):
            texts[row] += text
        return [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]

    def write(
        self, prompts: Sequence[str], config: GenerationConfig, num_samples: int = 1
    ) -> Iterator[tuple[int, str, bool]]:
        """The continuations of several prompts, in chunks; invalid arguments raise at once.

        A chunk is the index of its text (prompt * num_samples + sample), new characters, and
        whether it is the last of this text, which may be empty.
        """
        if num_samples < 1:
            raise UserError(f"num_samples is {num_samples}; it must be at least 1")
        rows = [row for row in map(self.encode, prompts) for _ in range(num_samples)]
        samples = list(range(num_samples)) * len(prompts)
        stops = [self.encode(stop) for stop in config.stop_strings]
        characters = self.vocabulary.characters
        batches = (slice(start, start + MAX_ROWS) for start in range(0, len(rows), MAX_ROWS))
        return (
            (batch.start + row, "".join([characters[id] for id in ids]), last)
            for batch in batches
            for step in generate(self.gpt, rows[batch], config, samples[batch], stops)
            for row, ids, last in step
        )

    def encode(self, text: str) -> list[int]:
        """The ids of a text; an empty one stands for `opening`."""
        return self.vocabulary.encode(text or self.opening).tolist()

    @property
    def opening(self) -> str:
        """The prompt that replaces an empty one."""
        characters = self.vocabulary.characters
        return "\n" if "\n" in characters else characters[0]

    @torch.inference_mode()
    def score(self, text: str) -> Score:
        """The cross-entropy of a text, measured as in validation: in sequences of block_size."""
        if len(text) < 2:
            raise UserError("a text needs at least two characters to be scored")
        T = self.gpt.config.block_size
        ids = torch.tensor(self.encode(text), device=self.gpt.token_embedding.weight.device)
        parts = []
        with eval_mode(self.gpt):
            for inputs, targets in zip(ids[:-1].split(T), ids[1:].split(T)):
                logits = self.gpt(inputs[None])[0].float()
                parts.append(F.cross_entropy(logits, targets, reduction="none").cpu())
        losses = torch.cat(parts)
        nats = losses.double().mean().item()
        return Score(nats, nats / math.log(2), losses)


def load(path: str | Path | None = None) -> TextGenerator:
    """Load the TextGenerator of a checkpoint, on the CPU and in evaluation mode.

    `path` may be "last" or "best" (the default), of the newest run under ./lightning_logs. No code
    in the file is run.
    """
    path = resolve_checkpoint(path)
    return TextGenerator(*build_network(read_checkpoint(path), path)).eval()
