"""Server optimisers: the mean's step is a gradient (https://arxiv.org/abs/2003.00295, Algorithm 2).

Flower's FedAvgM, FedAdagrad, FedAdam and FedYogi are not used, because they need the same keys in
every round, up and down, while methods here may share other parameters in each round, and because
they return float64. On equal keys the numbers are theirs, except that Flower's second moments start
at 0 and not at tau^2, and that Flower's FedAdam corrects the bias of its moments (by a count one
too high) and the paper's does not.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedpeft.algorithms.base import FedAvg, RunFacts, require_plain_mean
from fedpeft.methods.base import Memory, Round
from fedpeft.state import State


@dataclass(frozen=True)
class ServerOptimizer(FedAvg):
    """theta + server_lr * direction(mean - theta), for each parameter that the round shared.

    Moments are kept in float64 by name, from the first round that shares the name; a round that
    does not share it leaves them as they are.

    Args:
        server_lr: learning rate of the server, > 0.
    """

    server_lr: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.server_lr < float("inf"):
            raise ValueError(f"server_lr must be > 0, got {self.server_lr}")

    def check(self, facts: RunFacts) -> None:
        """Refuse a method that aggregates by a rule of its own.

        Factors that it decomposes anew each round have no coordinates for a moment to follow, and
        what it sets beside them fits its result alone. Blocks are allowed, because only the mean is
        used.
        """
        require_plain_mean(self, replace(facts, whole=True))

    def server(self, mean: State, round: Round, memory: Memory) -> State:
        """See ``FedAvg.server``."""
        after: State = {}
        for name, value in mean.items():
            start = round.before[name].double()
            step = self.direction(name, value.double() - start, memory)
            after[name] = (start + self.server_lr * step).to(value.dtype)
        return after

    @abstractmethod
    def direction(self, name: str, delta: Tensor, memory: Memory) -> Tensor:
        """Return one parameter's direction, and bring its moments up to date.

        Args:
            name: the parameter's name.
            delta: the mean's step, in float64.
            memory: holds the moments, by kind and by name; changed in place.
        """


@dataclass(frozen=True)
class FedAvgM(ServerOptimizer):
    """Momentum: m = server_momentum m + delta (https://arxiv.org/abs/1909.06335).

    Args:
        server_momentum: factor of the last m, in [0, 1).
    """

    server_momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        _below_one("server_momentum", self.server_momentum)

    def direction(self, name: str, delta: Tensor, memory: Memory) -> Tensor:
        """See ``ServerOptimizer.direction``."""
        moments = memory.setdefault("momentum", {})
        moments[name] = self.server_momentum * _moment(moments, name, delta) + delta
        return moments[name]


@dataclass(frozen=True)
class Adaptive(ServerOptimizer):
    """m / (sqrt(v) + tau), with m = beta_1 m + (1 - beta_1) delta.

    m begins at 0 and v at tau^2, the least that the paper allows. Flower's begins at 0.

    Args:
        tau: > 0; a smaller one adapts more.
    """

    server_lr: float = 0.01
    tau: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tau < float("inf"):
            raise ValueError(f"tau must be > 0, got {self.tau}")

    def direction(self, name: str, delta: Tensor, memory: Memory) -> Tensor:
        """See ``ServerOptimizer.direction``."""
        second = memory.setdefault("second_moment", {})
        old = _moment(second, name, delta, self.tau**2)
        second[name] = self.second(old, delta.square())
        return self.first(name, delta, memory) / (second[name].sqrt() + self.tau)

    def first(self, name: str, delta: Tensor, memory: Memory) -> Tensor:
        """Return the new m; here beta_1 = 0.

        Args:
            name: the parameter's name.
            delta: the mean's step, in float64.
            memory: holds the moments, by kind and by name; changed in place.
        """
        return delta

    @abstractmethod
    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """Return the new v from the old one and delta^2."""


@dataclass(frozen=True)
class FedAdagrad(Adaptive):
    """Adagrad: v = v + delta^2, and beta_1 = 0 as in the paper's experiments."""

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        return v + square


@dataclass(frozen=True)
class FedAdam(Adaptive):
    """Adam: v = beta_2 v + (1 - beta_2) delta^2.

    Args:
        beta_1: factor of the last m, in [0, 1).
        beta_2: factor of the last v, in [0, 1).
    """

    beta_1: float = 0.9
    beta_2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        _below_one("beta_1", self.beta_1)
        _below_one("beta_2", self.beta_2)

    def first(self, name: str, delta: Tensor, memory: Memory) -> Tensor:
        """See ``Adaptive.first``."""
        moments = memory.setdefault("first_moment", {})
        old = _moment(moments, name, delta)
        moments[name] = self.beta_1 * old + (1 - self.beta_1) * delta
        return moments[name]

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        return self.beta_2 * v + (1 - self.beta_2) * square


@dataclass(frozen=True)
class FedYogi(FedAdam):
    """Yogi: v = v - (1 - beta_2) delta^2 sign(v - delta^2)."""

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        return v - (1 - self.beta_2) * square * torch.sign(v - square)


def _moment(moments: State, name: str, like: Tensor, first: float = 0.0) -> Tensor:
    """Return a parameter's moment; ``first`` before the first round that shares it."""
    return moments[name] if name in moments else torch.full_like(like, first)


def _below_one(key: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{key} must be in [0, 1), got {value}")
