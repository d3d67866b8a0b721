"""A network and its vocabulary together: text in, text out. No training code is needed to write."""

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chargpt.generation import Sampling, bare, generate
from chargpt.model import GPT
from chargpt.runs import CheckpointError, read_checkpoint, resolve_checkpoint
from chargpt.vocabulary import Vocabulary

MAX_ROWS = 64  # texts in one batch: at the base size they remember 300 MB of keys and values


@dataclass(frozen=True)
class Settings(Sampling):
    """What decides how a prompt goes on: the same settings, network and prompt give the same text.

    Args:
        max_new_chars: characters to write after the prompt, at most.
        stop: end before the first of these strings that is written after the prompt. On the command
            line a list, where \\n is a newline: '["\\n\\n", "THE END"]'.
        seed: of the random choices; another seed, another text.
        exact_window: past block_size characters, look at exactly the newest block_size, and read
            them all again for each character: slow. Otherwise the window falls to its newest half
            whenever it is full, and grows again from there.
    """

    max_new_chars: int = 500
    stop: list[str] | str | None = field(default_factory=list)  # a single string is a list of one
    seed: int = 0
    exact_window: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_chars < 0:
            raise ValueError(f"max_new_chars is {self.max_new_chars}; it must be at least 0")
        if "" in self.stops:
            raise ValueError("a stop string is empty; it would end every text before it begins")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class Piece(NamedTuple):
    """What is new of one of several texts. The last piece of each is marked, and may be empty."""

    index: int  # of the text: prompt * num_samples + sample
    text: str
    last: bool


class Score(NamedTuple):
    """How surprised a network is by a text."""

    nats: float  # per character
    bits: float  # per character
    losses: Tensor  # (N - 1,) nats, of each character but the first


class Writer(nn.Module):
    """A GPT and its Vocabulary.

    `complete`, `stream`, `complete_all` and `write` take the fields of `Settings` by name:
    max_new_chars, temperature, top_k, top_p, stop, seed, exact_window. An empty prompt starts from a
    newline, or from the vocabulary's first character where it has no newline. `Settings`
    says what each of them does, and what happens past block_size characters.

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
        """What follows the prompt, piece by piece as it is written.

        A piece is a character, or several where the first ones might have begun a stop string.
        """
        return (piece.text for piece in self.write([prompt], Settings(**settings)) if piece.text)

    def complete_all(
        self, prompts: Sequence[str], num_samples: int = 1, **settings: Any
    ) -> list[list[str]]:
        """`num_samples` texts for each prompt, written together, each as if it were alone.

        The first sample of a prompt is what `complete` gives.
        """
        prompts = [prompt or self.opening for prompt in prompts]
        texts = [[prompt] for prompt in prompts for _ in range(num_samples)]
        for piece in self.write(prompts, Settings(**settings), num_samples):
            texts[piece.index].append(piece.text)
        texts = ["".join(pieces) for pieces in texts]
        return [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]

    def write(
        self, prompts: Sequence[str], settings: Settings = Settings(), num_samples: int = 1
    ) -> Iterator[Piece]:
        """What follows each prompt, several texts at a time: the one path that all the others take.

        Everything that can be wrong is found before the first character is written.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
        rows = [row for row in map(self.encode, prompts) for _ in range(num_samples)]
        seeds = [f"{settings.seed}/{sample}" for _ in prompts for sample in range(num_samples)]
        stops = [self.encode(stop) for stop in settings.stops]
        return self._write(rows, seeds, stops, settings)

    def _write(
        self, rows: list[list[int]], seeds: list[str], stops: list[list[int]], settings: Settings
    ) -> Iterator[Piece]:
        characters = self.vocabulary.characters
        for first in range(0, len(rows), MAX_ROWS):
            batch = slice(first, first + MAX_ROWS)
            steps = generate(
                self.gpt,
                rows[batch],
                seeds[batch],
                settings.max_new_chars,
                settings,
                stops,
                settings.exact_window,
            )
            for index, ids, last in (piece for pieces in steps for piece in pieces):
                yield Piece(first + index, "".join([characters[id] for id in ids]), last)

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

        The text is cut into blocks of block_size, and every character but the first is predicted
        once, from those before it in its block.

        Raises:
            ValueError: fewer than two characters, or one that the network has never seen.
        """
        if len(text) < 2:
            raise ValueError("a text of fewer than two characters has none to predict")
        gpt, block_size = self.gpt, self.gpt.block_size
        device = gpt.token_embedding.weight.device
        ids = torch.tensor(self.encode(text), device=device)
        inputs, targets = ids[:-1], ids[1:]
        whole = len(inputs) // block_size * block_size  # the rest is a shorter block of its own
        batches = [
            *zip(
                inputs[:whole].view(-1, block_size).split(MAX_ROWS),
                targets[:whole].view(-1, block_size).split(MAX_ROWS),
            ),
            (inputs[None, whole:], targets[None, whole:]),
        ]
        network, losses = bare(gpt), []
        for x, y in (batch for batch in batches if batch[0].numel()):
            logits = network(x).flatten(0, 1).float()
            losses.append(F.cross_entropy(logits, y.flatten(), reduction="none").cpu())
        losses = torch.cat(losses)
        nats = losses.double().mean().item()
        return Score(nats, nats / math.log(2), losses)


def load(path: str | Path | None = None) -> Writer:
    """The Writer of a checkpoint, on the CPU and ready to write.

    Only tensors and plain values are read from the file; code in it is refused.

    Args:
        path: a checkpoint of `python -m chargpt fit`; "last" or "best" of the newest run under
            ./lightning_logs; the best unless given.

    Raises:
        CheckpointError: (a ValueError) there is no such checkpoint, or it cannot be used.
    """
    path = resolve_checkpoint(path)
    return from_checkpoint(read_checkpoint(path), path)


def from_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> Writer:
    """The Writer of a checkpoint that has been read.

    Raises:
        CheckpointError: its weights, settings and vocabulary do not fit each other.
    """
    hyper_parameters = checkpoint["hyper_parameters"]
    state = checkpoint["state_dict"]
    try:
        vocabulary = Vocabulary(checkpoint["vocabulary"])
        names = inspect.signature(GPT).parameters.keys() & hyper_parameters.keys() - {"vocab_size"}
        with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced at once
            gpt = GPT(len(vocabulary), **{name: hyper_parameters[name] for name in names})
        prefix = "gpt."
        weights = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
        gpt.load_state_dict(weights)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not fit this version of chargpt: {str(error).splitlines()[0]}\n"
            "take another checkpoint, or train anew"
        ) from error
    return Writer(gpt, vocabulary).eval()
