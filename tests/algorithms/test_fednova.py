"""FedNova by hand."""

import pytest
import torch

from fedpeft.algorithms.base import FedAvg
from fedpeft.algorithms.fednova import FedNova
from fedpeft.config.load import load_config
from fedpeft.config.schema import ConfigError
from tests.algorithms.flower import drawn, ours


def test_by_hand() -> None:
    """Weights 1/4 and 3/4, 4 and 1 steps: tau_eff = 1.75; updates 4 and 2 make 1 and 2 a step."""
    states = [{"a": torch.tensor([v])} for v in (14.0, 12.0)]
    after = ours(FedNova(), states, {"a": torch.tensor([10.0])}, steps=[4, 1])
    assert after["a"].item() == 10 + 1.75 * (0.25 * 1 + 0.75 * 2)  # FedAvg: 12.5


def test_momentum_by_hand() -> None:
    """Of K = 3 steps with rho = 1/2 the gradients count 1.75, 1.5 and 1 times."""
    assert FedNova(local_momentum=0.5).norm(3) == pytest.approx(4.25)
    assert FedNova().norm(3) == 3
    states = [{"a": torch.tensor([v])} for v in (4.25, 1.0)]
    after = ours(FedNova("uniform", 0.5), states, {"a": torch.tensor([0.0])}, steps=[3, 1])
    assert after["a"].item() == pytest.approx((4.25 + 1) / 2)  # both moved 1 a gradient


def test_equal_numbers_of_steps_are_the_mean() -> None:
    states, before = drawn(1), drawn(2, 1)[0]
    expected = ours(FedAvg(), states, before)
    for name, value in ours(FedNova(), states, before, steps=[7] * 5).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)


def test_momentum_is_the_clients() -> None:
    given = ["strategy=fednova", "optimizer.name=sgd"]
    assert load_config([*given, "optimizer.momentum=0.9"]).strategy.local_momentum == 0.9
    assert load_config(given).strategy.local_momentum == 0
    with pytest.raises(ConfigError, match="optimizer.momentum=0.9 is for optimizer.name=sgd"):
        load_config(["strategy=fednova", "optimizer.momentum=0.9"])


def test_values_outside_their_rule() -> None:
    with pytest.raises(ValueError, match=r"local_momentum must be in \[0, 1\), got 1"):
        FedNova(local_momentum=1.0)
