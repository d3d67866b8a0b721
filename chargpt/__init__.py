"""A character-level GPT from first principles, trained with PyTorch Lightning."""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

# The module of each public part. It is imported when it is first used: writing needs no Lightning.
MODULES = {
    "GPT": "chargpt.model",
    "GPTConfig": "chargpt.model",
    "KVCache": "chargpt.model",
    "Vocabulary": "chargpt.vocabulary",
    "GenerationConfig": "chargpt.generation",
    "TextGenerator": "chargpt.text_generator",
    "load": "chargpt.text_generator",
    "inspect": "chargpt.inspection",
    "CharDataModule": "chargpt.data",
    "GPTModule": "chargpt.training.module",
}

__all__ = list(MODULES)


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *MODULES]
