"""What a client does in a round: a function of (seed, round, client)."""

from collections.abc import Callable
from typing import NamedTuple

from fedpeft.algorithms.base import Term
from fedpeft.config.schema import Config
from fedpeft.data.batching import Batch, Examples, training_batches
from fedpeft.methods.base import State
from fedpeft.seeding import generator


class Trained(NamedTuple):
    """What a client's training was."""

    num_examples: int
    loss: float  # mean over the steps
    steps: int
    lr: float  # mean over the steps


class Work(NamedTuple):
    """One client's part of a round.

    Attributes:
        start: values of all parameters that can change.
    """

    client: int
    start: State
    term: Term


class Plan(NamedTuple):
    """What a client does in a round: as many examples as it has, batches, and each step's rate."""

    num_examples: int
    batches: list[Batch]
    rate: Callable[[int], float]

    def done(self, loss: float) -> Trained:
        """It was done, with that mean loss."""
        steps = len(self.batches)
        return Trained(self.num_examples, loss, steps, sum(map(self.rate, range(steps))) / steps)


def plan(config: Config, examples: Examples, steps: int | None, client: int, round: int) -> Plan:
    """A client's batches and rates of a round.

    Args:
        steps: null for ``local_epochs`` passes.
    """
    rows = training_batches(
        examples.lengths,
        config.batch_size,
        steps,
        config.local_epochs,
        generator(config.seed, "batches", round, client),
        config.bucketing,
    )
    batches = [examples.batch(r) for r in rows]

    def rate(step: int) -> float:
        return config.optimizer.rate(config.lr, round, config.num_rounds, step, len(batches))

    return Plan(len(examples), batches, rate)
