"""Server optimisers by hand, with keys that change by round, and against Flower's own."""

import math

import pytest
import torch
from flwr.serverapp import strategy as flower

from fedpeft.algorithms.base import FedAvg
from fedpeft.algorithms.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi, ServerOptimizer
from fedpeft.methods.base import Round
from fedpeft.state import State
from tests.algorithms.flower import drawn, flowers, ours, record


def given_before(before: State) -> Round:
    """Return a round of which only what clients received counts."""
    return Round(1, [], [], [], before)


def after(
    algorithm: ServerOptimizer, memory: dict[str, State], before: float, mean: float
) -> float:
    """One round of one number."""
    given = [{"a": torch.tensor([value], dtype=torch.float64)} for value in (mean, before)]
    return algorithm.server(given[0], given_before(given[1]), memory)["a"].item()


def test_momentum_by_hand() -> None:
    algorithm, memory = FedAvgM(server_momentum=0.5, server_lr=2.0), {}
    assert after(algorithm, memory, 0.0, 1.0) == 2.0  # m = 1
    assert after(algorithm, memory, 2.0, 3.0) == 5.0  # m = 0.5 + 1 = 1.5


def test_adam_by_hand() -> None:
    algorithm, memory = FedAdam(beta_1=0.5, beta_2=0.75, tau=1.0, server_lr=2.0), {}
    # delta 2: m = 1, v = 0.25 * 4 = 1, 2 * 1 / (1 + 1)
    assert after(algorithm, memory, 0.0, 2.0) == 1.0
    # delta 4: m = 0.5 + 2 = 2.5, v = 0.75 + 4 = 4.75
    assert after(algorithm, memory, 1.0, 5.0) == pytest.approx(1 + 5 / (math.sqrt(4.75) + 1))


def test_adagrad_by_hand() -> None:
    algorithm, memory = FedAdagrad(tau=1.0, server_lr=2.0), {}
    assert after(algorithm, memory, 0.0, 3.0) == 1.5  # v = 9: 2 * 3 / (3 + 1)
    assert after(algorithm, memory, 1.5, 5.5) == pytest.approx(1.5 + 8 / 6)  # v = 25


def test_yogi_by_hand() -> None:
    algorithm, memory = FedYogi(beta_1=0.0, beta_2=0.75, tau=1.0, server_lr=1.0), {}
    assert after(algorithm, memory, 0.0, 2.0) == 1.0  # v = 0 + 0.25 * 4 = 1: 2 / (1 + 1)
    # delta 4: v = 1 + 0.25 * 16 = 5;  delta 1: v = 5 - 0.25 = 4.75, where Adam's would be 4
    assert after(algorithm, memory, 0.0, 4.0) == pytest.approx(4 / (math.sqrt(5) + 1))
    assert after(algorithm, memory, 0.0, 1.0) == pytest.approx(1 / (math.sqrt(4.75) + 1))


ALGORITHMS = [FedAvgM(), FedAdagrad(), FedAdam(), FedYogi()]
by_class = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: type(a).__name__)


@by_class
def test_a_round_without_a_name_leaves_its_moments(algorithm: ServerOptimizer) -> None:
    """a in rounds 1 and 3, b in round 2: as if each had been alone."""
    before = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])}
    first, other = {"a": torch.tensor([1.5, 1.0])}, {"b": torch.tensor([[4.0]])}
    both: dict[str, State] = {}
    alone: dict[str, State] = {}
    for mean in (first, other, first):
        found = algorithm.server(mean, given_before(before), both)
        assert found.keys() == mean.keys()
        if mean is first:
            expected = algorithm.server(mean, given_before(before), alone)
            assert torch.equal(found["a"], expected["a"])
    assert all(set(moments) == {"a", "b"} for moments in both.values())
    fresh = algorithm.server(other, given_before(before), {})
    again = algorithm.server(other, given_before(before), both)
    assert not torch.equal(again["b"], fresh["b"])


@by_class
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_are_kept_and_nothing_is_changed(
    algorithm: ServerOptimizer, dtype: torch.dtype
) -> None:
    mean, before = {"a": torch.ones(2, dtype=dtype)}, {"a": torch.zeros(2, dtype=dtype)}
    after = algorithm.server(mean, given_before(before), {})
    assert after["a"].dtype is dtype and after["a"].all()
    assert mean["a"].tolist() == [1, 1] and before["a"].tolist() == [0, 0]


def test_one_momentumless_step_of_one_is_the_mean() -> None:
    states, before = drawn(1), drawn(2, 1)[0]
    algorithm = FedAvgM(server_momentum=0.0)
    found = ours(algorithm, states, before)
    for name, value in ours(FedAvg(), states, before).items():
        torch.testing.assert_close(found[name], value)


# --- Flower's own, on equal keys -----------------------------------------------------------------


def rounds(algorithm: ServerOptimizer, theirs: flower.FedAvg, bias: bool = False) -> None:
    """Three rounds of five clients, each from where the last one ended."""
    state, memory = drawn(0, 1)[0], {}
    eta = getattr(theirs, "eta", 0.0)
    for round in (1, 2, 3):
        numpy = {n: v.numpy() for n, v in state.items()}
        theirs.current_arrays = record(state) if isinstance(theirs, flower.FedAvgM) else numpy  # type: ignore[attr-defined]
        if bias:  # Flower's correction of Adam's bias, taken back
            theirs.eta = eta * (1 - 0.9 ** (round + 1)) / math.sqrt(1 - 0.99 ** (round + 1))  # type: ignore[attr-defined]
        states = drawn(round)
        expected = flowers(theirs, states, round)
        after = ours(algorithm, states, state, memory)
        for name, value in expected.items():
            torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-5)
            assert (after[name] - state[name]).abs().max() > 1e-3
        state = after


def test_momentum_as_flower_s() -> None:
    theirs = flower.FedAvgM(server_learning_rate=0.5, server_momentum=0.9)
    rounds(FedAvgM(server_lr=0.5, server_momentum=0.9), theirs)


def test_adagrad_as_flower_s() -> None:
    rounds(FedAdagrad(server_lr=0.1, tau=0.01), flower.FedAdagrad(eta=0.1, tau=0.01))


def test_adam_as_flower_s_but_for_the_bias_correction() -> None:
    rounds(FedAdam(server_lr=0.1, tau=0.01), flower.FedAdam(eta=0.1, tau=0.01), bias=True)


def test_yogi_as_flower_s() -> None:
    rounds(FedYogi(server_lr=0.1, tau=0.01), flower.FedYogi(eta=0.1, tau=0.01))


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
