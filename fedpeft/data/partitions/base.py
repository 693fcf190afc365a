"""Who holds which rows: partitions through flwr-datasets, and each client's own splits.

All are seeded, and one place checks every result: no row twice, no client without the rows that it
needs. ``fedpeft.data.partitions.skew`` and ``fedpeft.data.partitions.saved`` have more.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from fedpeft.data.partitions.flower_datasets import cut, dirichlet, table
from fedpeft.data.rows.cache import cached
from fedpeft.seeding import derive, generator

MIN_ROWS = 3  # one each to train, validate and test
DRAWS = 550  # of a partition that may leave a client with too little
DRAW_COST = 4_000_000  # rows and counts (clients x labels) that all draws handle: half a minute

Rows = list[np.ndarray]


@dataclass(frozen=True)
class Partition(ABC):
    """Divides the training rows over clients.

    Args:
        column: the column whose values are skewed over clients; null: the task's label.
        min_size: rows that every client gets at least, >= 3: one each to train, validate and test.
    """

    column: str | None = field(default=None, kw_only=True)
    min_size: int = field(default=MIN_ROWS, kw_only=True)

    def __post_init__(self) -> None:
        if self.min_size < MIN_ROWS:
            raise ValueError(
                f"partition.min_size must be >= {MIN_ROWS}, one row each to train, validate and "
                f"test, got {self.min_size}"
            )

    @property
    def origin(self) -> str:
        """What an error names as the source of the row numbers."""
        return f"partition {type(self).__name__}"

    def indices(self, labels: np.ndarray, num_clients: int, seed: int) -> Rows:
        """Row numbers of each client, int64, disjoint, at least ``min_size`` each.

        Args:
            labels: each training row's class number in ``column``, int64 (rows,).

        Raises:
            ValueError: the rows cannot be divided so.
        """
        if num_clients * self.min_size > len(labels):
            raise ValueError(
                f"{len(labels)} training rows cannot give num_clients={num_clients} at least "
                f"{self.min_size} each"
            )
        found = self._indices(labels, num_clients, seed)
        check_rows(self.origin, found, len(labels), num_clients, self.min_size)
        return found

    def once(self, labels: np.ndarray, num_clients: int, seed: int) -> Rows:
        """``indices``, found once for all processes: flwr-datasets takes seconds to import."""

        def find() -> dict[str, np.ndarray]:
            found = self.indices(labels, num_clients, seed)
            return {"rows": np.concatenate(found), "ends": np.cumsum([len(r) for r in found])}

        of = hashlib.sha256(labels.tobytes()).hexdigest()
        arrays = cached(["partition", self, num_clients, seed, of], find)
        return np.split(arrays["rows"], arrays["ends"][:-1])

    @abstractmethod
    def _indices(self, labels: np.ndarray, num_clients: int, seed: int) -> Rows:
        """What ``indices`` checks and returns."""


def check_rows(origin: str, found: Rows, rows: int, num_clients: int, min_size: int) -> None:
    """Raises ValueError for what no client may hold.

    Args:
        origin: what the error names.
        found: row numbers by client, each from 0 to ``rows`` - 1.
    """
    if len(found) != num_clients:
        raise ValueError(f"{origin} is of {len(found)} clients, but num_clients={num_clients}")
    for client, held in enumerate(found):
        if held.dtype != np.int64:
            raise ValueError(f"{origin} gives client {client} {held.dtype} numbers, not int64")
        if len(held) < min_size:
            raise ValueError(
                f"{origin} gives client {client} {len(held)} of {rows} rows, but every client "
                f"needs partition.min_size={min_size}"
            )
        if held.min() < 0 or held.max() >= rows:
            wrong = held[(held < 0) | (held >= rows)][0]
            raise ValueError(
                f"{origin} gives client {client} row {wrong}, but rows go from 0 to {rows - 1}"
            )
    times = np.bincount(np.concatenate(found), minlength=rows)
    if times.max() > 1:
        row = int(times.argmax())
        holders = [str(client) for client, held in enumerate(found) for _ in held[held == row]]
        raise ValueError(f"{origin} gives row {row} to clients {' and '.join(holders)}")


def first_fitting(
    draw: Callable[[int], Rows], times: int, rows: int, min_size: int, seed: int
) -> Rows | None:
    """The first of ``times`` draws that gives away all rows, and each client ``min_size`` of them.

    Args:
        draw: from a seed to row numbers by client.
    """
    for attempt in range(times):
        found = draw(derive(seed, "partition", attempt))
        if min(map(len, found), default=0) >= min_size and sum(map(len, found)) == rows:
            return found
    return None


def draws(num_clients: int, labels: np.ndarray) -> int:
    """How often a partition is drawn at most."""
    cost = len(labels) + num_clients * len(np.unique(labels))
    return max(1, min(DRAWS, DRAW_COST // cost))


def even(total: int, parts: int) -> np.ndarray:
    """Sizes (parts,) that differ by one at most, the larger ones first."""
    return total // parts + (np.arange(parts) < total % parts)


@dataclass(frozen=True)
class IID(Partition):
    """Equal random shares, sizes differing by one row at most.

    RoLoRA's 3, 20 and 50 disjoint shards (arXiv 2409.02346) are this with ``num_clients`` = 3, 20
    and 50: more clients hold less each. The same rows as flwr-datasets' ``IidPartitioner``.
    """

    def _indices(self, labels: np.ndarray, num_clients: int, seed: int) -> Rows:
        order = generator(seed, "partition").permutation(len(labels))
        return cut(order, even(len(labels), num_clients))


@dataclass(frozen=True)
class Dirichlet(Partition):
    """Each label's rows divided by shares from Dirichlet(alpha) (arXiv 1905.12022).

    Drawn again until every client has ``min_size`` rows: at most 550 times, and beyond some
    7,000 rows less often, so that it ends within about half a minute.

    Args:
        alpha: > 0; small is skewed, ``inf`` is IID.
    """

    alpha: float = 0.5
    min_size: int = field(default=10, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alpha > 0:
            raise ValueError(f"partition.alpha must be > 0, got {self.alpha}")

    def _indices(self, labels: np.ndarray, num_clients: int, seed: int) -> Rows:
        if np.isinf(self.alpha):
            return IID()._indices(labels, num_clients, seed)
        times = draws(num_clients, labels)
        found = _dirichlet(labels.tobytes(), self.alpha, self.min_size, num_clients, seed, times)
        if found is None:
            raise ValueError(
                f"partition.alpha={self.alpha} left a client with fewer than partition.min_size="
                f"{self.min_size} of {len(labels)} rows in each of {times} draws for num_clients="
                f"{num_clients}: raise alpha, or lower min_size or num_clients"
            )
        return found


@lru_cache(maxsize=4)  # of one run's sessions
def _dirichlet(
    labels: bytes, alpha: float, min_size: int, num_clients: int, seed: int, times: int
) -> Rows | None:
    rows = table(np.frombuffer(labels, np.int64))

    def draw(seed: int) -> Rows:
        return dirichlet(rows, alpha, num_clients, seed)

    return first_fitting(draw, times, len(rows), min_size, seed)


def own_splits(rows: np.ndarray, seed: int, client: int) -> dict[str, np.ndarray]:
    """A client's rows as train (80 %), validation and test (10 % each, at least one row).

    Raises:
        ValueError: fewer than three rows.
    """
    if len(rows) < MIN_ROWS:
        raise ValueError(
            f"client {client} has {len(rows)} rows, needs 3: one each to train, validate and test"
        )
    order = rows[generator(seed, "own splits", client).permutation(len(rows))]
    held_out = max(1, len(rows) // 10)
    return {
        "validation": order[:held_out],
        "test": order[held_out : 2 * held_out],
        "train": order[2 * held_out :],
    }
