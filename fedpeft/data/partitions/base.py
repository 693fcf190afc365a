"""Partitions of rows over clients, and the splits of a client's rows.

Partitions are seeded, and ``check_rows`` checks each result: no row twice, no client without the
rows that it needs. More partitions stand in ``fedpeft.data.partitions.skew`` and
``fedpeft.data.partitions.saved``.
"""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np

from fedpeft.cache import cached
from fedpeft.data.partitions.flower_datasets import cut
from fedpeft.data.partitions.shares import apportion, dealt, draws, even, first_fitting
from fedpeft.seeding import generator

MIN_ROWS = 3  # one each to train, validate and test

Rows = list[np.ndarray]


@dataclass(frozen=True)
class Partition(ABC):
    """Divides the training rows over clients.

    Args:
        column: column whose values are skewed over clients; null for the task's label.
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
        """Name of the row numbers' source, for errors."""
        return f"partition {type(self).__name__}"

    def indices(self, labels: np.ndarray, num_clients: int, seed: int) -> Rows:
        """Return the row numbers of each client: int64, disjoint, at least ``min_size`` each.

        Args:
            labels: each training row's class number in ``column``, int64 (rows,).
            num_clients: number of clients.
            seed: seed from which all draws derive.

        Raises:
            ValueError: the rows cannot be divided so.
        """
        if num_clients * self.min_size > len(labels):
            raise ValueError(
                f"{len(labels)} training rows cannot give num_clients={num_clients} at least "
                f"{self.min_size} each (partition.min_size)"
            )
        clients = self._indices(labels, num_clients, seed)
        check_rows(self.origin, clients, len(labels), num_clients, self.min_size)
        return clients

    def once(self, labels: np.ndarray, num_clients: int, seed: int) -> Rows:
        """Return ``indices``, computed once for all processes.

        The result is cached because importing flwr-datasets takes seconds, and because some
        partitions are drawn many times.

        Args:
            labels: see ``indices``.
            num_clients: see ``indices``.
            seed: see ``indices``.
        """

        def compute() -> dict[str, np.ndarray]:
            clients = self.indices(labels, num_clients, seed)
            return {"rows": np.concatenate(clients), "ends": np.cumsum([len(r) for r in clients])}

        digest = hashlib.sha256(labels.tobytes()).hexdigest()
        arrays = cached(["partition 2", self, num_clients, seed, digest], compute)
        return np.split(arrays["rows"], arrays["ends"][:-1])

    @abstractmethod
    def _indices(self, labels: np.ndarray, num_clients: int, seed: int) -> Rows:
        """Return the row numbers of each client, which ``indices`` checks."""


def check_rows(origin: str, clients: Rows, rows: int, num_clients: int, min_size: int) -> None:
    """Check the row numbers that clients hold.

    Args:
        origin: name of the row numbers' source, for errors.
        clients: row numbers by client.
        rows: number of all training rows.
        num_clients: number of clients that there must be.
        min_size: rows that every client must have.

    Raises:
        ValueError: the number of clients is another, or a client holds numbers other than int64,
            too few rows, a row that does not exist, or one that was dealt out already.
    """
    if len(clients) != num_clients:
        raise ValueError(f"{origin} is of {len(clients)} clients, but num_clients={num_clients}")
    for client, held in enumerate(clients):
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
                f"{origin} gives client {client} row number {wrong}, but these numbers go from 0 "
                f"to {rows - 1}"
            )
    counts = np.bincount(np.concatenate(clients), minlength=rows)
    if counts.max() > 1:
        row = int(counts.argmax())
        holders = [str(client) for client, held in enumerate(clients) for _ in held[held == row]]
        raise ValueError(
            f"{origin} gives row number {row} (counted from 0) to clients {' and '.join(holders)}"
        )


@dataclass(frozen=True)
class IID(Partition):
    """Random shares whose sizes differ by one row at most.

    RoLoRA's 3, 20 and 50 disjoint shards (arXiv 2409.02346) are this partition with ``num_clients``
    = 3, 20 and 50, where more clients hold fewer rows each. On shuffled rows, flwr-datasets'
    ``IidPartitioner`` deals out the same shares.
    """

    def _indices(self, labels: np.ndarray, num_clients: int, seed: int) -> Rows:
        order = generator(seed, "partition").permutation(len(labels))
        return cut(order, even(len(labels), num_clients))


@dataclass(frozen=True)
class Dirichlet(Partition):
    """Divides each label's rows by shares from Dirichlet(alpha) (arXiv 1905.12022).

    Shares become rows by largest remainders, and a label's rows are dealt out at random. The
    partition is drawn again until every client has ``min_size`` rows: at most 550 times, and beyond
    some 7,000 clients x labels less often, so that it ends within about a second.

    flwr-datasets' ``DirichletPartitioner`` is not used, because it rounds the shares down and gives
    the rest of every label to the last client, which then holds nearly all labels, and half of the
    rows if labels have two each.

    Args:
        alpha: concentration of the Dirichlet shares, > 0; a small one skews, ``inf`` is IID.
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
        numbers, totals = np.unique(labels, return_inverse=True, return_counts=True)[1:]
        times = draws(num_clients, len(totals))

        def draw(rng: np.random.Generator) -> np.ndarray:
            # NumPy overflows with a greater alpha; these shares are even to six digits.
            alphas = np.full(num_clients, min(self.alpha, 1e12))
            return apportion(totals, rng.dirichlet(alphas, len(totals))).T

        counts = first_fitting(draw, times, self.min_size, seed)
        if isinstance(counts, str):
            raise ValueError(
                f"partition.alpha={self.alpha} left a client with fewer than partition.min_size="
                f"{self.min_size} of {len(labels)} rows in each of {times} draws for num_clients="
                f"{num_clients}: {self._remedy(totals, num_clients)}"
            )
        return dealt(numbers, counts, seed)

    def _remedy(self, totals: np.ndarray, num_clients: int) -> str:
        """Say what would help: a greater alpha cannot divide a label's few rows evenly."""
        if (totals // num_clients).sum() >= self.min_size:
            return "raise alpha, or lower min_size or num_clients"
        return (
            f"no alpha divides these labels evenly, because the median of the {len(totals)} has "
            f"{np.median(totals):g} rows: set alpha=inf, or lower min_size or num_clients"
        )


def own_splits(rows: np.ndarray, seed: int, client: int) -> dict[str, np.ndarray]:
    """Split a client's rows into train (80 %), validation and test (10 % each, at least one row).

    Args:
        rows: the client's row numbers, int64.
        seed: the run's seed; the draw depends on it and on the client.
        client: number of the client.

    Returns:
        Row numbers by split.

    Raises:
        ValueError: the client has fewer than three rows.
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
