"""Encoded rows, and the batches a client sees in a round."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
PER_SEQUENCE = ("prompts", "right")  # the others have one entry a row
SEQUENCES = ("tokens", "offsets", "groups", *PER_SEQUENCE)
REPORTED = ("cut_prompt", "cut_answer")  # for the summary alone
# A forward pass takes about as long as with so many tokens more; cuda: not measured.
PASS_COST = {"cpu": 64, "cuda": 4096}


@dataclass(frozen=True)
class Examples:
    """Encoded rows in flat arrays, which may be memory-mapped, and a choice of them.

    Attributes:
        arrays: ``tokens`` int32 (sum of lengths,) and ``offsets`` int64 (sequences + 1,): sequence
            s is ``tokens[offsets[s]:offsets[s + 1]]``. ``prompts`` int64 (sequences,): how many
            tokens at its beginning are given, not predicted; ``right`` bool (sequences,): whether
            it is a right candidate. ``groups`` int64 (rows + 1,): row i has sequences
            ``groups[i]`` to ``groups[i + 1]``; without it, sequence i alone. Every other array has
            one entry a row, such as ``labels`` or ``pixels``.
        rows: int64, the rows of this choice by their numbers in the split.
        split: the split of the data set that they stand in.
        pad_id: the tokenizer's padding token.
    """

    arrays: Mapping[str, np.ndarray]
    rows: np.ndarray
    split: str = "train"
    pad_id: int = 0

    @classmethod
    def whole(cls, arrays: Mapping[str, np.ndarray], split: str, pad_id: int) -> "Examples":
        """All rows of a split."""
        count = len(arrays["groups"]) - 1 if "groups" in arrays else len(_first(arrays))
        return cls(arrays, np.arange(count), split, pad_id)

    @classmethod
    def from_lists(
        cls, rows: Sequence[Sequence[int]], labels: np.ndarray, pad_id: int
    ) -> "Examples":
        """One sequence a row and its label."""
        arrays = flat(rows) | {"labels": np.asarray(labels, np.int64)}
        return cls.whole(arrays, "train", pad_id)

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, rows: np.ndarray) -> "Examples":
        """Some rows, by their numbers in the split."""
        return replace(self, rows=np.asarray(rows))

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 (rows,) class numbers, or float32 targets."""
        return self.arrays["labels"][self.rows]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens per row; of several sequences, the longest's. Zeros where there are no tokens."""
        if "tokens" not in self.arrays:
            return np.zeros(len(self), np.int64)
        lengths = np.diff(self.arrays["offsets"])
        if "groups" in self.arrays:
            lengths = np.maximum.reduceat(lengths, self.arrays["groups"][:-1])
        return lengths[self.rows]

    @cached_property
    def sequences(self) -> np.ndarray:
        """Sequences per row: its candidates, or one."""
        if "groups" not in self.arrays:
            return np.ones(len(self), np.int64)
        return np.diff(self.arrays["groups"])[self.rows]

    def batch(self, positions: np.ndarray) -> Batch:
        """Rows by their position in this choice, padded on the right.

        input_ids and attention_mask (sequences, L), prompts (sequences,), choices (B,) sequences
        a row, row (B,) numbers in the split, and the other arrays' entries (B, ...).
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
    """Batches one after another, their tokens padded on the right to the longest."""
    if "input_ids" in batches[0]:
        longest = max(batch["input_ids"].shape[1] for batch in batches)
        batches = [padded(batch, longest, pad_id) for batch in batches]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def lengthened(batch: Batch, pad_id: int) -> Batch:
    """A batch whose rows of tokens, if it has any, are padded to one of few lengths.

    Multiples of 8 up to 64, of 16 up to 128, and so on: at most an eighth more above 64.
    """
    if "input_ids" not in batch:
        return batch
    length = batch["input_ids"].shape[1]
    multiple = max(8, 2 ** math.ceil(math.log2(length)) // 8)
    return padded(batch, -(-length // multiple) * multiple, pad_id)


def padded(batch: Batch, length: int, pad_id: int) -> Batch:
    """A batch whose rows of tokens are padded on the right to a length."""
    more = (0, length - batch["input_ids"].shape[1])
    ids = nn.functional.pad(batch["input_ids"], more, value=pad_id)
    mask = nn.functional.pad(batch["attention_mask"], more)
    return batch | {"input_ids": ids, "attention_mask": mask}


def _first(arrays: Mapping[str, np.ndarray]) -> Any:
    """An array with one entry a row (``offsets`` has one more than sequences)."""
    others = [array for name, array in arrays.items() if name not in SEQUENCES]
    return others[0] if others else arrays["offsets"][1:]


def flat(sequences: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Lists of token ids as ``tokens`` and ``offsets``."""
    offsets = np.concatenate([[0], np.cumsum([len(s) for s in sequences])]).astype(np.int64)
    tokens = np.fromiter((t for s in sequences for t in s), np.int32, int(offsets[-1]))
    return {"tokens": tokens, "offsets": offsets}


def by_length(rows: np.ndarray, lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Cuts rows into batches of neighbouring length, shortest first; the order is stable."""
    order = rows[np.argsort(lengths[rows], kind="stable")]
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def within(
    lengths: np.ndarray,
    batch_size: int,
    max_tokens: int,
    sequences: np.ndarray | None = None,
    device: str = "cpu",
) -> list[np.ndarray]:
    """All rows in batches of neighbouring length: sequences x longest length <= ``max_tokens``.

    Of all such cuts, the one with the fewest padded tokens, a batch itself counted as
    ``PASS_COST``. A row that is longer alone is a batch of its own.

    Args:
        sequences: of each row, (rows,); one each if not given.
        device: on which a pass runs.
    """
    order = np.argsort(lengths, kind="stable")
    sizes = np.ones_like(lengths) if sequences is None else sequences
    before = np.concatenate([[0], np.cumsum(sizes[order])])  # sequences before each row
    cost = np.zeros(len(order) + 1, np.int64)  # of the first rows, cut best
    first = np.zeros(len(order) + 1, np.int64)  # where their last batch begins
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
