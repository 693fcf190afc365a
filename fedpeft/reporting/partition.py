"""``fedpeft partition``: who holds what, as a table, a heat map and a file of row numbers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from rich.markup import escape

from fedpeft.config.schema import Config
from fedpeft.data.partitions.base import Rows
from fedpeft.data.partitions.saved import Saved, write_partition
from fedpeft.reporting.figures import plot_partition
from fedpeft.reporting.tables import print_table

WHOLE = 30  # so many clients, or labels, are shown whole
SHOWN = 20  # of more clients, so many


@dataclass(frozen=True)
class Holdings:
    """A configuration's clients and their training rows.

    Args:
        labels: each training row's class number, int64 (rows,), and ``names`` of the classes.
        clients: row numbers by client.
    """

    config: Config
    labels: np.ndarray
    names: Sequence[str]
    clients: Rows

    @classmethod
    def of(cls, config: Config) -> "Holdings":
        """Divides the rows."""
        labels, names = config.data.grouped(config.partition.column)
        clients = config.partition.indices(labels, config.num_clients, config.seed)
        return cls(config, labels, names, clients)

    @cached_property
    def counts(self) -> np.ndarray:
        """Rows by client and label, (clients, labels)."""
        width = len(self.names)
        return np.stack([np.bincount(self.labels[held], minlength=width) for held in self.clients])

    @property
    def kind(self) -> str:
        """The labels' kind, for titles and axes."""
        return self.config.partition.column or "label"

    def as_json(self) -> str:
        """Counts for other programs."""
        return json.dumps({"labels": list(self.names), "counts": self.counts.tolist()})

    def show(self) -> None:
        """Prints the table."""
        header, cells = holding_cells(self.counts, self.names)
        print_table(f"training rows by client and {self.kind}", header, cells)
        if unused := len(self.labels) - int(self.counts.sum()):
            print(f"{unused} of {len(self.labels)} training rows are no client's")

    def save(self, folder: Path) -> list[str]:
        """Writes ``partition.png`` and ``partition.json``; returns the names.

        A saved partition is not written again: that would lose what once made it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        plot_partition(folder / "partition.png", self.counts, self.names, self.kind)
        if isinstance(self.config.partition, Saved):
            return ["partition.png"]
        file = folder / "partition.json"
        write_partition(file, self.config.partition, self.labels, self.config.seed, self.clients)
        return ["partition.png", "partition.json"]


def holding_cells(
    counts: np.ndarray, names: Sequence[str]
) -> tuple[Sequence[str], list[list[str]]]:
    """Header and rows of the table; many labels are summed up, many clients cut short.

    Args:
        counts: rows by client and label, (clients, labels).
    """
    names = [escape(name) for name in names]
    header, describe = ("client", "rows", *names), _all_labels
    if len(names) > WHOLE:
        header, describe = ("client", "rows", "labels", "commonest", "its rows"), _summed_up
    shown = len(counts) if len(counts) <= WHOLE else SHOWN
    cells = [[str(i), *describe(row, names)] for i, row in enumerate(counts[:shown])]
    if rest := len(counts) - shown:
        sizes = counts[shown:].sum(1)
        span = f"{sizes.min()} / {np.median(sizes):.0f} / {sizes.max()}"
        cells.append([f"{rest} more: min / median / max", span, *[""] * (len(header) - 2)])
    return header, [*cells, ["all", *describe(counts.sum(0), names)]]


def _all_labels(row: np.ndarray, names: Sequence[str]) -> list[str]:
    return [str(row.sum()), *map(str, row)]


def _summed_up(row: np.ndarray, names: Sequence[str]) -> list[str]:
    """Rows, how many labels they have, and the commonest."""
    most = int(row.argmax())
    return [str(row.sum()), str(np.count_nonzero(row)), names[most], str(row[most])]
