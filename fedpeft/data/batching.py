"""Encoded rows, and the batches that a client trains on in a round."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
PER_SEQUENCE = ("prompts", "right")  # arrays with one entry a sequence
SEQUENCES = ("tokens", "offsets", "groups", *PER_SEQUENCE)  # the others have one entry a row
# In no batch, because only the summary reads them.
REPORTED = ("cut_text", "cut_prompt", "cut_answer")
# Fixed cost of a forward pass in tokens, by kind of device; the number for cuda is not measured.
PASS_COST = {"cpu": 64, "cuda": 4096}


@dataclass(frozen=True)
class Examples:
    """A split's encoded rows in flat arrays, which may be memory-mapped, and a selection of rows.

    Attributes:
        arrays: ``tokens`` int32 (sum of lengths,) and ``offsets`` int64 (sequences + 1,): sequence
            s is ``tokens[offsets[s]:offsets[s + 1]]``. ``prompts`` int64 (sequences,): number of
            tokens at a sequence's beginning that are not predicted. ``right`` bool (sequences,):
            true for a right candidate. ``groups`` int64 (rows + 1,): row i has the sequences
            ``groups[i]`` to ``groups[i + 1] - 1``; without it, sequence i alone. Every other array
            has one entry a row, such as ``labels`` or ``pixels``.
        rows: int64, numbers of the selected rows in the split.
        split: name of the split.
        pad_id: the tokenizer's padding token.
    """

    arrays: Mapping[str, np.ndarray]
    rows: np.ndarray
    split: str = "train"
    pad_id: int = 0

    @classmethod
    def whole(cls, arrays: Mapping[str, np.ndarray], split: str, pad_id: int) -> "Examples":
        """Return all rows of a split.

        Args:
            arrays: see ``Examples``.
            split: name of the split.
            pad_id: the tokenizer's padding token.
        """
        count = len(arrays["groups"]) - 1 if "groups" in arrays else len(_per_row(arrays))
        return cls(arrays, np.arange(count), split, pad_id)

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, rows: np.ndarray) -> "Examples":
        """Return the rows that have these numbers in the split."""
        return replace(self, rows=np.asarray(rows))

    @cached_property
    def labels(self) -> np.ndarray:
        """Labels of the selected rows (rows,): int64 class numbers or float32 targets."""
        return self.arrays["labels"][self.rows]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Length of each row's longest sequence in tokens (rows,); zeros if there are no tokens."""
        if "tokens" not in self.arrays:
            return np.zeros(len(self), np.int64)
        lengths = np.diff(self.arrays["offsets"])
        if "groups" in self.arrays:
            lengths = np.maximum.reduceat(lengths, self.arrays["groups"][:-1])
        return lengths[self.rows]

    @cached_property
    def sequences(self) -> np.ndarray:
        """Number of each row's sequences (rows,): its candidates, or one."""
        if "groups" not in self.arrays:
            return np.ones(len(self), np.int64)
        return np.diff(self.arrays["groups"])[self.rows]

    def batch(self, positions: np.ndarray) -> Batch:
        """Return rows as a batch, with tokens padded on the right.

        Args:
            positions: positions of the rows in this selection, (B,).

        Returns:
            ``input_ids`` and ``attention_mask`` (sequences, L), ``prompts`` and ``right``
            (sequences,), ``choices`` (B,) sequences a row, ``row`` (B,) numbers in the split, and
            the other arrays' entries (B, ...).
        """
        rows = self.rows[positions]
        batch = {"row": torch.from_numpy(np.asarray(rows, np.int64))}
        for name, array in self.arrays.items():
            if name not in (*SEQUENCES, *REPORTED):
                batch[name] = torch.from_numpy(np.ascontiguousarray(array[rows]))
        if "tokens" in self.arrays:
            batch |= self._padded(rows)
        return batch

    def _padded(self, rows: np.ndarray) -> Batch:
        """Return the padded sequences of some rows, and the arrays with one entry a sequence."""
        batch: Batch = {}
        sequences = rows
        if (groups := self.arrays.get("groups")) is not None:
            sequences = np.concatenate(
                [np.arange(int(groups[r]), int(groups[r + 1])) for r in rows]
            )
            batch["choices"] = torch.from_numpy(groups[rows + 1] - groups[rows])
        tokens, offsets = self.arrays["tokens"], self.arrays["offsets"]
        lengths = offsets[sequences + 1] - offsets[sequences]
        ids = np.full((len(sequences), int(lengths.max())), self.pad_id, np.int64)
        for i, s in enumerate(sequences):
            ids[i, : lengths[i]] = tokens[offsets[s] : offsets[s + 1]]
        mask = np.arange(ids.shape[1])[None] < lengths[:, None]
        batch["input_ids"] = torch.from_numpy(ids)
        batch["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        for name in PER_SEQUENCE:
            if name in self.arrays:
                batch[name] = torch.from_numpy(np.ascontiguousarray(self.arrays[name][sequences]))
        return batch


def merged(batches: Sequence[Batch], pad_id: int) -> Batch:
    """Concatenate batches, with tokens padded on the right to the longest."""
    if "input_ids" in batches[0]:
        longest = max(batch["input_ids"].shape[1] for batch in batches)
        batches = [padded(batch, longest, pad_id) for batch in batches]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def lengthened(batch: Batch, pad_id: int) -> Batch:
    """Pad a batch's tokens, if it has any, to one of few lengths.

    Lengths are multiples of 8 up to 64, of 16 up to 128, and so on, because each length needs a
    CUDA graph. Above 64, a sequence grows by less than a quarter.
    """
    if "input_ids" not in batch:
        return batch
    length = batch["input_ids"].shape[1]
    multiple = max(8, 2 ** math.ceil(math.log2(length)) // 8)
    return padded(batch, -(-length // multiple) * multiple, pad_id)


def padded(batch: Batch, length: int, pad_id: int) -> Batch:
    """Pad a batch's tokens on the right.

    Args:
        batch: a batch that has ``input_ids`` and ``attention_mask``, (sequences, L).
        length: the new L.
        pad_id: the tokenizer's padding token.
    """
    more = (0, length - batch["input_ids"].shape[1])
    ids = nn.functional.pad(batch["input_ids"], more, value=pad_id)
    mask = nn.functional.pad(batch["attention_mask"], more)
    return batch | {"input_ids": ids, "attention_mask": mask}


def _per_row(arrays: Mapping[str, np.ndarray]) -> Any:
    """Return an array with one entry a row; ``offsets`` has one entry more than sequences."""
    per_row = [array for name, array in arrays.items() if name not in SEQUENCES]
    return per_row[0] if per_row else arrays["offsets"][1:]


def flat(sequences: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Return lists of token ids as the arrays ``tokens`` and ``offsets``."""
    offsets = np.concatenate([[0], np.cumsum([len(s) for s in sequences])]).astype(np.int64)
    tokens = np.fromiter((t for s in sequences for t in s), np.int32, int(offsets[-1]))
    return {"tokens": tokens, "offsets": offsets}


def by_length(rows: np.ndarray, lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Cut rows into batches of neighbouring length, shortest first; the order is stable.

    Args:
        rows: numbers of the rows.
        lengths: tokens of every row, by number.
        batch_size: rows a batch; the last batch may have fewer.
    """
    order = rows[np.argsort(lengths[rows], kind="stable")]
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def within(
    lengths: np.ndarray,
    batch_size: int,
    max_tokens: int,
    sequences: np.ndarray | None = None,
    device: str = "cpu",
) -> list[np.ndarray]:
    """Cut all rows into batches of neighbouring length that keep two limits.

    The cut is the one with the smallest total of tokens, padding included, and ``PASS_COST`` for
    each batch.

    Args:
        lengths: tokens of each row's longest sequence, (rows,).
        batch_size: most rows in a batch.
        max_tokens: most tokens in a batch: its sequences x its longest length. A row that exceeds
            the limit alone is a batch by itself.
        sequences: number of each row's sequences, (rows,); null for one each.
        device: kind of the device on which a pass runs, a key of ``PASS_COST``.

    Returns:
        Positions of each batch's rows, shortest rows first.
    """
    order = np.argsort(lengths, kind="stable")
    sizes = np.ones_like(lengths) if sequences is None else sequences
    before = np.concatenate([[0], np.cumsum(sizes[order])])  # sequences before each row
    cost = np.zeros(len(order) + 1, np.int64)  # smallest cost of the first rows, by their number
    first = np.zeros(len(order) + 1, np.int64)  # start of the last batch in that cut
    for end in range(1, len(order) + 1):
        starts = np.arange(max(0, end - batch_size), end)
        tokens = (before[end] - before[starts]) * lengths[order[end - 1]]
        fits = tokens <= max_tokens
        fits[-1] = True
        costs = np.where(fits, cost[starts] + tokens + PASS_COST[device], np.iinfo(np.int64).max)
        best = int(costs.argmin())
        cost[end], first[end] = costs[best], starts[best]
    cuts = [len(order)]
    while cuts[-1] > 0:
        cuts.append(int(first[cuts[-1]]))
    return [order[a:b] for b, a in reversed(list(zip(cuts, cuts[1:], strict=False)))]


def training_batches(
    lengths: np.ndarray,
    batch_size: int,
    steps: int | None,
    epochs: int | None,
    rng: np.random.Generator,
    bucket: bool = True,
) -> Iterator[np.ndarray]:
    """Yield the row numbers of one round's batches: whole epochs, or exactly ``steps`` batches.

    Each epoch is a fresh permutation, and the last one is cut to the rows that the steps need. No
    batch spans two epochs, so no row stands twice in a batch.

    Args:
        lengths: tokens of each row, (rows,).
        batch_size: rows a batch; an epoch's last rows may make a smaller one.
        steps: number of batches; null for whole epochs.
        epochs: passes over the rows if ``steps`` is null; null for 1.
        rng: draws the permutations.
        bucket: group an epoch's rows by length, for less padding, and shuffle the batches.

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
