"""Numbers of rows by client and label, and the rows that clients then hold.

No client is special: rounding gives the rows that are left over to whoever is nearest to one more,
never to a client because of its number.
"""

from collections.abc import Callable

import numpy as np

from fedpeft.seeding import generator

DRAWS = 550  # most draws of a partition that may leave a client with too few rows
DRAW_COST = 4_000_000  # numbers (clients x labels) in all draws: about a second

Draw = Callable[[np.random.Generator], np.ndarray | str]


def apportion(total: int | np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Return whole numbers of sum ``total``, each within one of its share (largest remainders).

    Args:
        total: a number, or one for each row of ``shares``.
        shares: sum to 1 along the last axis.

    Returns:
        int64, of the shape of ``shares``.
    """
    total = np.asarray(total)[..., None]
    exact = total * shares
    numbers = np.floor(exact).astype(np.int64)
    order = np.argsort(numbers - exact, axis=-1, kind="stable")
    one_more = np.arange(shares.shape[-1]) < total - numbers.sum(-1, keepdims=True)
    added = np.zeros_like(numbers)
    np.put_along_axis(added, order, one_more.astype(np.int64), axis=-1)
    return numbers + added


def even(total: int, parts: int) -> np.ndarray:
    """Return sizes (parts,) of sum ``total`` that differ by one at most, the larger ones first."""
    return total // parts + (np.arange(parts) < total % parts)


def draws(num_clients: int, num_labels: int) -> int:
    """Return how often a partition is drawn at most: ``DRAWS``, or what ``DRAW_COST`` allows."""
    return max(1, min(DRAWS, DRAW_COST // (num_clients * num_labels)))


def first_fitting(draw: Draw, times: int, min_size: int, seed: int) -> np.ndarray | str:
    """Return the first draw that gives each client ``min_size`` rows.

    Args:
        draw: returns numbers of rows (clients, labels), or the reason why they are of no use.
        times: number of draws at most.
        min_size: rows that every client must have.
        seed: the generators of all draws derive from it.

    Returns:
        The numbers, or the last reason; it is empty if too few rows were the reason.
    """
    reason = ""
    for attempt in range(times):
        drawn = draw(generator(seed, "partition", attempt))
        if isinstance(drawn, str):
            reason = drawn
        elif drawn.sum(1).min() >= min_size:
            return drawn
        else:
            reason = ""
    return reason


def dealt(numbers: np.ndarray, counts: np.ndarray, seed: int) -> list[np.ndarray]:
    """Deal out rows at random, so many of each label to each client.

    Args:
        numbers: each row's label, from 0 without gaps, (rows,).
        counts: rows (clients, labels); of each label as many as there are.
        seed: the order of the rows derives from it.

    Returns:
        Row numbers by client, int64, ascending.
    """
    order = generator(seed, "partition", 0, 0).permutation(len(numbers))
    by_label = order[np.argsort(numbers[order], kind="stable")]
    holder = np.empty(len(numbers), np.int64)
    clients = np.tile(np.arange(len(counts)), counts.shape[1])
    holder[by_label] = np.repeat(clients, counts.T.ravel())
    return np.split(np.argsort(holder, kind="stable"), np.cumsum(counts.sum(1))[:-1])
