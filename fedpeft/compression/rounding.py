"""Fewer bits a number: ``float16``, ``bfloat16`` and ``int8`` of the ``compression`` group."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedpeft.compression.base import Codec, Compression, OfUpdate
from fedpeft.state import State, check

SCALES = "compression:scales"


class Rounded(Codec):
    """Rounds to the nearest number of a dtype.

    Args:
        dtype: a floating-point dtype of fewer bits.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def encode(self, state: State, reference: State, rng: np.random.Generator) -> State:
        """See ``Codec.encode``."""
        return {name: self._rounded(name, value) for name, value in state.items()}

    def decode(self, wire: State, reference: Mapping[str, Tensor]) -> State:
        check(wire, {name: value.to(self.dtype) for name, value in reference.items()})
        return {name: wire[name].to(value.dtype) for name, value in reference.items()}

    def _rounded(self, name: str, value: Tensor) -> Tensor:
        rounded = value.to(self.dtype)
        if not torch.isfinite(rounded).all():
            raise ValueError(
                f"{name} reaches {float(value.abs().max()):g}, but {self.dtype} ends at "
                f"{torch.finfo(self.dtype).max:g}: lower lr, or use another compression"
            )
        return rounded


class Levels(Codec):
    """round(v / scale) in -127..127, with scale = max |v| / 127 of each tensor.

    Values are rounded up with the probability of their fraction, so that the mean of what arrives
    is what was sent (QSGD, https://arxiv.org/abs/1610.02132); |error| < scale. The scale of each
    tensor is sent as one float32.
    """

    def encode(self, state: State, reference: State, rng: np.random.Generator) -> State:
        """See ``Codec.encode``."""
        scales = [value.abs().max() / 127 for value in state.values()]
        wire: State = {}
        for (name, value), scale in zip(state.items(), scales, strict=True):
            chance = torch.from_numpy(rng.random(tuple(value.shape), dtype=np.float32))
            levels = value / scale if scale > 0 else torch.zeros_like(value)
            wire[name] = (levels + chance).floor().clamp(-127, 127).to(torch.int8)
        return wire | ({SCALES: torch.stack(scales)} if scales else {})

    def decode(self, wire: State, reference: Mapping[str, Tensor]) -> State:
        expected = {name: value.to(torch.int8) for name, value in reference.items()}
        check(wire, expected | ({SCALES: torch.zeros(len(reference))} if reference else {}))
        names = [name for name in wire if name != SCALES]  # the scales stand in the sender's order
        scales = wire[SCALES] if reference else ()
        return {n: wire[n].float() * scale for n, scale in zip(names, scales, strict=True)}


@dataclass(frozen=True)
class Half(Compression):
    """Two bytes a number, rounded to the nearest.

    Args:
        both: also round what the server sends. There the parameters themselves are rounded, and
            with them the clients' start, from which clients and server compute updates. The server
            adds a round's step to its unrounded values, so that small steps add up.
    """

    both: bool = False

    dtype: ClassVar[torch.dtype]

    @property
    def up(self) -> Codec:
        return OfUpdate(Rounded(self.dtype))

    @property
    def down(self) -> Codec:
        return Rounded(self.dtype) if self.both else super().down


@dataclass(frozen=True)
class Float16(Half):
    """11 significant bits: |error| <= 2^-11 |update|, or 2^-25 where that is more."""

    dtype = torch.float16


@dataclass(frozen=True)
class BFloat16(Half):
    """8 significant bits, float32's range: |error| <= 2^-8 |update|."""

    dtype = torch.bfloat16


@dataclass(frozen=True)
class Int8(Compression):
    """One byte a number of what clients send, see ``Levels``.

    The server sends exact values, because clients that keep nothing have no start to which they
    could add an update.
    """

    @property
    def up(self) -> Codec:
        return OfUpdate(Levels())
