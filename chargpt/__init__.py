"""A character-level GPT from first principles, trained with PyTorch Lightning."""

from chargpt.model import GPT

__all__ = ["GPT"]
