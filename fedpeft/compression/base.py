"""Codecs of states on the wire, one for each direction.

A client compresses its update, its parameters minus their start, because an update is far smaller
than the parameters and so loses far less. The server knows the start and adds it. A strategy's
extras start from zero.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from fedpeft.algorithms.base import RunFacts
from fedpeft.state import State, check

ERROR = "error:"  # prefix of a client's kept errors, the part of its updates that was not sent


class Codec(ABC):
    """Turns a state into its form on the wire and back."""

    exact: ClassVar[bool] = False  # true if ``decode`` returns what ``encode`` got, bit for bit

    @abstractmethod
    def encode(self, state: State, reference: State, rng: np.random.Generator) -> State:
        """Return the wire form of a state.

        Args:
            state: block or full, with the names and shapes of ``reference``.
            reference: a state that both sides know.
            rng: draws of stochastic rounding.
        """

    @abstractmethod
    def decode(self, wire: State, reference: Mapping[str, Tensor]) -> State:
        """Return the state, with the names, shapes and dtypes of ``reference``.

        Raises:
            ValueError: the wire holds something that ``encode`` never gives.
        """


class Exact(Codec):
    """Sends a state as it is."""

    exact = True

    def encode(self, state: State, reference: State, rng: np.random.Generator) -> State:
        """See ``Codec.encode``."""
        return state

    def decode(self, wire: State, reference: Mapping[str, Tensor]) -> State:
        check(wire, reference)
        return wire


class OfUpdate(Codec):
    """Sends state - reference through another codec.

    Args:
        inner: codes the difference, in float32.
    """

    def __init__(self, inner: Codec) -> None:
        self.inner = inner

    def encode(self, state: State, reference: State, rng: np.random.Generator) -> State:
        """See ``Codec.encode``."""
        return self.inner.encode(update(state, reference), reference, rng)

    def decode(self, wire: State, reference: Mapping[str, Tensor]) -> State:
        change = self.inner.decode(wire, {n: v.float() for n, v in reference.items()})
        return {n: (v.float() + change[n]).to(v.dtype) for n, v in reference.items()}

    def encode_with_error(
        self, state: State, reference: State, error: State, rng: np.random.Generator
    ) -> tuple[State, State]:
        """Encode with error feedback (https://arxiv.org/abs/1809.07599).

        Args:
            state: block or full.
            reference: the state that the update starts from, with the same names and shapes.
            error: parts of earlier rounds' updates that were not sent, by name; added to this
                round's update.
            rng: draws of stochastic rounding.

        Returns:
            The wire form, and every error to keep: this round's, and older ones of other names.
        """
        change = {n: v + error[n] if n in error else v for n, v in update(state, reference).items()}
        wire = self.inner.encode(change, reference, rng)
        sent = self.inner.decode(wire, change)
        return wire, error | {name: value - sent[name] for name, value in change.items()}


def update(state: State, reference: Mapping[str, Tensor]) -> State:
    """Return state - reference in float32."""
    return {name: value.float() - reference[name].float() for name, value in state.items()}


def stepped(after: State, before: State, values: State) -> State:
    """Add the step from ``before`` to ``after`` to the exact ``values``.

    The server does this if clients received a lossy copy ``before`` of ``values``, so that small
    steps are not lost to rounding.

    Args:
        after: new values, full, computed from ``before``.
        before: values as the clients received them, full.
        values: the server's exact values, full.

    Returns:
        A state with the names and dtypes of ``after``.
    """
    return {
        name: (values[name].double() + value.double() - before[name].double()).to(value.dtype)
        for name, value in after.items()
    }


@dataclass(frozen=True)
class Compression:
    """Both directions send states as they are; other compressions derive from it."""

    feedback: ClassVar[bool] = False  # a client adds what it did not send to its next update

    @property
    def up(self) -> Codec:
        """Codec of what clients send; its reference is what they started from."""
        return Exact()

    @property
    def down(self) -> Codec:
        """Codec of what the server sends.

        Its reference is used for names, shapes and dtypes alone, because a client that keeps
        nothing between rounds knows no older values.
        """
        return Exact()

    def check(self, facts: RunFacts) -> None:
        """Raise ValueError if the compression makes no sense in the run."""
