"""From a text to batches of ids. In reading order:

corpus.py      finding a text: named texts, a file, a folder of .txt files
token_file.py  encoding it once into a memory-mapped file of ids
blocks.py      the datasets: which characters are read, in which order, on which rank
module.py      the LightningDataModule, which puts these together
"""

from chargpt.data.module import CharDataModule

__all__ = ["CharDataModule"]
