"""Only the largest entries on the wire: ``topk`` and ``topk_both`` of ``compression``."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedpeft.algorithms.base import Setting
from fedpeft.compression import largest
from fedpeft.compression.base import Codec, Compression, OfUpdate
from fedpeft.state import STRATEGY, State, check, prefixed, split_prefixed

VECTOR = "compression:vector"  # all parameters in one


class Largest(Codec):
    """The entries of largest magnitude of each tensor, as values and their places.

    Args:
        share: of a tensor's entries, in (0, 1]; one entry at least.
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def encode(self, state: State, reference: State, rng: np.random.Generator) -> State:
        wire: State = {}
        for name, value in state.items():
            count = largest.count(self.share, value.numel())
            wire |= largest.encoded(name, value.reshape(-1), count)
        return wire

    def decode(self, wire: State, reference: Mapping[str, Tensor]) -> State:
        expected: State = {}
        for name, value in reference.items():
            count = largest.count(self.share, value.numel())
            expected |= largest.expected(name, value.numel(), count)
        check(wire, expected)
        return {
            name: largest.decoded(name, wire, value.numel()).reshape(value.shape)
            for name, value in reference.items()
        }


class LargestOfAll(Codec):
    """The entries of largest magnitude of all parameters as one vector, in the order of names.

    A strategy's extras go whole: on another scale, they or the parameters would take all places.

    Args:
        share: of the vector's entries, in (0, 1]; one entry at least.
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def encode(self, state: State, reference: State, rng: np.random.Generator) -> State:
        floats = {name: value.float() for name, value in state.items()}
        parameters, extras = split_prefixed(floats)
        wire = prefixed(extras, STRATEGY)
        if parameters:
            flat = torch.cat([parameters[name].reshape(-1) for name in sorted(parameters)])
            wire |= largest.encoded(VECTOR, flat, largest.count(self.share, flat.numel()))
        return wire

    def decode(self, wire: State, reference: Mapping[str, Tensor]) -> State:
        parameters, extras = split_prefixed(dict(reference))
        sizes = {name: parameters[name].numel() for name in sorted(parameters)}
        numel = sum(sizes.values())
        wanted = prefixed({name: value.float() for name, value in extras.items()}, STRATEGY)
        if parameters:
            wanted |= largest.expected(VECTOR, numel, largest.count(self.share, numel))
        check(wire, wanted)
        found = {name: value for name, value in wire.items() if name in reference}
        if parameters:
            parts = largest.decoded(VECTOR, wire, numel).split(list(sizes.values()))
            found |= {n: p.reshape(reference[n].shape) for n, p in zip(sizes, parts, strict=True)}
        return {name: found[name].to(value.dtype) for name, value in reference.items()}


@dataclass(frozen=True)
class TopK(Compression):
    """The entries of largest magnitude of each tensor of a client's update.

    The client keeps what is left out and adds it to its next update (error feedback). A client
    whose reply is lost has kept the error as if it had arrived. Clients alone compress, and only
    for methods whose server takes the mean: where it sets factors anew, what was kept would be
    added to other factors.

    Args:
        ratio: share of a tensor's entries that is sent, in (0, 1]; one at least. Each takes 4
            bytes; the places take a bit for each entry of the tensor, or 4 bytes for each that is
            sent where that is not more.
    """

    ratio: float = 0.1

    feedback = True

    def __post_init__(self) -> None:
        largest.check_share("ratio", self.ratio)

    @property
    def up(self) -> Codec:
        return OfUpdate(Largest(self.ratio))

    def check(self, setting: Setting) -> None:
        if not setting.method.averages:
            raise ValueError(
                "compression TopK adds what a client did not send to its next update, but method "
                f"{type(setting.method).__name__} may have set the parameters anew by a rule of "
                "its own: use compression=int8 or none"
            )


@dataclass(frozen=True)
class TopKBoth(Compression):
    """The entries of largest magnitude of all that is sent, both ways: FLASC's communication.

    https://arxiv.org/abs/2406.05233. The server keeps dense parameters P and sends their k largest
    entries; a client takes zero for the others, trains all, and sends the k largest entries of its
    update. What it leaves out is lost (no error feedback). The server adds the strategy's step,
    reckoned from what clients got, to P: what is not sent in a round is not forgotten.

    All parameters are one vector, in the order of their names, and k the integer nearest to
    density times its length, one at least. Open in the paper: the head stands in the vector (the
    authors' code has it both ways); of equals the earlier entry goes; the first round is like the
    others, so that, B being zero, LoRA's A and the head are sent. What the server changed but does
    not train in a round stands in the vector too, what is never sent is as it was. A strategy's
    extras (SCAFFOLD's controls) go whole both ways: on another scale, they or the parameters would
    take all places, and the server's control would not be the clients' mean.

    Training adapts to the entries that are sent. They are what clients and server measure, as the
    authors' code does; P, which is saved, has other entries, which can make it worse. Made for what
    adds to a frozen weight: where a parameter replaces one (bitfit, full), most is taken for zero.

    Args:
        density_down: share of the entries that the server sends, in (0, 1].
        density_up: share that a client sends, in (0, 1].
    """

    density_down: float = 0.25
    density_up: float = 0.25

    def __post_init__(self) -> None:
        largest.check_share("density_down", self.density_down)
        largest.check_share("density_up", self.density_up)

    @property
    def up(self) -> Codec:
        return OfUpdate(LargestOfAll(self.density_up))

    @property
    def down(self) -> Codec:
        return LargestOfAll(self.density_down)

    def check(self, setting: Setting) -> None:
        name, method = type(self).__name__, type(setting.method).__name__
        if not setting.method.averages:
            raise ValueError(
                f"compression {name} adds the mean's step to values that clients got in part, but "
                f"method {method} aggregates by a rule of its own: use compression=int8 or none"
            )
        if not setting.whole:
            raise ValueError(
                f"compression {name} takes the same vector for every client, but with method "
                f"{method} some train only a block: use equal ranks, or compression=topk or none"
            )
