"""What goes on the wire in place of a state, and the state again: the ``compression`` group.

A client compresses its update, what it sends minus what it started from, which is far smaller than
the parameters and so loses far less; the server, which knows the start, adds it. A strategy's
extras start from zero. The start is exact on both sides, so a run has one meaning of every number.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedpeft.algorithms.base import Setting
from fedpeft.methods.base import State
from fedpeft.state import check

ERROR = "error:"  # what a client keeps of what it did not send
SCALES = "compression:scales"


@dataclass(frozen=True)
class Compression:
    """Everything is sent as it is."""

    def check(self, setting: Setting) -> None:
        """Raises ValueError for a setting that the compression makes no sense in."""

    def compress(
        self, state: State, start: State, error: State, rng: np.random.Generator
    ) -> tuple[State, State]:
        """What a client sends, and what it keeps of the rest.

        Args:
            state: what is to arrive.
            start: the same names, as both sides know them.
            error: what was kept in an earlier round, by name.
            rng: for rounding.
        """
        return state, error

    def restore(self, wire: State, start: State) -> State:
        """What arrived, on the server.

        Raises:
            ValueError: it is nothing that ``compress`` gives.
        """
        return wire

    def down(self, state: State) -> State:
        """What the server sends."""
        return state

    def received(self, wire: State, expected: Mapping[str, Tensor]) -> State:
        """What arrived, on a client, in the names, shapes and dtypes of ``expected``.

        Raises:
            ValueError: it is nothing that ``down`` gives.
        """
        check(wire, expected)
        return wire

    def kept(self, after: State, before: State, values: State) -> State:
        """What a round's result makes of the server's own values, by name.

        Args:
            after: the result, as the strategy reckoned it from ``before``.
            before: what the clients got, in place of ``values``.
            values: what the server had.
        """
        return after


@dataclass(frozen=True)
class OfUpdates(Compression):
    """Compresses theta - theta_start."""

    feedback: ClassVar[bool] = False  # what is not sent is added to the next update

    def compress(
        self, state: State, start: State, error: State, rng: np.random.Generator
    ) -> tuple[State, State]:
        update = {name: value.float() - start[name].float() for name, value in state.items()}
        if not self.feedback:
            return self.encode(update, rng), error
        update = {n: v + error[n] if n in error else v for n, v in update.items()}
        wire = self.encode(update, rng)
        sent = self.decode(wire, update)
        return wire, error | {name: value - sent[name] for name, value in update.items()}

    def restore(self, wire: State, start: State) -> State:
        update = self.decode(wire, start)
        return {n: (v.float() + update[n]).to(v.dtype) for n, v in start.items()}

    @abstractmethod
    def encode(self, update: State, rng: np.random.Generator) -> State:
        """The update on the wire."""

    @abstractmethod
    def decode(self, wire: State, like: State) -> State:
        """The update in float32, of the names and shapes of ``like``."""


@dataclass(frozen=True)
class Half(OfUpdates):
    """Two bytes a number, rounded to the nearest.

    Args:
        both: also what the server sends; there it is the parameters themselves that are rounded,
            and the clients' start, from which they and the server reckon updates, with them. The
            server adds a round's step to its own, unrounded values, so that small ones add up.
    """

    both: bool = False

    dtype: ClassVar[torch.dtype]

    def encode(self, update: State, rng: np.random.Generator) -> State:
        return {name: self._half(name, value) for name, value in update.items()}

    def decode(self, wire: State, like: State) -> State:
        check(wire, {name: value.to(self.dtype) for name, value in like.items()})
        return {name: wire[name].float() for name in like}

    def down(self, state: State) -> State:
        return {n: self._half(n, v) for n, v in state.items()} if self.both else state

    def received(self, wire: State, expected: Mapping[str, Tensor]) -> State:
        if not self.both:
            return super().received(wire, expected)
        check(wire, {name: value.to(self.dtype) for name, value in expected.items()})
        return {name: value.to(expected[name].dtype) for name, value in wire.items()}

    def kept(self, after: State, before: State, values: State) -> State:
        return stepped(after, before, values) if self.both else after

    def _half(self, name: str, value: Tensor) -> Tensor:
        half = value.to(self.dtype)
        if not torch.isfinite(half).all():
            raise ValueError(
                f"{name} reaches {float(value.abs().max()):g}, but {self.dtype} ends at "
                f"{torch.finfo(self.dtype).max:g}: lower lr, or use another compression"
            )
        return half


@dataclass(frozen=True)
class Float16(Half):
    """11 significant bits: |error| <= 2^-11 |update|, or 2^-25 where that is more."""

    dtype = torch.float16


@dataclass(frozen=True)
class BFloat16(Half):
    """8 significant bits, float32's range: |error| <= 2^-8 |update|."""

    dtype = torch.bfloat16


@dataclass(frozen=True)
class Int8(OfUpdates):
    """round(update / scale) in -127..127, scale = max |update| / 127 of each tensor.

    Rounded up with the probability of the fraction, so that the mean of what arrives is what was
    sent (QSGD, https://arxiv.org/abs/1610.02132); |error| < scale. One float32 a tensor goes along.
    Up only: there is no start from which clients that keep nothing could reckon one down.
    """

    def encode(self, update: State, rng: np.random.Generator) -> State:
        scales = [value.abs().max() / 127 for value in update.values()]
        wire: State = {}
        for (name, value), scale in zip(update.items(), scales, strict=True):
            chance = torch.from_numpy(rng.random(tuple(value.shape), dtype=np.float32))
            levels = value / scale if scale > 0 else torch.zeros_like(value)
            wire[name] = (levels + chance).floor().clamp(-127, 127).to(torch.int8)
        return wire | ({SCALES: torch.stack(scales)} if scales else {})

    def decode(self, wire: State, like: State) -> State:
        expected = {name: value.to(torch.int8) for name, value in like.items()}
        check(wire, expected | ({SCALES: torch.zeros(len(like))} if like else {}))
        names = [name for name in wire if name != SCALES]  # in the sender's order
        scales = wire[SCALES] if like else ()
        return {n: wire[n].float() * scale for n, scale in zip(names, scales, strict=True)}


def stepped(after: State, before: State, values: State) -> State:
    """``values`` and the step from ``before`` to ``after``."""
    return {
        name: (values[name].double() + value.double() - before[name].double()).to(value.dtype)
        for name, value in after.items()
    }
