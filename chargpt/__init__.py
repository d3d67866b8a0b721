"""A character-level GPT from first principles, trained with PyTorch Lightning."""

from importlib import import_module
from typing import Any

__version__ = "0.3.0"

# The module of each public name, imported on first use: generating text needs no Lightning.
MODULES = dict.fromkeys(("GPT", "GPTConfig", "KVCache", "UserError"), "chargpt.model") | {
    "Vocabulary": "chargpt.vocabulary",
    "GenerationConfig": "chargpt.generation",
    "TextGenerator": "chargpt.text_generator",
    "load": "chargpt.text_generator",
    "save": "chargpt.checkpoints",
    "inspect": "chargpt.inspection",
    "CharDataModule": "chargpt.data",
    "GPTModule": "chargpt.training",
    "make_trainer": "chargpt.training",
}

__all__ = list(MODULES)


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *MODULES]
