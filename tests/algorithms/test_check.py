"""What algorithms refuse to work with, each with one reason."""

from dataclasses import dataclass

import pytest
from torch import nn

from fedpeft.algorithms.base import FedAvg, Setting
from fedpeft.algorithms.bounds import Centralized, LocalOnly
from fedpeft.algorithms.fednova import FedNova
from fedpeft.algorithms.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from fedpeft.algorithms.fedprox import FedProx
from fedpeft.algorithms.robust import Krum, Median, NormClipping, TrimmedMean
from fedpeft.algorithms.scaffold import Scaffold
from fedpeft.methods.base import Method, Round
from fedpeft.state import State, weighted_mean


@dataclass(frozen=True)
class Plain(Method):
    def inject(self, model: nn.Module) -> nn.Module:
        return model


@dataclass(frozen=True)
class Own(Plain):
    def aggregate(self, round: Round) -> State:
        return weighted_mean(round.states, round.weights)


OPTIMISERS = [FedAvgM(), FedAdagrad(), FedAdam(), FedYogi()]
WHOLE = [FedNova(), Scaffold(), Median(), TrimmedMean(), Krum(), NormClipping()]
OF_ANY = [FedAvg(), FedProx(), LocalOnly()]


def names(algorithm: FedAvg) -> str:
    return type(algorithm).__name__


@pytest.mark.parametrize("algorithm", OPTIMISERS + WHOLE, ids=names)
def test_refused(algorithm: FedAvg) -> None:
    name = type(algorithm).__name__
    algorithm.check(Setting(Plain(), True, True, 5))
    with pytest.raises(ValueError, match=f"strategy {name} .* method Plain shares none here"):
        algorithm.check(Setting(Plain(), False, True, 5))
    with pytest.raises(ValueError, match=f"strategy {name} .* method Own aggregates by a rule"):
        algorithm.check(Setting(Own(), True, True, 5))
    if algorithm in OPTIMISERS:
        algorithm.check(Setting(Plain(), True, False, 5))
    else:
        with pytest.raises(ValueError, match=f"strategy {name} needs whole parameters"):
            algorithm.check(Setting(Plain(), True, False, 5))


@pytest.mark.parametrize("algorithm", OF_ANY, ids=names)
def test_taken(algorithm: FedAvg) -> None:
    for method in (Plain(), Own()):
        for shares in (True, False):
            algorithm.check(Setting(method, shares, False, 1))


def test_one_model_is_whole() -> None:
    Centralized().check(Setting(Own(), True, True, 1))
    with pytest.raises(ValueError, match="strategy Centralized trains one whole model, but .* Own"):
        Centralized().check(Setting(Own(), True, False, 1))


def test_krum_needs_clients() -> None:
    algorithm = Krum(num_malicious=2)
    algorithm.check(Setting(Plain(), True, True, 7))
    with pytest.raises(ValueError, match=r"num_malicious=2 needs .* = 7 clients .* got 6"):
        algorithm.check(Setting(Plain(), True, True, 6))
    Krum(num_selected=4).check(Setting(Plain(), True, True, 5))
    with pytest.raises(ValueError, match="num_selected must be <= .* = 4, got 5"):
        Krum(num_selected=5).check(Setting(Plain(), True, True, 5))


def test_trimming_needs_clients() -> None:
    TrimmedMean(beta=0.2).check(Setting(Plain(), True, True, 5))
    with pytest.raises(ValueError, match=r"beta=0.2 trims .* 0 of 4 at each end"):
        TrimmedMean(beta=0.2).check(Setting(Plain(), True, True, 4))
