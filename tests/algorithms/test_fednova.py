"""FedNova by hand."""

import pytest
import torch

from fedpeft.algorithms.base import FedAvg
from fedpeft.algorithms.fednova import FedNova
from fedpeft.config.load import load_config
from fedpeft.config.schema import ConfigError
from tests.algorithms.aggregation import aggregate, random_states


def test_by_hand() -> None:
    """Clients with weights 1/4 and 3/4 take 4 and 1 steps, and move by 4 and 2.

    So tau_eff is 1.75, and the updates are 1 and 2 a step.
    """
    states = [{"a": torch.tensor([v])} for v in (14.0, 12.0)]
    after = aggregate(FedNova(), states, {"a": torch.tensor([10.0])}, steps=[4, 1])
    assert after["a"].item() == 10 + 1.75 * (0.25 * 1 + 0.75 * 2)  # FedAvg: 12.5


def test_momentum_by_hand() -> None:
    """The gradients of K = 3 steps with rho = 1/2 count 1.75, 1.5 and 1 times."""
    assert FedNova(local_momentum=0.5).norm(3) == pytest.approx(4.25)
    assert FedNova().norm(3) == 3
    states = [{"a": torch.tensor([v])} for v in (4.25, 1.0)]
    after = aggregate(FedNova("uniform", 0.5), states, {"a": torch.tensor([0.0])}, steps=[3, 1])
    assert after["a"].item() == pytest.approx((4.25 + 1) / 2)  # both moved by 1 a gradient


def test_equal_numbers_of_steps_are_the_mean() -> None:
    states, before = random_states(1), random_states(2, 1)[0]
    expected = aggregate(FedAvg(), states, before)
    for name, value in aggregate(FedNova(), states, before, steps=[7] * 5).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)


def test_momentum_is_that_of_the_clients_optimizer() -> None:
    overrides = ["strategy=fednova", "optimizer.name=sgd"]
    assert load_config([*overrides, "optimizer.momentum=0.9"]).strategy.local_momentum == 0.9
    assert load_config(overrides).strategy.local_momentum == 0
    with pytest.raises(ConfigError, match="optimizer.momentum=0.9 is for optimizer.name=sgd"):
        load_config(["strategy=fednova", "optimizer.momentum=0.9"])


def test_values_outside_their_rule() -> None:
    with pytest.raises(ValueError, match=r"local_momentum must be in \[0, 1\), got 1"):
        FedNova(local_momentum=1.0)
