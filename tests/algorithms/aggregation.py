"""One round's aggregation, by an algorithm of fedpeft or by a strategy of Flower."""

from collections.abc import Sequence

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg as FlowerStrategy

from fedpeft.algorithms.base import FedAvg
from fedpeft.methods.base import At, Round
from fedpeft.state import State, weighted_mean
from fedpeft.wire import identify

NUM_EXAMPLES = [10, 30, 20, 40, 25]  # training rows of five clients
SHAPES = {"a": (2, 3), "b": (4,)}


def random_states(seed: int, clients: int = 5) -> list[State]:
    """Draw one state a client."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for _ in range(clients)
    ]


def record(state: State) -> ArrayRecord:
    return ArrayRecord({name: Array(value.numpy()) for name, value in state.items()})


def aggregate_by_flower(strategy: FlowerStrategy, states: Sequence[State], round: int = 1) -> State:
    """Return the state that a strategy of Flower makes of the clients' states.

    Args:
        strategy: keeps its moments from round to round.
        states: one state a client; client i has ``NUM_EXAMPLES[i]`` rows.
        round: number of the round.
    """
    identify()  # because Flower makes messages in a run only
    messages = [
        Message(
            RecordDict({"arrays": record(s), "metrics": MetricRecord({"num-examples": n})}),
            1,
            "train",
        )
        for s, n in zip(states, NUM_EXAMPLES, strict=False)
    ]
    arrays, _ = strategy.aggregate_train(round, messages)
    assert arrays is not None
    return {n: torch.from_numpy(np.array(a.numpy())).float() for n, a in arrays.items()}


def aggregate(
    algorithm: FedAvg,
    states: Sequence[State],
    before: State,
    memory: dict[str, State] | None = None,
    steps: Sequence[int] | None = None,
) -> State:
    """Return the state that an algorithm of fedpeft makes of the clients' states.

    Args:
        algorithm: weighs the clients and computes the server's new values.
        states: one state a client; client i has ``NUM_EXAMPLES[i]`` rows.
        before: the state that the clients received.
        memory: the server's memory, from round to round; empty by default.
        steps: number of steps of each client; one by default.
    """
    weights = algorithm.weigh(NUM_EXAMPLES[: len(states)])
    ats = [At(1, client) for client in range(len(states))]
    round = Round(1, ats, states, weights, before, steps or [1] * len(states), [{}] * len(states))
    mean = weighted_mean(states, weights)
    return algorithm.server(mean, round, {} if memory is None else memory)
