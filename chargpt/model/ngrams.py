"""Hashed n-gram embeddings: vectors for the last n characters, looked up in tables."""

import torch.nn.functional as F
from torch import Tensor, nn

FACTORS = (36313, 27191, 51749, 43987, 60493)  # of the hash; they spread similar n-grams


class NgramEmbedding(nn.Module):
    """Hashed n-gram embeddings, ids to (B, T, C): a vector for the last n ids of each position.

    What follows from a few letters alone is looked up, so attention need not compute it. There are
    more n-grams than rows: each is assigned to a row by a hash of its ids, and many share one (hash
    embeddings: Svenstrup et al. 2017, arXiv:1709.03933).
    """

    def __init__(self, ngrams: dict[int, int], n_embd: int, dropout: float) -> None:
        super().__init__()
        self.orders = sorted(ngrams)
        self.rows = [ngrams[n] for n in self.orders]
        self.offsets = [sum(self.rows[:i]) for i in range(len(self.rows))]
        self.dropout = dropout
        # All tables in one, one below the other: a single lookup is faster than several.
        self.table = nn.Embedding(sum(self.rows), n_embd)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, N - 1 + T) to vectors (B, T, C), with N the largest n.

        The first N - 1 ids are those before the T new ones, or 0s.
        """
        N = self.orders[-1]
        windows = ids.unfold(1, N, 1).flip(-1)  # (B, T, N): the id of a position, those before it
        # An n-gram's hash extends that of the n-gram one id shorter.
        hashes = (windows * ids.new_tensor(FACTORS[:N])).cumsum(-1)  # n = 1 to N
        hashes = hashes.index_select(-1, ids.new_tensor(self.orders) - 1)  # (B, T, tables)
        rows = hashes % ids.new_tensor(self.rows) + ids.new_tensor(self.offsets)
        vectors = self.table(rows)  # (B, T, tables, C)
        if self.training and self.dropout:  # of whole vectors
            vectors = F.dropout(vectors.new_ones(*rows.shape, 1), self.dropout) * vectors
        return vectors.sum(dim=-2)
