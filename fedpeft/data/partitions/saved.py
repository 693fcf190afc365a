"""A partition in a file of row numbers, so that a published split can be run again."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft.data.partitions.base import Partition, Rows
from fedpeft.errors import PartlyPublic

FORMAT = 1
KEYS = ("format", "num_rows", "column", "labels_sha256", "num_clients", "clients")


def labels_sha256(labels: np.ndarray) -> str:
    """Return the hash of class numbers as little-endian int64, equal on all machines."""
    return hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()


def write_partition(
    path: Path, partition: Partition, labels: np.ndarray, seed: int, clients: Rows
) -> None:
    """Write the rows of each client as JSON, beside facts that tell the training rows apart.

    Args:
        path: the file.
        partition: the partition that drew ``clients``; its ``repr`` is noted.
        labels: each training row's class number in ``partition.column``, int64 (rows,).
        seed: the seed that drew ``clients``; noted.
        clients: row numbers by client.
    """
    document = {
        "format": FORMAT,
        "num_rows": len(labels),
        "column": partition.column,
        "labels_sha256": labels_sha256(labels),
        "num_clients": len(clients),
        "partition": repr(partition),
        "seed": seed,
        "clients": [held.tolist() for held in clients],
    }
    path.write_text(json.dumps(document) + "\n")


@dataclass(frozen=True)
class Saved(Partition):
    """Reads each client's rows from a file; rows may be left that no client holds.

    Args:
        file: written by ``fedpeft partition``, or by ``write_partition`` from any row numbers.
    """

    file: str | None = None

    @property
    def origin(self) -> str:
        return f"partition.file={self.file}"

    def once(self, labels: np.ndarray, num_clients: int, seed: int) -> Rows:
        """See ``Partition.once``; nothing is cached, because the file may change."""
        return self.indices(labels, num_clients, seed)

    def _indices(self, labels: np.ndarray, num_clients: int, seed: int) -> Rows:
        saved = self._read()
        rules = {
            "format": (FORMAT, "is of format {}, but only {} is known"),
            "num_rows": (len(labels), "is of {} training rows, but there are {}"),
            "column": (self.column, "was made with partition.column={}, but it is now {}"),
            "labels_sha256": (
                labels_sha256(labels),
                "is of other labels (sha256 {}) than now ({})",
            ),
            "num_clients": (num_clients, "is of {} clients, but num_clients={}"),
        }
        for key, (now, sentence) in rules.items():
            if saved[key] != now:
                then, now = ("null" if v is None else v for v in (saved[key], now))
                told = f"{self.origin} was made for another {key}"
                raise PartlyPublic(told, f": it {sentence.format(then, now)}")
        return [self._numbers(client, rows) for client, rows in enumerate(saved["clients"])]

    def _read(self) -> dict[str, Any]:
        if self.file is None:
            raise ValueError("partition.file is not set: give one that fedpeft partition wrote")
        try:
            saved = json.loads(Path(self.file).expanduser().read_text())
        except OSError as error:
            raise ValueError(f"{self.origin} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or lists without end
            raise PartlyPublic(f"{self.origin} is no JSON, or cut off", f": {error}") from error
        missing = [key for key in KEYS if key not in saved] if isinstance(saved, dict) else KEYS
        if missing:
            raise ValueError(f"{self.origin} is no partition file: it has no {', '.join(missing)}")
        if not isinstance(saved["clients"], list):
            raise ValueError(f"{self.origin} is no partition file: its clients are no list")
        return saved

    def _numbers(self, client: int, rows: Any) -> np.ndarray:
        """Return a client's row numbers, which fit into int64; ``indices`` checks their values."""
        if not isinstance(rows, list):
            raise PartlyPublic(
                f"{self.origin} gives client {client} no list of rows", f", but {rows}"
            )
        for row in rows:
            if type(row) is not int or not -(2**63) <= row < 2**63:
                raise PartlyPublic(
                    f"{self.origin} gives client {client} what is no row number", f": {row!r}"
                )
        return np.array(rows, np.int64)
