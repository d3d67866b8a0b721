"""Text generator: a network and its vocabulary together, text in, text out."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chargpt.checkpoints import network_of, read_checkpoint, resolve_checkpoint
from chargpt.generation import GenerationConfig, generate, inference_copy
from chargpt.model import GPT
from chargpt.vocabulary import Vocabulary

MAX_ROWS = 64  # texts in one batch: at the base size their KV cache takes 450 MB


class TextChunk(NamedTuple):
    """What is new of one of several texts. The last of each is marked, and may be empty."""

    row: int  # of the text: prompt * num_samples + sample
    text: str
    last: bool


class Score(NamedTuple):
    """How surprised a network is by a text."""

    nats: float  # per character
    bits: float  # per character
    losses: Tensor  # (N - 1,) nats, of each character but the first


class TextGenerator(nn.Module):
    """A GPT and its Vocabulary.

    `complete`, `stream` and `complete_all` take the fields of `GenerationConfig` by name. An empty
    prompt starts from a newline, or from the vocabulary's first character where it has no newline.

    They raise ValueError for a setting that means nothing and UnknownCharacterError (a ValueError
    too) for a prompt or stop string with a character that the network has never seen.
    """

    def __init__(self, gpt: GPT, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.gpt = gpt
        self.vocabulary = vocabulary

    def complete(self, prompt: str = "", **settings: Any) -> str:
        """The prompt and what follows it."""
        return (prompt or self.opening) + "".join(self.stream(prompt, **settings))

    def stream(self, prompt: str = "", **settings: Any) -> Iterator[str]:
        """What follows the prompt, in chunks as it is written: streaming.

        A chunk is a character, or several where the first ones might have begun a stop string.
        """
        chunks = self.write([prompt], GenerationConfig(**settings))
        return (chunk.text for chunk in chunks if chunk.text)

    def complete_all(
        self, prompts: Sequence[str], num_samples: int = 1, **settings: Any
    ) -> list[list[str]]:
        """`num_samples` texts for each prompt, written together, each as if it were alone.

        The first sample of a prompt is what `complete` gives.
        """
        prompts = [prompt or self.opening for prompt in prompts]
        texts = [prompt for prompt in prompts for _ in range(num_samples)]
        for chunk in self.write(prompts, GenerationConfig(**settings), num_samples):
            texts[chunk.row] += chunk.text
        return [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]

    def write(
        self, prompts: Sequence[str], config: GenerationConfig, num_samples: int = 1
    ) -> Iterator[TextChunk]:
        """What follows each prompt, several texts at a time: the one path that all the others take.

        Everything that can be wrong is found before the first character is written.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
        rows = [row for row in map(self.encode, prompts) for _ in range(num_samples)]
        samples = [sample for _ in prompts for sample in range(num_samples)]
        stops = [self.encode(stop) for stop in config.stop_strings]
        characters = self.vocabulary.characters

        # A generator of its own: what stands above is done now, and not at the first chunk.
        def chunks() -> Iterator[TextChunk]:
            for first in range(0, len(rows), MAX_ROWS):
                batch = slice(first, first + MAX_ROWS)
                steps = generate(self.gpt, rows[batch], config, samples[batch], stops)
                for row, ids, last in (chunk for step in steps for chunk in step):
                    yield TextChunk(first + row, "".join([characters[id] for id in ids]), last)

        return chunks()

    def encode(self, text: str) -> list[int]:
        """The ids of a text; of an empty one those of `opening`."""
        return self.vocabulary.encode(text or self.opening).tolist()

    @property
    def opening(self) -> str:
        """What an empty prompt stands for."""
        characters = self.vocabulary.characters
        return "\n" if "\n" in characters else characters[0]

    @torch.inference_mode()
    def score(self, text: str) -> Score:
        """How likely the network finds a text, measured as in validation.

        The text is cut into sequences of block_size, and every character but the first is predicted
        once, from those before it in its sequence.

        Raises:
            ValueError: fewer than two characters, or one that the network has never seen.
        """
        if len(text) < 2:
            raise ValueError("a text of fewer than two characters has none to predict")
        network = inference_copy(self.gpt)
        T = self.gpt.config.block_size
        ids = torch.tensor(self.encode(text), device=self.gpt.token_embedding.weight.device)
        parts = []
        for inputs, targets in zip(ids[:-1].split(T), ids[1:].split(T)):
            logits = network(inputs[None])[0].float()
            parts.append(F.cross_entropy(logits, targets, reduction="none").cpu())
        losses = torch.cat(parts)
        nats = losses.double().mean().item()
        return Score(nats, nats / math.log(2), losses)


def load(path: str | Path | None = None) -> TextGenerator:
    """Load the TextGenerator of a checkpoint, on the CPU and ready to write.

    Only tensors and plain values are read from the file; code in it is refused.

    Args:
        path: a checkpoint of `python -m chargpt fit`; "last" or "best" of the newest run under
            ./lightning_logs; the best unless given.

    Raises:
        CheckpointError: (a ValueError) there is no such checkpoint, or it cannot be used.
    """
    path = resolve_checkpoint(path)
    return TextGenerator(*network_of(read_checkpoint(path), path)).eval()
