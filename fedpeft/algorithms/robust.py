"""Aggregation that a few malicious or broken clients cannot steer.

- ``Median`` and ``TrimmedMean``, by coordinate (https://arxiv.org/abs/1803.01498).
- ``Krum``, also multi-Krum (https://papers.nips.cc/paper/6617).
- ``NormClipping`` (https://arxiv.org/abs/1911.07963).

Flower's FedMedian, FedTrimmedAvg, Krum and MultiKrum are not used, because they depend on its
sampling and its checks, under which one unusable reply ends the run; on equal replies the numbers
are theirs. Weights are uniform by default, because a client can claim any number of examples.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.algorithms.base import FedAvg, RunFacts, require_plain_mean
from fedpeft.methods.base import Memory, Round
from fedpeft.state import State, weighted_mean


@dataclass(frozen=True)
class Robust(FedAvg):
    """Base of rules that replace the mean of whole states."""

    weights: str = "uniform"

    def check(self, facts: RunFacts) -> None:
        require_plain_mean(self, facts)


@dataclass(frozen=True)
class Coordinatewise(Robust):
    """Base of rules for each coordinate alone, in which all clients weigh alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights != "uniform":
            raise ValueError(
                f"weights must be uniform for {type(self).__name__}, got {self.weights}"
            )

    def server(self, mean: State, round: Round, memory: Memory) -> State:
        """See ``FedAvg.server``."""
        after: State = {}
        for name, value in mean.items():
            stacked = torch.stack([state[name].double() for state in round.states])
            after[name] = self.middle(stacked.sort(dim=0).values).to(value.dtype)
        return after

    @abstractmethod
    def middle(self, values: Tensor) -> Tensor:
        """Reduce values (clients, ...), which rise along the clients, to (...)."""


@dataclass(frozen=True)
class Median(Coordinatewise):
    """The middle value of each coordinate, or the mean of the two middle ones."""

    def middle(self, values: Tensor) -> Tensor:
        n = len(values)
        return values[(n - 1) // 2 : n // 2 + 1].mean(dim=0)


@dataclass(frozen=True)
class TrimmedMean(Coordinatewise):
    """The mean of each coordinate without the floor(beta n) smallest and as many largest values.

    A round with so few usable replies that nothing would be cut off changes nothing.

    Args:
        beta: share of the clients cut off at each end, in (0, 0.5).
    """

    beta: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta < 0.5:
            raise ValueError(
                f"beta must be in (0, 0.5): 0 trims nothing, 0.5 everything; got {self.beta}"
            )

    def cut(self, n: int) -> int:
        """Return how many of n values are cut off at each end."""
        return math.floor(self.beta * n + 1e-9)  # 0.29 * 100 is 28.999...

    def check(self, facts: RunFacts) -> None:
        super().check(facts)
        if self.cut(facts.cohort_size) == 0:
            raise ValueError(
                f"strategy.beta={self.beta} trims floor(beta x clients per round) = 0 of "
                f"{facts.cohort_size} at each end: need beta x clients per round >= 1"
            )

    def server(self, mean: State, round: Round, memory: Memory) -> State:
        """See ``FedAvg.server``."""
        if self.cut(len(round.states)) == 0:
            return {}
        return super().server(mean, round, memory)

    def middle(self, values: Tensor) -> Tensor:
        cut = self.cut(len(values))
        return values[cut : len(values) - cut].mean(dim=0)


@dataclass(frozen=True)
class Krum(Robust):
    """The mean of the states that lie closest to their n - num_malicious - 2 nearest others.

    Of equal scores the lower client's state is chosen. A round with fewer than 2 num_malicious + 3
    usable replies changes nothing, because the guarantee does not hold for it.

    Args:
        num_malicious: number of clients a round that may send anything, >= 0.
        num_selected: number of states that are averaged; 1 is Krum, more is multi-Krum. At most all
            of a round's usable replies but ``num_malicious`` are averaged.
    """

    num_malicious: int = 1
    num_selected: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_malicious < 0:
            raise ValueError(f"num_malicious must be >= 0, got {self.num_malicious}")
        if self.num_selected < 1:
            raise ValueError(f"num_selected must be >= 1, got {self.num_selected}")

    @property
    def least(self) -> int:
        """Least number of clients that a round needs."""
        return 2 * self.num_malicious + 3

    def check(self, facts: RunFacts) -> None:
        super().check(facts)
        n = facts.cohort_size
        if n < self.least:
            raise ValueError(
                f"strategy.num_malicious={self.num_malicious} needs 2 x num_malicious + 3 = "
                f"{self.least} clients a round or more, got {n}"
            )
        if self.num_selected > n - self.num_malicious:
            raise ValueError(
                "strategy.num_selected must be <= clients per round - num_malicious = "
                f"{n - self.num_malicious}, got {self.num_selected}"
            )

    def select(self, states: Sequence[State]) -> list[int]:
        """Return the numbers of the chosen states, best score first."""
        updates = _flat(states)
        squares = torch.stack([(updates - one).square().sum(dim=1) for one in updates])
        closest = len(states) - self.num_malicious - 2
        scores = squares.sort(dim=1).values[:, 1 : 1 + closest].sum(dim=1)  # 0 is itself
        count = min(self.num_selected, len(states) - self.num_malicious)
        return scores.sort(stable=True).indices[:count].tolist()

    def server(self, mean: State, round: Round, memory: Memory) -> State:
        """See ``FedAvg.server``."""
        if len(round.states) < self.least:
            return {}
        chosen = self.select(round.states)
        total = sum(round.weights[i] for i in chosen)
        weights = [round.weights[i] / total for i in chosen]
        return weighted_mean([round.states[i] for i in chosen], weights)


@dataclass(frozen=True)
class NormClipping(Robust):
    """The mean of updates shortened to ``max_norm``, over all shared parameters together.

    Args:
        max_norm: > 0, in units of the parameters; null for the median of the round's norms.
    """

    max_norm: float | None = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_norm is not None and not 0 < self.max_norm < float("inf"):
            raise ValueError(f"max_norm must be > 0 or null, got {self.max_norm}")

    def server(self, mean: State, round: Round, memory: Memory) -> State:
        """See ``FedAvg.server``."""
        start = {name: round.before[name] for name in round.states[0]}
        norms = (_flat(round.states) - _flat([start])).norm(dim=1)
        limit = float(norms.quantile(0.5)) if self.max_norm is None else self.max_norm
        scales = [min(1.0, limit / norm) if norm > 0 else 1.0 for norm in norms.tolist()]
        after: State = {}
        for name, value in start.items():
            total = value.double()
            for state, weight, scale in zip(round.states, round.weights, scales, strict=True):
                total = total + weight * scale * (state[name].double() - value.double())
            after[name] = total.to(value.dtype)
        return after


def _flat(states: Sequence[State]) -> Tensor:
    """Return states as a matrix (states, numbers), in float64."""
    names = list(states[0])
    return torch.stack([torch.cat([s[n].double().reshape(-1) for n in names]) for s in states])
