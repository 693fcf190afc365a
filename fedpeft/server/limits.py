"""Bounds of what a client's reply may be, so that one client cannot take over a round or end a run.

A bound that the server knows (how many rows a client holds, how many steps it was told to take) is
checked for each reply. Norms are compared within a round, because nobody knows them beforehand.
"""

import math
from collections.abc import Collection, Mapping, Sequence

import torch

from fedpeft.state import State

FRAME = 1 << 20  # bytes of a reply beside its arrays, at most
MOST_STEPS = 100  # largest number of a client's steps, as a multiple of the round's median
MOST_ROWS = 10**9  # training rows that a client with rows of its own may say at most


def update_norms(before: State, states: Sequence[State]) -> list[float]:
    """Return the norms of each client's update, in float64.

    Args:
        before: shared parameters as the clients received them, full.
        states: each client's shared parameters after training, full or block.
    """
    return [
        math.sqrt(sum(_square(before[name], value) for name, value in state.items()))
        for state in states
    ]


def _square(before: torch.Tensor, after: torch.Tensor) -> float:
    start = before[tuple(slice(size) for size in after.shape)]
    return float((after.double() - start.double()).square().sum())


def norms_per_step(
    norms: Mapping[int, float], steps: Mapping[int, int], own_rows: Collection[int]
) -> dict[int, float]:
    """Divide norms by steps, because a client of many rows takes many steps.

    Args:
        norms: the norm of each client's update, by client.
        steps: number of each client's steps, by client, at least 1.
        own_rows: clients with rows of their own, which say how many steps they took. They count at
            most ``MOST_STEPS`` times the median of all clients' steps.
    """
    most = MOST_STEPS * lower_median(steps.values())
    return {
        client: norm / (min(steps[client], most) if client in own_rows else steps[client])
        for client, norm in norms.items()
    }


def lower_median(values: Collection[float]) -> float:
    """Return the median; of an even number the smaller of the two in the middle, 0 of none.

    So one of two clients cannot raise it.
    """
    return sorted(values)[(len(values) - 1) // 2] if values else 0.0


def too_far(norms: Mapping[int, float], ratio: float, before: float = 0.0) -> dict[int, str]:
    """Return the clients whose update is far longer than the others', with the reason.

    Args:
        norms: the norm of each client's update divided by the client's steps, by client.
        ratio: multiple of the round's lower median, or of ``before`` if that is larger, that a norm
            may have.
        before: the largest lower median of the good rounds so far; 0 if there is none. So clients
            that hardly move, such as clients with one label once they know it, cannot have the
            others left out.
    """
    median = lower_median(norms.values())
    most, whose = median, "round's median"
    if before > median:
        most, whose = before, "largest median so far,"
    if most == 0:
        return {}
    return {
        client: f"its update's norm a step is {norm:.3g}, more than "
        f"strategy.max_norm_ratio={ratio:g} times the {whose} {most:.3g}"
        for client, norm in norms.items()
        if norm > ratio * most
    }


def check_size(size: int, most: int) -> None:
    """Raise ValueError if a reply has more than ``most`` bytes."""
    if size > most:
        raise ValueError(f"the reply has {size} bytes, but at most {most} may come")


def capped(weights: Sequence[float], most: float) -> list[float]:
    """Cut weights to a share of the round; the others grow in proportion.

    Args:
        weights: one weight a client, summing to 1.
        most: largest weight that a client may have, in (0, 1]. If even equal weights are above it,
            they are equal.

    Returns:
        Weights that sum to 1.
    """
    if most * len(weights) <= 1:
        return [1 / len(weights)] * len(weights)
    result, cut = list(weights), set[int]()
    while over := {i for i, w in enumerate(result) if w > most and i not in cut}:
        cut |= over
        rest = sum(w for i, w in enumerate(weights) if i not in cut)
        left = 1 - most * len(cut)
        result = [most if i in cut else w * left / rest for i, w in enumerate(weights)]
    return result
