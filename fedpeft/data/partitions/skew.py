"""Partitions in which labels, numbers or origins of rows differ from client to client."""

from dataclasses import dataclass, field

import numpy as np

from fedpeft.data.partitions.base import Partition, Rows
from fedpeft.data.partitions.flower_datasets import cut, natural
from fedpeft.data.partitions.shares import apportion, dealt, draws, even, first_fitting
from fedpeft.seeding import generator


def _check_alpha(alpha: float) -> None:
    if not 1e-6 <= alpha <= 1e6:
        raise ValueError(f"partition.alpha must be from 1e-6 to 1e6, got {alpha}")


@dataclass(frozen=True)
class Pathological(Partition):
    """Gives every client rows of a few labels only (arXiv 2102.02079).

    Client i holds label i modulo the number of labels, and further labels at random. A label's rows
    are divided evenly among its holders, and the rest of the division is dealt out among them at
    random. The partition is drawn again until every label has a holder and every client has
    ``min_size`` rows, as often as ``Dirichlet``.

    flwr-datasets' ``PathologicalPartitioner`` is not used, because it gives the rest of the
    division to the clients with the smallest numbers, and takes minutes for thousands of labels.

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
        numbers, totals = np.unique(labels, return_inverse=True, return_counts=True)[1:]
        self._check_number(len(totals), num_clients)
        times = draws(num_clients, len(totals))

        def draw(rng: np.random.Generator) -> np.ndarray | str:
            return _few_labels(totals, num_clients, self.classes_per_client, rng)

        counts = first_fitting(draw, times, self.min_size, seed)
        if isinstance(counts, str):
            few = (
                f"a client with fewer than partition.min_size={self.min_size} rows: lower "
                "min_size, or change classes_per_client or num_clients"
            )
            raise ValueError(
                f"no draw of {times} of partition.classes_per_client={self.classes_per_client} of "
                f"{len(totals)} labels for num_clients={num_clients} can be used; the last one "
                f"left {counts or few}"
            )
        return dealt(numbers, counts, seed)

    def _check_number(self, labels: int, num_clients: int) -> None:
        each = self.classes_per_client
        if each > labels:
            raise ValueError(f"partition.classes_per_client={each}, but there are {labels} labels")
        if each * num_clients < labels:
            raise ValueError(
                f"num_clients={num_clients} of partition.classes_per_client={each} cannot hold "
                f"all {labels} labels: raise one of them"
            )


def _few_labels(
    totals: np.ndarray, num_clients: int, each: int, rng: np.random.Generator
) -> np.ndarray | str:
    """Return numbers of rows (clients, labels) of ``each`` labels a client, or what is wrong."""
    clients, labels = np.arange(num_clients), len(totals)
    keys = rng.random((num_clients, labels))
    keys[clients, clients % labels] = -1  # the label that the client holds in any case
    holds = keys.argsort(1).argsort(1) < each
    holders = holds.sum(0)
    if (holders == 0).any():
        return "a label without a client: raise classes_per_client or num_clients"
    if (holders > totals).any():
        return "a label with more clients than rows: lower classes_per_client or num_clients"
    keys = np.where(holds, rng.random((num_clients, labels)), 2)
    return holds * (totals // holders + (keys.argsort(0).argsort(0) < totals % holders))


@dataclass(frozen=True)
class Quantity(Partition):
    """Gives clients shares of different sizes with the same mix of labels (arXiv 2102.02079).

    Every client gets ``min_size`` rows; the rest is divided by shares from Dirichlet(alpha).

    Args:
        alpha: concentration of the Dirichlet shares, from 1e-6 to 1e6; a small one skews.
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
    last clients get what is left. The order of clients is random. Sizes differ by one row at most;
    the official code gives the remainder to the last client.

    flwr-datasets' ``InnerDirichlet`` is not used, because it draws from Dirichlet(alpha), ends in
    an error if alpha is small and a label has run out, and takes more than a minute for 10,000
    clients.

    Args:
        alpha: concentration of the Dirichlet shares, from 1e-6 to 1e6; a small one skews.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_alpha(self.alpha)

    def _indices(self, labels: np.ndarray, num_clients: int, seed: int) -> Rows:
        rng = generator(seed, "partition")
        numbers, totals = np.unique(labels, return_inverse=True, return_counts=True)[1:]
        counts = _equal_size(even(len(labels), num_clients), totals, self.alpha, rng)
        return dealt(numbers, rng.permutation(counts), seed)


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
