"""Bounds of what a client's reply may be, so that one client cannot take over a round or end a run.

A bound that the server knows (how many rows a client holds, how many steps it was told to take) is
checked for each reply. Norms are compared within a round, because nobody knows them beforehand.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from fedpeft.state import State


def update_norms(before: State, states: Sequence[State]) -> list[float]:
    """Return the norms of each client's update, in float64.

    Args:
        before: shared parameters as the clients received them, full.
        states: of each client, full or block.
    """
    return [
        math.sqrt(sum(_square(before[name], value) for name, value in state.items()))
        for state in states
    ]


def _square(before: torch.Tensor, after: torch.Tensor) -> float:
    start = before[tuple(slice(size) for size in after.shape)]
    return float((after.double() - start.double()).square().sum())


def too_far(norms: Mapping[int, float], ratio: float) -> dict[int, str]:
    """Return the clients whose update is far longer than the others', with the reason.

    Args:
        norms: of the updates, each divided by the client's steps, by client.
        ratio: multiple of the median that a norm may have. Of an even number, the smaller of the
            two in the middle counts, so that one of two clients cannot set it.
    """
    if not norms:
        return {}
    ordered = sorted(norms.values())
    median = ordered[(len(ordered) - 1) // 2]
    if median == 0:
        return {}
    return {
        client: f"its update's norm a step is {norm:.3g}, more than "
        f"strategy.max_norm_ratio={ratio:g} times the round's median {median:.3g}"
        for client, norm in norms.items()
        if norm > ratio * median
    }


def capped(weights: Sequence[float], most: float) -> list[float]:
    """Cut weights to a share of the round; the others grow in proportion.

    Args:
        weights: sum to 1.
        most: in (0, 1]. If even equal weights are above it, they are equal.

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
