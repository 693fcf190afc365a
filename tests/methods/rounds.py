"""A round's aggregation, as the server asks a method for it."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from torch import nn

from fedpeft.methods.base import At, Method, Round
from fedpeft.state import State


def aggregated(
    method: Method,
    states: Sequence[State],
    weights: Sequence[float],
    before: State | None = None,
    number: int = 1,
    model: nn.Module | None = None,
) -> State:
    """Aggregate the states of clients 0, 1, ... by a method.

    Args:
        method: aggregates.
        states: the clients' states, as they were sent.
        weights: the clients' weights, with sum 1.
        before: the state that the clients received; empty by default.
        number: the round's number.
        model: the server's model, for methods that change base weights.
    """
    server: Any = SimpleNamespace(model=model)
    ats = [At(number, client) for client in range(len(states))]
    return method.aggregate(Round(number, ats, states, weights, before or {}, server=server))
