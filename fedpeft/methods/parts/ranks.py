"""Ranks that differ by client: a client of low rank trains the leading block of every factor."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedpeft.methods.base import At, Method, Round
from fedpeft.methods.lora import LoRA
from fedpeft.state import State, leading

# A list, of which client c has the entry c mod length, or a mapping from client numbers. A client
# that the mapping lacks has the largest rank, and with None all have it. The type is Any because a
# configuration has no unions of containers.
Ranks = Any


def check_ranks(name: str, ranks: Ranks, largest: int) -> None:
    """Check ranks by client.

    Args:
        name: names the ranks in the error.
        ranks: the ranks to check: a list, a mapping from client numbers, or null.
        largest: bound of every rank.

    Raises:
        ValueError: the ranks are no list or mapping from client numbers, or a rank is not in
            1..largest.
    """
    if ranks is None:
        return
    if not isinstance(ranks, list | Mapping):
        raise ValueError(f"{name} must be a list, or a rank by client, got {ranks}")
    if isinstance(ranks, Mapping) and not all(isinstance(c, int) and c >= 0 for c in ranks):
        raise ValueError(f"{name} must be by client numbers, got {list(ranks)}")
    for rank in ranks.values() if isinstance(ranks, Mapping) else ranks:
        if not isinstance(rank, int) or not 1 <= rank <= largest:
            raise ValueError(f"{name} must be from 1 to the largest, {largest}, got {rank}")


def rank_of(ranks: Ranks, at: At, largest: int) -> int:
    """Return a client's rank.

    Args:
        ranks: the clients' ranks, a list or a mapping; if null or empty, all have ``largest``.
        at: says the client; if that is null, the rank is ``largest``.
        largest: rank of a client that trains whole parameters.
    """
    if not ranks or at.client is None:
        return largest
    if isinstance(ranks, Mapping):
        return ranks.get(at.client, largest)
    return ranks[at.client % len(ranks)]


def any_below(ranks: Ranks, largest: int, num_clients: int) -> bool:
    """Return true if any client's rank is below the largest.

    Args:
        ranks: the clients' ranks, a list or a mapping; if null or empty, all have ``largest``.
        largest: rank of a client that trains whole parameters.
        num_clients: number of the run's clients, which are numbered from 0.
    """
    return any(rank_of(ranks, At(1, c), largest) < largest for c in range(num_clients))


@dataclass(frozen=True)
class RankedLoRA(LoRA):
    """LoRA in which client c trains and sends the first r_c rows of A and columns of B.

    ``rank`` is the largest. B A is multiplied by alpha/rank on every client, so that the leading
    blocks mean the same everywhere.

    Args:
        ranks: a list, of which client c has ``ranks[c mod len(ranks)]``, or a mapping from clients;
            null gives all clients ``rank``.
    """

    ranks: Ranks = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranks("ranks", self.ranks, self.rank)

    def client_rank(self, at: At) -> int:
        """Return a client's rank in a round."""
        return rank_of(self.ranks, at, self.rank)

    def block(self, name: str, shape: Sequence[int], at: At) -> Sequence[int]:
        """See ``Method.block``."""
        rank = self.client_rank(at)
        if ".lora_A." in name:
            return (rank, shape[1])
        return (shape[0], rank) if ".lora_B." in name else shape

    def trains_blocks(self, num_clients: int) -> bool:
        """See ``Method.trains_blocks``."""
        return any_below(self.ranks, self.rank, num_clients)


def mean_of_holders(method: Method, round: Round, names: Iterable[str]) -> State:
    """Average every entry over the clients whose block holds it, by their weights.

    A mean over all clients counts zeros of clients that do not hold an entry, and so would shrink
    it in every round. An entry that no client holds stays as it was before the round.

    Args:
        method: says, by ``block``, which entries each client holds.
        round: the round, with the clients' states and weights.
        names: names of the parameters to average.
    """
    mean: State = {}
    for name in names:
        first = round.states[0][name]
        total, mass = (torch.zeros(first.shape, dtype=torch.float64) for _ in range(2))
        for state, weight, at in zip(round.states, round.weights, round.ats, strict=True):
            block = method.block(name, first.shape, at)
            leading(total, block).add_(weight * leading(state[name], block).double())
            leading(mass, block).add_(weight)
        before = round.before[name].double() if name in round.before else torch.zeros_like(total)
        mean[name] = torch.where(mass > 0, total / mass.clamp(min=1e-30), before).to(first.dtype)
    return mean
