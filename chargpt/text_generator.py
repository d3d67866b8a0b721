"""Text generator: a network and its vocabulary together, text in, text out."""

import math
import re
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

    `complete`, `stream` and `complete_all` take the fields of `GenerationConfig` by name.

    Raises:
        UserError: the sizes of network and vocabulary differ; in the methods, a setting is invalid,
            or a character is unknown.
    """

    def __init__(self, gpt: GPT, vocabulary: Vocabulary) -> None:
        super().__init__()
        V = gpt.token_embedding.num_embeddings
        if len(vocabulary) != V:
            raise UserError(f"the network has {V} characters, but the vocabulary {len(vocabulary)}")
        self.gpt = gpt
        self.vocabulary = vocabulary

    def complete(self, prompt: str = "", **settings: Any) -> str:
        """The prompt and its continuation."""
        return (prompt or self.opening) + "".join(self.stream(prompt, **settings))

    def stream(self, prompt: str = "", **settings: Any) -> Iterator[str]:
        """The continuation, character by character as it is generated.

        With stop strings, output lags by up to n - 1 characters, n being the length of the longest.
        """
        chunks = self.write([prompt], GenerationConfig(**settings))
        return (text for _, text, _ in chunks if text)

    def complete_all(
        self, prompts: Sequence[str], num_samples: int = 1, **settings: Any
    ) -> list[list[str]]:
        """`num_samples` texts for each prompt, in batches; the first is what `complete` returns."""
        prompts = [prompt or self.opening for prompt in prompts]
        texts = [prompt for prompt in prompts for _ in range(num_samples)]
        for row, text, _ in self.write(prompts, GenerationConfig(**settings), num_samples):
            texts[row] += text
        return [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]

    def write(
        self, prompts: Sequence[str], config: GenerationConfig, num_samples: int = 1
    ) -> Iterator[tuple[int, str, bool]]:
        """The continuations of several prompts, in chunks; invalid arguments raise at once.

        A chunk is the index of its text (prompt * num_samples + sample), its new characters
        (perhaps none in the last chunk), and whether it is the last chunk of its text.
        """
        if num_samples < 1:
            raise UserError(f"num_samples is {num_samples}; it must be at least 1")
        rows = [row for row in map(self.encode, prompts) for _ in range(num_samples)]
        samples = list(range(num_samples)) * len(prompts)
        stops, characters = config.stop_strings, self.vocabulary.characters
        if "\r" in characters:  # of a text with CR LF line endings
            stops += [re.sub("\r?\n", "\r\n", stop) for stop in stops]
        stop_ids = [self.encode(stop) for stop in stops]
        batches = (slice(start, start + MAX_ROWS) for start in range(0, len(rows), MAX_ROWS))
        return (
            (batch.start + row, "".join([characters[id] for id in ids]), last)
            for batch in batches
            for step in generate(self.gpt, rows[batch], config, samples[batch], stop_ids)
            for row, ids, last in step
        )

    def encode(self, text: str) -> list[int]:
        """The ids of a text; those of `opening` for an empty one."""
        return self.vocabulary.encode(text or self.opening).tolist()

    @property
    def opening(self) -> str:
        """What replaces an empty prompt: a newline, or else the vocabulary's first character."""
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
    """Load a checkpoint onto the CPU, in evaluation mode; no code in the file is run.

    `path` is a file, or "best" (the default) or "last" for that checkpoint of the newest run under
    ./lightning_logs.
    """
    path = resolve_checkpoint(path)
    return TextGenerator(*build_network(read_checkpoint(path), path)).eval()
