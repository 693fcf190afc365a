"""Tokenised rows, and the batches a client sees in a round."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Examples:
    """Tokenised rows of unequal length in flat arrays.

    Attributes:
        tokens: int32 (sum of lengths,).
        offsets: int64 (rows + 1,); row i is ``tokens[offsets[i]:offsets[i + 1]]``.
        labels: int64 (rows,) class numbers.
        pad_id: the tokenizer's padding token.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    pad_id: int

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int]], labels: np.ndarray, pad_id: int):
        """Packs tokenizer output."""
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        tokens = np.fromiter((t for row in rows for t in row), np.int32, int(offsets[-1]))
        return cls(tokens, offsets, np.asarray(labels, np.int64), pad_id)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per row."""
        return np.diff(self.offsets)

    def batch(self, rows: np.ndarray) -> Batch:
        """Rows padded on the right: input_ids and attention_mask (B, L), labels (B,)."""
        lengths = self.lengths[rows]
        ids = np.full((len(rows), int(lengths.max())), self.pad_id, np.int64)
        for i, row in enumerate(rows):
            ids[i, : lengths[i]] = self.tokens[self.offsets[row] : self.offsets[row + 1]]
        mask = np.arange(ids.shape[1])[None] < lengths[:, None]
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
            "labels": torch.from_numpy(self.labels[rows]),
        }


def by_length(rows: np.ndarray, lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Cuts rows into batches of neighbouring length, shortest first; the order is stable."""
    order = rows[np.argsort(lengths[rows], kind="stable")]
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def training_batches(
    lengths: np.ndarray,
    batch_size: int,
    steps: int | None,
    epochs: int | None,
    rng: np.random.Generator,
    bucket: bool = True,
) -> Iterator[np.ndarray]:
    """Row numbers of the batches of one round: epochs over all rows, or exactly ``steps`` batches.

    Each epoch is a fresh permutation, of which only what the steps need is drawn. With
    ``bucket`` its rows are grouped by length, and the batches are shuffled: less padding, and no
    row twice in a batch.

    Raises:
        ValueError: there are no rows.
    """
    if len(lengths) == 0:
        raise ValueError("a client needs at least one training row, got 0")
    total = steps if steps is not None else -(-len(lengths) // batch_size) * (epochs or 1)
    while total > 0:
        rows = rng.permutation(len(lengths))[: total * batch_size]
        if bucket:
            batches = by_length(rows, lengths, batch_size)
            batches = [batches[i] for i in rng.permutation(len(batches))]
        else:
            batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        yield from batches
        total -= len(batches)
