"""Flower's own strategies, fed with messages, to be compared with."""

from collections.abc import Sequence

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg as FlowerStrategy

from fedpeft.algorithms.base import FedAvg
from fedpeft.methods.base import At, Round
from fedpeft.state import State, weighted_mean
from fedpeft.wire import identify

NUMBERS = [10, 30, 20, 40, 25]  # training rows of five clients
SHAPES = {"a": (2, 3), "b": (4,)}


def drawn(seed: int, clients: int = 5) -> list[State]:
    """The clients' states in one round."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for _ in range(clients)
    ]


def record(state: State) -> ArrayRecord:
    return ArrayRecord({name: Array(value.numpy()) for name, value in state.items()})


def flowers(strategy: FlowerStrategy, states: Sequence[State], round: int = 1) -> State:
    """What a strategy of Flower's makes of a round."""
    identify()  # messages can be made in a run only
    messages = [
        Message(
            RecordDict({"arrays": record(s), "metrics": MetricRecord({"num-examples": n})}),
            1,
            "train",
        )
        for s, n in zip(states, NUMBERS, strict=False)
    ]
    arrays, _ = strategy.aggregate_train(round, messages)
    assert arrays is not None
    return {n: torch.from_numpy(np.array(a.numpy())).float() for n, a in arrays.items()}


def ours(
    algorithm: FedAvg,
    states: Sequence[State],
    before: State,
    memory: dict[str, State] | None = None,
    steps: Sequence[int] | None = None,
) -> State:
    """What one of ours makes of it."""
    weights = algorithm.weigh(NUMBERS[: len(states)])
    ats = [At(1, client) for client in range(len(states))]
    round = Round(1, ats, states, weights, before, steps or [1] * len(states), [{}] * len(states))
    mean = weighted_mean(states, weights)
    return algorithm.server(mean, round, {} if memory is None else memory)
