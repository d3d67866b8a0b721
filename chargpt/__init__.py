"""A character-level GPT from first principles, trained with PyTorch Lightning."""

from importlib import import_module
from typing import Any

# Where the parts live. Each is imported when it is first used: writing needs no Lightning.
HOMES = {
    "GPT": "chargpt.model",
    "Vocabulary": "chargpt.vocabulary",
    "CharDataModule": "chargpt.data",
    "GPTModule": "chargpt.module",
    "load": "chargpt.writer",
}

__all__ = list(HOMES)


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *HOMES]
