"""Only the largest entries on the wire: ``topk`` and ``topk_both`` of the ``compression`` group."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedpeft.algorithms.base import RunFacts
from fedpeft.compression import largest
from fedpeft.compression.base import Codec, Compression, OfUpdate
from fedpeft.state import STRATEGY, State, check, prefixed, split_prefixed

VECTOR = "compression:vector"  # name of the vector of all parameters


class Largest(Codec):
    """The entries of largest magnitude of each tensor, as values and their places.

    Args:
        share: share of a tensor's entries that is sent, in (0, 1]; one entry at least.
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def encode(self, state: State, reference: State, rng: np.random.Generator) -> State:
        """See ``Codec.encode``."""
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

    A strategy's extras are sent whole, because they have another scale: in one vector, they or the
    parameters would take all places.

    Args:
        share: share of the vector's entries that is sent, in (0, 1]; one entry at least.
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def encode(self, state: State, reference: State, rng: np.random.Generator) -> State:
        """See ``Codec.encode``."""
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
        values = {name: value for name, value in wire.items() if name in reference}
        if parameters:
            parts = largest.decoded(VECTOR, wire, numel).split(list(sizes.values()))
            values |= {n: p.reshape(reference[n].shape) for n, p in zip(sizes, parts, strict=True)}
        return {name: values[name].to(value.dtype) for name, value in reference.items()}


@dataclass(frozen=True)
class TopK(Compression):
    """The entries of largest magnitude of each tensor of a client's update.

    The client keeps what is left out and adds it to its next update (error feedback). If a reply is
    lost, the next update adds the error of the last accepted reply. Clients alone compress, and
    only for methods whose server takes the mean: where it sets factors anew, the error would be
    added to other factors.

    Args:
        ratio: share of a tensor's entries that is sent, in (0, 1]; one entry at least. Each entry
            sent takes 4 bytes. The places take one bit for each entry of the tensor, or 4 bytes for
            each entry sent if that is not more.
    """

    ratio: float = 0.1

    feedback = True

    def __post_init__(self) -> None:
        largest.check_share("ratio", self.ratio)

    @property
    def up(self) -> Codec:
        return OfUpdate(Largest(self.ratio))

    def check(self, facts: RunFacts) -> None:
        if not facts.method.averages:
            raise ValueError(
                "compression TopK adds what a client did not send to its next update, but method "
                f"{type(facts.method).__name__} may have set the parameters anew by a rule of "
                "its own: use compression=int8 or none"
            )


@dataclass(frozen=True)
class TopKBoth(Compression):
    """The entries of largest magnitude of all that is sent, both ways: FLASC's communication.

    https://arxiv.org/abs/2406.05233. The server keeps dense parameters P and sends their k largest
    entries. A client takes zero for the others, trains all, and sends the k largest entries of its
    update; what it leaves out is lost (no error feedback). The strategy's step starts from what
    clients got, and the server adds it to P, so that entries that are not sent are not forgotten.

    All parameters are one vector, in the order of their names, and k is the integer nearest to
    density times its length, one at least. The paper leaves open three choices. The head is in the
    vector (the authors' code has it both ways). Of equal entries the earlier one is sent. The first
    round is like the others, so that LoRA's A and the head are sent in it, because B is zero.
    Parameters that the server changed but clients do not train in a round are in the vector too;
    those that are never sent stay as they were. A strategy's extras (SCAFFOLD's controls) are sent
    whole both ways, because they have another scale: in one vector, they or the parameters would
    take all places, and the server's control would not be the clients' mean.

    Training adapts to the entries that are sent. Clients and server measure the model of these
    entries, as the authors' code does; P, which is saved, has other entries, which can make it
    worse. The scheme suits parameters that add to a frozen weight: where they replace one (bitfit,
    full), most entries become zero.

    Args:
        density_down: share of the entries that the server sends, in (0, 1].
        density_up: share of the entries that a client sends, in (0, 1].
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

    def check(self, facts: RunFacts) -> None:
        name, method = type(self).__name__, type(facts.method).__name__
        if not facts.method.averages:
            raise ValueError(
                f"compression {name} adds the mean's step to values that clients got in part, but "
                f"method {method} aggregates by a rule of its own: use compression=int8 or none"
            )
        if not facts.whole:
            raise ValueError(
                f"compression {name} takes the same vector for every client, but with method "
                f"{method} some train only a block: use equal ranks, or compression=topk or none"
            )
