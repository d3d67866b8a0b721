"""From a text to batches of ids; in reading order: texts, token_file, datasets, module."""

from chargpt.data.module import CharDataModule

__all__ = ["CharDataModule"]
