"""Partitions in which labels, numbers or origins of rows differ from client to client."""

from dataclasses import dataclass, field

import numpy as np

from fedpeft.data.partitions.base import Partition, Rows, draws, even, first_fitting
from fedpeft.data.partitions.flower_datasets import cut, natural, pathological, table
from fedpeft.seeding import generator


def apportion(total: int, shares: np.ndarray) -> np.ndarray:
    """Return whole numbers of sum ``total``, each within one of its share (largest remainders)."""
    exact = total * shares
    numbers = np.floor(exact).astype(np.int64)
    numbers[np.argsort(numbers - exact, kind="stable")[: total - numbers.sum()]] += 1
    return numbers


def _check_alpha(alpha: float) -> None:
    if not 1e-6 <= alpha <= 1e6:
        raise ValueError(f"partition.alpha must be from 1e-6 to 1e6, got {alpha}")


@dataclass(frozen=True)
class Pathological(Partition):
    """Gives every client rows of a few labels only (arXiv 2102.02079).

    Client i holds label i modulo the number of labels, and further labels at random. A label's rows
    are divided evenly among its holders. The partition is drawn again until every label has a
    holder and every client has ``min_size`` rows, as often as ``Dirichlet``.

    Args:
        classes_per_client: number of labels that a client holds.
    """

    classes_per_client: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes_per_client < 1:
            raise ValueError(
                f"partition.classes_per_client must be >= 1, got {self.classes_per_client}"
            )

    def _indices(self, labels: np.ndarray, num_clients: int, seed: int) -> Rows:
        num_labels, each = len(np.unique(labels)), self.classes_per_client
        self._check_number(num_labels, num_clients)
        # Shuffle rows first, because each holder gets a block of a label's rows in table order.
        order = generator(seed, "partition").permutation(len(labels))
        shuffled = table(labels[order])

        def draw(seed: int) -> Rows:
            return [order[held] for held in pathological(shuffled, each, num_clients, seed)]

        times = draws(num_clients, labels)
        clients = first_fitting(draw, times, len(labels), self.min_size, seed)
        if clients is None:
            raise ValueError(
                f"{times} draws of partition.classes_per_client={each} of {num_labels} labels for "
                f"num_clients={num_clients} all left a label without a client or a client with "
                f"fewer than partition.min_size={self.min_size} rows: raise classes_per_client, or "
                "change num_clients"
            )
        return clients

    def _check_number(self, labels: int, num_clients: int) -> None:
        each = self.classes_per_client
        if each > labels:
            raise ValueError(f"partition.classes_per_client={each}, but there are {labels} labels")
        if each * num_clients < labels:
            raise ValueError(
                f"num_clients={num_clients} of partition.classes_per_client={each} cannot hold "
                f"all {labels} labels: raise one of them"
            )


@dataclass(frozen=True)
class Quantity(Partition):
    """Gives clients shares of different sizes with the same mix of labels (arXiv 2102.02079).

    Every client gets ``min_size`` rows; the rest is divided by shares from Dirichlet(alpha).

    Args:
        alpha: from 1e-6 to 1e6; a small one skews.
    """

    alpha: float = 0.5
    min_size: int = field(default=10, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_alpha(self.alpha)

    def _indices(self, labels: np.ndarray, num_clients: int, seed: int) -> Rows:
        rng = generator(seed, "partition")
        order = rng.permutation(len(labels))
        shares = rng.dirichlet(np.full(num_clients, self.alpha))
        free = len(labels) - num_clients * self.min_size
        return cut(order, self.min_size + apportion(free, shares))


@dataclass(frozen=True)
class EqualSize(Partition):
    """FedPETuning's label skew (arXiv 2212.10025): equal shares with different mixes of labels.

    A client's shares of labels come from Dirichlet(alpha x the labels' shares of all rows), as in
    the official code. If a label runs out, the missing rows are drawn from all rows left, so the
    last clients hold what earlier ones did not want. Sizes differ by one row at most; the official
    code gives the remainder to the last client.

    flwr-datasets' ``InnerDirichlet`` is not used, because it draws from Dirichlet(alpha), ends in
    an error if alpha is small and a label has run out, and takes more than a minute for 10,000
    clients.

    Args:
        alpha: from 1e-6 to 1e6; a small one skews.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_alpha(self.alpha)

    def _indices(self, labels: np.ndarray, num_clients: int, seed: int) -> Rows:
        rng = generator(seed, "partition")
        _, numbers, totals = np.unique(labels, return_inverse=True, return_counts=True)
        sizes = even(len(labels), num_clients)
        counts = _equal_size(sizes, totals, self.alpha, rng)
        holder = np.empty(len(labels), np.int64)
        for label in range(len(totals)):
            rows = rng.permutation(np.flatnonzero(numbers == label))
            holder[rows] = np.repeat(np.arange(num_clients), counts[:, label])
        return cut(np.argsort(holder, kind="stable"), sizes)


def _equal_size(
    sizes: np.ndarray, totals: np.ndarray, alpha: float, rng: np.random.Generator
) -> np.ndarray:
    """Return numbers of rows (clients, labels) with the sums ``sizes`` and ``totals``."""
    prior, left = alpha * totals / totals.sum(), totals
    counts = np.zeros((len(sizes), len(totals)), np.int64)
    for client, size in enumerate(sizes):
        held = np.minimum(apportion(size, rng.dirichlet(prior)), left)
        held = held + rng.multivariate_hypergeometric(left - held, size - held.sum())
        counts[client], left = held, left - held
    return counts


@dataclass(frozen=True)
class Natural(Partition):
    """Makes a client of each value of ``column``: a person, a site, a package.

    A value with fewer than ``min_size`` rows is no client, and its rows are not used.
    """

    def _indices(self, labels: np.ndarray, num_clients: int, seed: int) -> Rows:
        if self.column is None:
            raise ValueError("partition.column is not set: name the one whose values are clients")
        sizes = np.bincount(labels)
        able = int((sizes >= self.min_size).sum())
        if able != num_clients:
            raise ValueError(
                f"partition.column={self.column} has {able} values of at least partition.min_size="
                f"{self.min_size} rows ({int((sizes > 0).sum())} in all), but num_clients="
                f"{num_clients}: each is a client, so both must be equal"
            )
        rows = np.flatnonzero(sizes[labels] >= self.min_size)
        return [rows[part] for part in natural(labels[rows])]
