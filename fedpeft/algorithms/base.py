"""The base of federated algorithms, which is FedAvg (https://arxiv.org/abs/1602.05629)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from fedpeft.methods.base import Memory, Method, Round, Term
from fedpeft.state import Role, State


@dataclass(frozen=True)
class RunFacts:
    """The facts of a run by which an algorithm or a compression may refuse it.

    Attributes:
        method: the run's method, which aggregates the clients' states.
        shares: true if any parameter of the model is shared in some round.
        whole: true if every client trains whole parameters, not blocks of them.
        cohort_size: clients of a round.
        optimizer: name of the clients' optimizer, ``adamw`` or ``sgd``.
    """

    method: Method
    shares: bool
    whole: bool
    cohort_size: int
    optimizer: str


@dataclass(frozen=True)
class FedAvg:
    """The method's aggregate of the clients' states, as it is; other algorithms derive from it.

    Args:
        weights: rule for the clients' weights: ``examples`` (number of training rows) or
            ``uniform``.
        max_weight: share of a round, in (0, 1], beyond which no client weighs. Null means 1, but
            0.5 in a round with a client that trains on rows of its own, because the server cannot
            check how many these are.
        max_norm_ratio: > 1. A client is left out of a round if the norm of its update, divided by
            its steps, is more than this many times the median of the round, or the largest of
            the good rounds before it if that is larger.
    """

    weights: str = "examples"
    max_weight: float | None = field(default=None, kw_only=True)
    max_norm_ratio: float = field(default=100.0, kw_only=True)

    pooled: ClassVar[bool] = False  # one client trains on all clients' rows

    def __post_init__(self) -> None:
        if self.weights not in ("examples", "uniform"):
            raise ValueError(f"weights must be examples or uniform, got {self.weights}")
        if self.max_weight is not None and not 0 < self.max_weight <= 1:
            raise ValueError(f"max_weight must be in (0, 1] or null, got {self.max_weight}")
        if not self.max_norm_ratio > 1:
            raise ValueError(f"max_norm_ratio must be > 1, got {self.max_norm_ratio}")

    def weigh(self, num_examples: Sequence[int]) -> list[float]:
        """Return the clients' weights, which sum to 1, from their numbers of training rows."""
        if self.weights == "uniform":
            return [1 / len(num_examples)] * len(num_examples)
        return [n / sum(num_examples) for n in num_examples]

    def check(self, facts: RunFacts) -> None:
        """Raise ValueError if the algorithm makes no sense in the run."""

    def role(self, role: Role) -> Role:
        """Return the algorithm's role of a parameter that has this role by the method."""
        return role

    def term(self, start: State, sent: State, kept: State) -> Term:
        """Return a client's correction of its gradients.

        Args:
            start: shared parameters, full, as the client starts the round.
            sent: state that ``down`` returned on the server.
            kept: state that ``Term.finish`` last kept on this client; empty the first time.
        """
        return Term()

    def down(self, memory: Memory, shared: State) -> State:
        """Return the state that clients get beside the parameters.

        Args:
            memory: the algorithm's memory, which lasts from round to round; empty at the beginning.
            shared: values of the parameters that are shared this round, full. Names, shapes and
                dtypes of the result must follow from it alone, because clients check them.
        """
        return {}

    def up(self, shared: State) -> State:
        """Return a state with the names, shapes and dtypes of the state that ``Term.finish`` sends.

        Args:
            shared: values of the parameters that are shared this round, full.
        """
        return {}

    def server(self, mean: State, round: Round, memory: Memory) -> State:
        """Return new values, by name, of whatever changes; nothing if the replies are too few.

        Args:
            mean: result of the method's aggregation, full.
            round: everything that the round's clients sent and received.
            memory: the algorithm's memory, which lasts from round to round, changed in place; empty
                at the beginning.
        """
        return mean


def require_shared(algorithm: FedAvg, facts: RunFacts) -> None:
    """Refuse a model of which nothing is shared, because there is nothing to work on.

    Args:
        algorithm: names itself in the error.
        facts: the facts of the run.

    Raises:
        ValueError: no parameter is shared.
    """
    if not facts.shares:
        raise ValueError(
            f"strategy {type(algorithm).__name__} works on shared parameters, but method "
            f"{type(facts.method).__name__} shares none here: use strategy=fedavg"
        )


def require_plain_mean(algorithm: FedAvg, facts: RunFacts) -> None:
    """Refuse a run in which an algorithm cannot replace or correct the plain mean.

    Args:
        algorithm: names itself in the error.
        facts: the facts of the run.

    Raises:
        ValueError: nothing is shared, the method aggregates by a rule of its own, or clients
            train blocks, whose zeros would count as values.
    """
    require_shared(algorithm, facts)
    name, method = type(algorithm).__name__, type(facts.method).__name__
    if not facts.method.averages:
        raise ValueError(
            f"strategy {name} stands on the mean of whole states, but method {method} "
            "aggregates by a rule of its own: use strategy=fedavg or fedprox"
        )
    if not facts.whole:
        raise ValueError(
            f"strategy {name} needs whole parameters of every client, but with method "
            f"{method} some train only a block: use equal ranks, or strategy=fedavg"
        )
