"""A round's question and its aggregation, as the server would put them to a method."""

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
    """What a method makes of the states of clients 0, 1, ....

    Args:
        before: what the clients received.
        model: the server's, for methods that change base weights.
    """
    server: Any = SimpleNamespace(model=model)
    ats = [At(number, client) for client in range(len(states))]
    return method.aggregate(Round(number, ats, states, weights, before or {}, server=server))
