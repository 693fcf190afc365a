"""Who holds which rows: partitions through flwr-datasets, and each client's own splits."""

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fedpeft.seeding import derive, generator

ATTEMPTS = 50


class Partition(ABC):
    """A frozen dataclass that divides rows over clients."""

    @abstractmethod
    def indices(self, labels: np.ndarray, num_clients: int, seed: int) -> list[np.ndarray]:
        """Row numbers of each client, int64, disjoint, together all rows."""


@dataclass(frozen=True)
class IID(Partition):
    """Equal random shares."""

    def indices(self, labels: np.ndarray, num_clients: int, seed: int) -> list[np.ndarray]:
        from datasets import Dataset
        from flwr_datasets.partitioner import IidPartitioner

        _check_clients(num_clients, len(labels), 1)
        partitioner = IidPartitioner(num_partitions=num_clients)
        order = generator(seed, "partition").permutation(len(labels))
        partitioner.dataset = Dataset.from_dict({"row": order})
        return [np.asarray(partitioner.load_partition(i)["row"]) for i in range(num_clients)]


@dataclass(frozen=True)
class Dirichlet(Partition):
    """Each label's rows divided by shares from Dirichlet(alpha) (arXiv 1905.12022).

    Args:
        alpha: > 0; small is skewed, ``inf`` is IID.
        min_size: rows that every client gets at least; the draw is repeated until it holds, at
            most 550 times (11 by flwr-datasets for each of 50 seeds).
    """

    alpha: float = 0.5
    min_size: int = 10

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ValueError(f"partition.alpha must be > 0, got {self.alpha}")
        if self.min_size < 1:
            raise ValueError(f"partition.min_size must be >= 1, got {self.min_size}")

    def indices(self, labels: np.ndarray, num_clients: int, seed: int) -> list[np.ndarray]:
        _check_clients(num_clients, len(labels), self.min_size)
        if np.isinf(self.alpha):
            return IID().indices(labels, num_clients, seed)
        return _dirichlet(labels.tobytes(), self.alpha, self.min_size, num_clients, seed)


@lru_cache(maxsize=4)
def _dirichlet(
    labels: bytes, alpha: float, min_size: int, num_clients: int, seed: int
) -> list[np.ndarray]:
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner

    numbers = np.frombuffer(labels, np.int64)
    table = Dataset.from_dict({"row": np.arange(len(numbers)), "label": numbers})
    for attempt in range(ATTEMPTS):
        partitioner = DirichletPartitioner(
            num_clients,
            "label",
            alpha,
            min_partition_size=min_size,
            self_balancing=False,
            seed=derive(seed, "partition", attempt),
        )
        partitioner.dataset = table
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # one a rejected draw; ours says it once
                return [
                    np.asarray(partitioner.load_partition(i)["row"]) for i in range(num_clients)
                ]
        except ValueError:
            continue
    raise ValueError(
        f"partition.alpha={alpha} left a client with fewer than partition.min_size={min_size} of "
        f"{len(numbers)} rows in each of {ATTEMPTS * 11} draws for num_clients={num_clients}: "
        "raise alpha, or lower min_size or num_clients"
    )


def _check_clients(num_clients: int, rows: int, min_size: int) -> None:
    if num_clients * min_size > rows:
        raise ValueError(
            f"{rows} training rows cannot give num_clients={num_clients} at least {min_size} each"
        )


def own_splits(rows: np.ndarray, seed: int, client: int) -> dict[str, np.ndarray]:
    """A client's rows as train (80 %), validation and test (10 % each, at least one row).

    Raises:
        ValueError: fewer than three rows.
    """
    if len(rows) < 3:
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
