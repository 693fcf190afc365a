"""Server optimisers by hand, with keys that change by round, and against Flower's."""

import math

import numpy as np
import pytest
import torch
from flwr.serverapp import strategy as flower

from fedpeft.algorithms.base import FedAvg
from fedpeft.algorithms.fedopt import (
    Adaptive,
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedYogi,
    ServerOptimizer,
)
from fedpeft.methods.base import Round
from fedpeft.state import State
from tests.algorithms.aggregation import aggregate, aggregate_by_flower, random_states, record


def round_from(before: State) -> Round:
    """Return a round whose clients received this state; its other fields do not matter."""
    return Round(1, [], [], [], before)


def after(
    algorithm: ServerOptimizer, memory: dict[str, State], before: float, mean: float
) -> float:
    """Return the server's new value after a round with one number.

    Args:
        algorithm: computes the new value.
        memory: the algorithm's moments, which change.
        before: the value that the clients received.
        mean: the clients' mean.
    """
    trained, received = ({"a": torch.tensor([v], dtype=torch.float64)} for v in (mean, before))
    return algorithm.server(trained, round_from(received), memory)["a"].item()


def test_momentum_by_hand() -> None:
    algorithm, memory = FedAvgM(server_momentum=0.5, server_lr=2.0), {}
    assert after(algorithm, memory, 0.0, 1.0) == 2.0  # m = 1
    assert after(algorithm, memory, 2.0, 3.0) == 5.0  # m = 0.5 + 1 = 1.5


def test_adam_by_hand() -> None:
    algorithm, memory = FedAdam(beta_1=0.5, beta_2=0.75, tau=1.0, server_lr=2.0), {}
    # v starts at tau^2 = 1. delta 2: m = 1, v = 0.75 + 0.25 * 4 = 1.75
    first = 2 / (math.sqrt(1.75) + 1)
    assert after(algorithm, memory, 0.0, 2.0) == pytest.approx(first)
    # delta 4: m = 0.5 + 2 = 2.5, v = 0.75 * 1.75 + 4 = 5.3125
    expected = 1 + 5 / (math.sqrt(5.3125) + 1)
    assert after(algorithm, memory, 1.0, 5.0) == pytest.approx(expected)


def test_adagrad_by_hand() -> None:
    algorithm, memory = FedAdagrad(tau=4.0, server_lr=2.0), {}
    # v starts at tau^2 = 16
    assert after(algorithm, memory, 0.0, 3.0) == pytest.approx(6 / 9)  # v = 25: 2 * 3 / (5 + 4)
    assert after(algorithm, memory, 1.0, 13.0) == pytest.approx(1 + 24 / 17)  # v = 169


def test_yogi_by_hand() -> None:
    algorithm, memory = FedYogi(beta_1=0.0, beta_2=0.75, tau=1.0, server_lr=1.0), {}
    # v starts at tau^2 = 1. delta 2: v = 1 + 0.25 * 4 = 2
    assert after(algorithm, memory, 0.0, 2.0) == pytest.approx(2 / (math.sqrt(2) + 1))
    # delta 4: v = 2 + 0.25 * 16 = 6;  delta 1: v = 6 - 0.25 = 5.75, but 4.75 by Adam's rule
    assert after(algorithm, memory, 0.0, 4.0) == pytest.approx(4 / (math.sqrt(6) + 1))
    assert after(algorithm, memory, 0.0, 1.0) == pytest.approx(1 / (math.sqrt(5.75) + 1))


ALGORITHMS = [FedAvgM(), FedAdagrad(), FedAdam(), FedYogi()]
by_class = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: type(a).__name__)


@by_class
def test_a_round_without_a_name_leaves_its_moments(algorithm: ServerOptimizer) -> None:
    """With a in rounds 1 and 3 and b in round 2, a moves as if b did not exist."""
    before = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])}
    first, other = {"a": torch.tensor([1.5, 1.0])}, {"b": torch.tensor([[4.0]])}
    both: dict[str, State] = {}
    alone: dict[str, State] = {}
    for mean in (first, other, first):
        values = algorithm.server(mean, round_from(before), both)
        assert values.keys() == mean.keys()
        if mean is first:
            expected = algorithm.server(mean, round_from(before), alone)
            assert torch.equal(values["a"], expected["a"])
    assert all(set(moments) == {"a", "b"} for moments in both.values())
    fresh = algorithm.server(other, round_from(before), {})
    again = algorithm.server(other, round_from(before), both)
    assert not torch.equal(again["b"], fresh["b"])


@by_class
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_stay_and_arguments_are_not_changed(
    algorithm: ServerOptimizer, dtype: torch.dtype
) -> None:
    mean, before = {"a": torch.ones(2, dtype=dtype)}, {"a": torch.zeros(2, dtype=dtype)}
    values = algorithm.server(mean, round_from(before), {})
    assert values["a"].dtype is dtype and values["a"].all()
    assert mean["a"].tolist() == [1, 1] and before["a"].tolist() == [0, 0]


def test_without_momentum_and_with_rate_one_the_step_is_the_mean() -> None:
    states, before = random_states(1), random_states(2, 1)[0]
    values = aggregate(FedAvgM(server_momentum=0.0), states, before)
    for name, value in aggregate(FedAvg(), states, before).items():
        torch.testing.assert_close(values[name], value)


# --- Flower's strategies, on equal keys ----------------------------------------------------------


def assert_as_flower_s(
    algorithm: ServerOptimizer, theirs: flower.FedAvg, bias: bool = False
) -> None:
    """Compare three rounds of five clients, each from where the last one ended.

    Flower's second moment starts at 0; here it is set to tau^2, as the paper asks.

    Args:
        algorithm: fedpeft's algorithm.
        theirs: Flower's strategy with the same hyperparameters.
        bias: undo Flower's correction of Adam's bias.
    """
    state, memory = random_states(0, 1)[0], {}
    eta = getattr(theirs, "eta", 0.0)
    if isinstance(algorithm, Adaptive):
        theirs.v_t = {n: np.full(v.shape, algorithm.tau**2) for n, v in state.items()}  # type: ignore[attr-defined]
    for round in (1, 2, 3):
        numpy = {n: v.numpy() for n, v in state.items()}
        theirs.current_arrays = record(state) if isinstance(theirs, flower.FedAvgM) else numpy  # type: ignore[attr-defined]
        if bias:
            theirs.eta = eta * (1 - 0.9 ** (round + 1)) / math.sqrt(1 - 0.99 ** (round + 1))  # type: ignore[attr-defined]
        states = random_states(round)
        expected = aggregate_by_flower(theirs, states, round)
        values = aggregate(algorithm, states, state, memory)
        for name, value in expected.items():
            torch.testing.assert_close(values[name], value, rtol=1e-4, atol=1e-5)
            assert (values[name] - state[name]).abs().max() > 1e-3
        state = values


def test_momentum_as_flower_s() -> None:
    theirs = flower.FedAvgM(server_learning_rate=0.5, server_momentum=0.9)
    assert_as_flower_s(FedAvgM(server_lr=0.5, server_momentum=0.9), theirs)


def test_adagrad_as_flower_s() -> None:
    assert_as_flower_s(FedAdagrad(server_lr=0.1, tau=0.5), flower.FedAdagrad(eta=0.1, tau=0.5))


def test_adam_as_flower_s_but_for_the_bias_correction() -> None:
    assert_as_flower_s(FedAdam(server_lr=0.1, tau=0.5), flower.FedAdam(eta=0.1, tau=0.5), bias=True)


def test_yogi_as_flower_s() -> None:
    assert_as_flower_s(FedYogi(server_lr=0.1, tau=0.5), flower.FedYogi(eta=0.1, tau=0.5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FedAdam(server_lr=0), "server_lr must be > 0, got 0"),
        (lambda: FedAvgM(server_momentum=1.0), r"server_momentum must be in \[0, 1\), got 1.0"),
        (lambda: FedAdam(beta_1=-0.1), r"beta_1 must be in \[0, 1\), got -0.1"),
        (lambda: FedYogi(beta_2=1.0), r"beta_2 must be in \[0, 1\), got 1.0"),
        (lambda: FedAdagrad(tau=0), "tau must be > 0, got 0"),
    ],
)
def test_values_outside_their_rule(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
