"""``fedpeft partition``: each client's rows as a table, a heat map and a file of row numbers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fedpeft.config.schema import Config
from fedpeft.data.partitions.base import Rows
from fedpeft.data.partitions.saved import Saved, write_partition
from fedpeft.reporting.figures import plot_partition
from fedpeft.reporting.tables import print_table

WHOLE = 30  # most clients, or labels, of which all are shown
SHOWN = 20  # clients shown if there are more


@dataclass(frozen=True)
class Holdings:
    """A configuration's clients and their training rows.

    Args:
        config: the run.
        labels: each training row's class number, int64 (rows,).
        names: names of the classes, by number.
        clients: row numbers by client.
    """

    config: Config
    labels: np.ndarray
    names: Sequence[str]
    clients: Rows

    @classmethod
    def of(cls, config: Config) -> "Holdings":
        """Divide a run's training rows."""
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
        """Name of the labels, for titles and axes."""
        return self.config.partition.column or "label"

    def as_json(self) -> str:
        """Return the counts for other programs."""
        return json.dumps({"labels": list(self.names), "counts": self.counts.tolist()})

    def show(self) -> None:
        """Print the table, and what a run's notes would say of its rows."""
        header, cells = holding_cells(self.counts, self.names)
        print_table(f"training rows by client and {self.kind}", header, cells)
        if unused := len(self.labels) - int(self.counts.sum()):
            print(f"{unused} of {len(self.labels)} training rows are no client's")
        for note in self.config.data.notes():
            print(f"note: {note}")
        for reason, count in self.config.data.skipped.items():
            print(f"left out: {count} rows, each {reason}")

    def save(self, folder: Path) -> list[str]:
        """Write ``partition.png`` and ``partition.json``, and return the names.

        A saved partition is not written again, because that would lose how it was made.
        """
        folder.mkdir(parents=True, exist_ok=True)
        plot_partition([folder / "partition.png"], self.counts, self.names, self.kind)
        if isinstance(self.config.partition, Saved):
            return ["partition.png"]
        file = folder / "partition.json"
        write_partition(file, self.config.partition, self.labels, self.config.seed, self.clients)
        return ["partition.png", "partition.json"]


def holding_cells(
    counts: np.ndarray, names: Sequence[str]
) -> tuple[Sequence[str], list[list[str]]]:
    """Return header and rows of the table; sum up many labels, and leave out many clients.

    Args:
        counts: rows by client and label, (clients, labels).
        names: names of the labels, by number.
    """
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
    """Return the number of rows and of their labels, and the commonest label with its rows."""
    most = int(row.argmax())
    return [str(row.sum()), str(np.count_nonzero(row)), names[most], str(row[most])]
