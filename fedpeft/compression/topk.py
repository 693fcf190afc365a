"""Only the largest entries on the wire: ``topk`` and ``topk_both`` of ``compression``."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fedpeft.algorithms.base import Setting
from fedpeft.compression import largest
from fedpeft.compression.base import OfUpdates, stepped
from fedpeft.methods.base import State
from fedpeft.state import check


@dataclass(frozen=True)
class TopK(OfUpdates):
    """The entries of largest magnitude of each tensor, as values and their places.

    What is left out is kept on the client and added to its next update (error feedback,
    https://arxiv.org/abs/1809.07599). Of equals, the earlier entry goes. A client whose reply is
    lost has kept the error as if it had arrived. Up only, and only for methods whose server takes
    the mean: where it sets factors anew, what was kept would be added to other factors.

    Args:
        ratio: share of a tensor's entries that is sent, in (0, 1]; one at least. Each takes 4
            bytes; the places take a bit for each entry of the tensor, or 4 bytes for each that is
            sent where that is not more.
    """

    ratio: float = 0.1

    feedback = True

    def __post_init__(self) -> None:
        largest.check_share("ratio", self.ratio)

    def check(self, setting: Setting) -> None:
        if not setting.method.averages:
            raise ValueError(
                "compression TopK adds what a client did not send to its next update, but method "
                f"{type(setting.method).__name__} may have set the parameters anew by a rule of "
                "its own: use compression=int8 or none"
            )

    def count(self, numel: int) -> int:
        """Entries sent of so many."""
        return largest.count(self.ratio, numel)

    def encode(self, update: State, rng: np.random.Generator) -> State:
        wire: State = {}
        for name, value in update.items():
            wire |= largest.encoded(name, value.reshape(-1), self.count(value.numel()))
        return wire

    def decode(self, wire: State, like: State) -> State:
        expected: State = {}
        for name, value in like.items():
            expected |= largest.expected(name, value.numel(), self.count(value.numel()))
        check(wire, expected)
        return {n: largest.decoded(n, wire, v.numel()).reshape(v.shape) for n, v in like.items()}


@dataclass(frozen=True)
class TopKBoth(OfUpdates):
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

    def encode(self, update: State, rng: np.random.Generator) -> State:
        return largest.joined(update, self.density_up)

    def decode(self, wire: State, like: State) -> State:
        return largest.parted(wire, like, self.density_up)

    def down(self, state: State) -> State:
        return largest.joined(state, self.density_down)

    def received(self, wire: State, expected: Mapping[str, Tensor]) -> State:
        found = largest.parted(wire, expected, self.density_down)
        return {name: found[name].to(value.dtype) for name, value in expected.items()}

    def kept(self, after: State, before: State, values: State) -> State:
        return stepped(after, before, values)
