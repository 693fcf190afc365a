"""What a federated optimisation algorithm is, and FedAvg (https://arxiv.org/abs/1602.05629)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedpeft.methods.base import Method, Role, State


@dataclass(frozen=True)
class Setting:
    """What an algorithm works with in one run.

    Attributes:
        method: how the clients' states are averaged.
        shares: whether any parameter of the model is shared in some round.
        whole: whether every client trains whole parameters, not blocks of them.
        cohort_size: clients of a round.
    """

    method: Method
    shares: bool
    whole: bool
    cohort_size: int


@dataclass(frozen=True)
class Replies:
    """What a round's clients sent, sorted by client.

    Attributes:
        states: shared parameters: equal keys and shapes.
        weights: summing to 1.
        steps: local steps that each client took.
        extras: what each client's ``Term`` sent beside its parameters.
        share: of all clients, those that these replies came from: |S| / N.
    """

    states: Sequence[State]
    weights: Sequence[float]
    steps: Sequence[int]
    extras: Sequence[State]
    share: float = 1.0


class Term:
    """One client's part of an algorithm in one round; this one does nothing."""

    def correct(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Changes the gradients of the parameters that train, before they are clipped."""

    def finish(self, trained: State, steps: int, lr: float) -> tuple[State, State]:
        """After the last step: what goes to the server beside the parameters, and what is kept.

        Args:
            trained: shared parameters.
            steps: that were taken.
            lr: mean over the steps.
        """
        return {}, {}


@dataclass(frozen=True)
class FedAvg:
    """The mean of the clients' states, as the method averages.

    Args:
        weights: ``examples`` (number of training rows) or ``uniform``.
    """

    weights: str = "examples"

    pooled: ClassVar[bool] = False  # one client trains on all clients' rows

    def __post_init__(self) -> None:
        if self.weights not in ("examples", "uniform"):
            raise ValueError(f"weights must be examples or uniform, got {self.weights}")

    def weigh(self, num_examples: Sequence[int]) -> list[float]:
        """Weights that sum to 1."""
        if self.weights == "uniform":
            return [1 / len(num_examples)] * len(num_examples)
        return [n / sum(num_examples) for n in num_examples]

    def check(self, setting: Setting) -> None:
        """Raises ValueError for a setting that the algorithm makes no sense in."""

    def role(self, role: Role) -> Role:
        """What becomes of a parameter's role by the method."""
        return role

    def term(self, start: State, sent: State, kept: State) -> Term:
        """A client's part of a round.

        Args:
            start: shared parameters, by name, as received.
            sent: what ``down`` gave.
            kept: what ``Term.finish`` last kept on this client; empty the first time.
        """
        return Term()

    def down(self, memory: dict[str, State], shared: State) -> State:
        """What clients get beside the parameters; names, shapes and dtypes follow from ``shared``.

        Args:
            memory: the server's own, from round to round; empty at the beginning.
            shared: values of what is shared this round.
        """
        return {}

    def up(self, shared: State) -> State:
        """What ``Term.finish`` sends beside the parameters: names, shapes and dtypes."""
        return {}

    def server(
        self, mean: State, before: State, replies: Replies, memory: dict[str, State]
    ) -> State:
        """New values, by name, of whatever changes; nothing where the replies are too few for it.

        Args:
            mean: what the method's own aggregation gives.
            before: values of all that can change, as the clients got them.
            memory: the server's own, from round to round.
        """
        return mean


def require_shared(algorithm: FedAvg, setting: Setting) -> None:
    """Refuses a model of which nothing is shared: there is nothing to work on.

    Raises:
        ValueError: as said.
    """
    if not setting.shares:
        raise ValueError(
            f"strategy {type(algorithm).__name__} works on shared parameters, but method "
            f"{type(setting.method).__name__} shares none here: use strategy=fedavg"
        )


def require_plain_mean(algorithm: FedAvg, setting: Setting) -> None:
    """Refuses what an algorithm that replaces or corrects the plain mean cannot go with.

    Raises:
        ValueError: nothing is shared, the method aggregates by a rule of its own, or clients
            train blocks, whose zeros would count as values.
    """
    require_shared(algorithm, setting)
    name, method = type(algorithm).__name__, type(setting.method).__name__
    if not setting.method.averages:
        raise ValueError(
            f"strategy {name} stands on the mean of whole states, but method {method} "
            "aggregates by a rule of its own: use strategy=fedavg or fedprox"
        )
    if not setting.whole:
        raise ValueError(
            f"strategy {name} needs whole parameters of every client, but with method "
            f"{method} some train only a block: use equal ranks, or strategy=fedavg"
        )
