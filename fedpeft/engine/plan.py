"""A client's batches and learning rates in a round: a function of (seed, round, client, phase)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from fedpeft.config.schema import Config
from fedpeft.data.batching import Batch, Examples, training_batches
from fedpeft.methods.base import At, Phase, Term
from fedpeft.seeding import generator
from fedpeft.state import State

WEIGHT = "weight"  # key of a part's share of the step's loss, in a batch that is a part


class Trained(NamedTuple):
    """Counts and means of one client's training.

    Attributes:
        num_examples: rows that the client has.
        loss: mean over all steps of all phases.
        steps: number of steps in phases that train shared parameters; in all phases if none does.
        lr: mean learning rate of these steps.
    """

    num_examples: int
    loss: float
    steps: int
    lr: float


class Job(NamedTuple):
    """One client's part of a round.

    Attributes:
        at: the round and the client.
        start: all parameters that can change, full.
        terms: corrections of gradients, in order.
        moments: the optimizer's state of earlier rounds; empty for a fresh one.
    """

    at: At
    start: State
    terms: Sequence[Term] = ()
    moments: State = {}  # noqa: RUF012

    @property
    def client(self) -> int:
        """The client's number."""
        assert self.at.client is not None
        return self.at.client


class Part(NamedTuple):
    """A phase of one client in which something trains.

    Attributes:
        path: round, client and, after the first phase, its number: the place of the draws.
        phase: the method's phase.
        names: parameters that train.
    """

    path: list[int]
    phase: Phase
    names: list[str]


class Ended(NamedTuple):
    """A part that was trained.

    Attributes:
        names: parameters that trained.
        plan: the batches and rates.
        loss: mean loss over the plan's steps.
    """

    names: list[str]
    plan: "Plan"
    loss: float


class Plan(NamedTuple):
    """The batches and learning rates of one client's phase.

    Attributes:
        num_examples: rows that the client has.
        steps: each step's batch, or parts of its batch with ``WEIGHT``.
        rate: learning rate of step 0, 1, ....
    """

    num_examples: int
    steps: list[list[Batch]]
    rate: Callable[[int], float]


def plan(config: Config, examples: Examples, steps: int | None, path: Sequence[int]) -> Plan:
    """Draw the batches of a phase.

    Args:
        config: batch size, epochs, learning rate and schedule.
        examples: the client's training rows.
        steps: number of steps of the round; null for ``local_epochs`` passes over the rows.
        path: round, client and, except for the first phase, the phase's number; it seeds the draws.
    """
    draws = generator(config.seed, "batches", *path)
    rows = training_batches(
        examples.lengths, config.batch_size, steps, config.local_epochs, draws, config.bucketing
    )
    batches = [_parts(config, examples, chosen) for chosen in rows]

    def rate(step: int) -> float:
        return config.optimizer.rate(config.lr, path[0], config.num_rounds, step, len(batches))

    return Plan(len(examples), batches, rate)


def num_steps(config: Config, rows: int) -> int:
    """Return how many steps a client of so many training rows takes in a phase."""
    return config.local_steps or -(-rows // config.batch_size) * (config.local_epochs or 1)


def _parts(config: Config, examples: Examples, rows: np.ndarray) -> list[Batch]:
    """Return the batch of a step, or its parts with their shares of the loss."""
    if config.accumulate == 1 or len(rows) == 1:
        return [examples.batch(rows)]
    cut = np.array_split(rows, min(config.accumulate, len(rows)))
    batches = [examples.batch(part) for part in cut]
    batches = [batch for batch in batches if config.data.terms(batch)]  # no terms: loss is NaN
    if len(batches) < 2:
        return [examples.batch(rows)]
    terms = [config.data.terms(batch) for batch in batches]
    return [
        batch | {WEIGHT: torch.tensor(count / sum(terms))}
        for batch, count in zip(batches, terms, strict=True)
    ]
