"""Algorithms refuse methods and numbers of clients that they cannot work with."""

from dataclasses import dataclass

import pytest
from torch import nn

from fedpeft.algorithms.base import FedAvg, RunFacts
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
    """A method that leaves aggregation to the algorithm."""

    def inject(self, model: nn.Module) -> nn.Module:
        return model


@dataclass(frozen=True)
class WithRule(Plain):
    """A method that has its own rule of aggregation."""

    def aggregate(self, round: Round) -> State:
        return weighted_mean(round.states, round.weights)


OPTIMISERS = [FedAvgM(), FedAdagrad(), FedAdam(), FedYogi()]  # take blocks of parameters too
WHOLE_ONLY = [FedNova(), Scaffold(), Median(), TrimmedMean(), Krum(), NormClipping()]
FOR_ANY_METHOD = [FedAvg(), FedProx(), LocalOnly()]


def name_of(value: object) -> str:
    return type(value).__name__


def facts(
    method: Method,
    shares: bool = True,
    whole: bool = True,
    clients: int = 5,
    optimizer: str = "sgd",
) -> RunFacts:
    """Return the facts of a run by which an algorithm is checked.

    Args:
        method: the run's method.
        shares: true if any parameter is shared.
        whole: true if every client trains whole parameters, not blocks.
        clients: number of clients of a round.
        optimizer: the clients' optimizer, ``adamw`` or ``sgd``.
    """
    return RunFacts(method, shares, whole, clients, optimizer)


def refusal(algorithm: FedAvg, facts: RunFacts) -> str | None:
    """Return the sentence by which an algorithm refuses a run; null if it takes it."""
    try:
        algorithm.check(facts)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("algorithm", OPTIMISERS + WHOLE_ONLY, ids=name_of)
def test_methods_that_share_nothing_or_aggregate_are_refused(algorithm: FedAvg) -> None:
    name = name_of(algorithm)
    algorithm.check(facts(Plain()))
    with pytest.raises(ValueError, match=f"strategy {name} .* method Plain shares none here"):
        algorithm.check(facts(Plain(), shares=False))
    with pytest.raises(ValueError, match=f"strategy {name} .* WithRule aggregates by a rule"):
        algorithm.check(facts(WithRule()))


@pytest.mark.parametrize("algorithm", OPTIMISERS, ids=name_of)
def test_server_optimisers_take_blocks(algorithm: FedAvg) -> None:
    assert refusal(algorithm, facts(Plain(), whole=False)) is None


@pytest.mark.parametrize("algorithm", WHOLE_ONLY, ids=name_of)
def test_blocks_are_refused(algorithm: FedAvg) -> None:
    with pytest.raises(ValueError, match=f"strategy {name_of(algorithm)} needs whole parameters"):
        algorithm.check(facts(Plain(), whole=False))


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("method", [Plain(), WithRule()], ids=name_of)
@pytest.mark.parametrize("algorithm", FOR_ANY_METHOD, ids=name_of)
def test_algorithms_for_any_method(algorithm: FedAvg, method: Method, shares: bool) -> None:
    assert refusal(algorithm, facts(method, shares=shares, whole=False, clients=1)) is None


def test_one_model_is_whole() -> None:
    Centralized().check(facts(WithRule(), clients=1))
    with pytest.raises(ValueError, match="Centralized trains one whole model, but .* WithRule"):
        Centralized().check(facts(WithRule(), whole=False, clients=1))


def test_krum_needs_clients() -> None:
    algorithm = Krum(num_malicious=2)
    algorithm.check(facts(Plain(), clients=7))
    with pytest.raises(ValueError, match=r"num_malicious=2 needs .* = 7 clients .* got 6"):
        algorithm.check(facts(Plain(), clients=6))
    Krum(num_selected=4).check(facts(Plain()))
    with pytest.raises(ValueError, match="num_selected must be <= .* = 4, got 5"):
        Krum(num_selected=5).check(facts(Plain()))


def test_trimming_needs_clients() -> None:
    TrimmedMean(beta=0.2).check(facts(Plain()))
    with pytest.raises(ValueError, match=r"beta=0.2 trims .* 0 of 4 at each end"):
        TrimmedMean(beta=0.2).check(facts(Plain(), clients=4))


def test_scaffold_wants_plain_steps() -> None:
    with pytest.raises(ValueError, match="optimizer.name=sgd, because .* got optimizer.name=adamw"):
        Scaffold().check(facts(Plain(), optimizer="adamw"))
