"""The seam: what a federated fine-tuning method is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


class Role(Enum):
    """What happens to a parameter in one round."""

    SHARED = "shared"  # trained, sent, aggregated
    PERSONAL = "personal"  # trained, never leaves the client
    RECEIVED = "received"  # changed by the server, sent down, not trained
    FROZEN = "frozen"  # neither trained nor sent this round


TRAINED = (Role.SHARED, Role.PERSONAL)


class Method(ABC):
    """A method is a frozen dataclass whose fields are its hyperparameters."""

    def check(self, num_rounds: int) -> None:  # noqa: B027
        """Raises ValueError for a number of rounds that the method makes no sense in."""

    @abstractmethod
    def inject(self, model: nn.Module) -> nn.Module:
        """Adds the method's parameters to a transformers model and freezes the rest.

        Exactly the parameters that train in some round, or that the server changes, leave with
        ``requires_grad``. All draws come from torch's global generator, which the caller seeds: a
        frozen random part is then the same on every client.
        """

    def role(self, name: str, round: int) -> Role:
        """Role of a parameter that left ``inject`` with a gradient; rounds start at 1."""
        return Role.SHARED

    def block(self, name: str, shape: Sequence[int], client: int) -> Sequence[int]:
        """Shape of the leading block of a parameter that a client trains and sends.

        Where ranks differ by client; the rest of the parameter is zero there.
        """
        return shape

    def aggregate(
        self, states: Sequence[State], weights: Sequence[float], before: State, round: int
    ) -> State:
        """New values, by name, of what was shared, and of anything else that the server changes.

        Args:
            states: the clients' shared parameters: equal keys, blocks filled up with zeros.
            weights: of the clients, summing to 1.
            before: values at the round's beginning of all that can change.
            round: from 1.
        """
        return weighted_mean(states, weights)

    @property
    def averages(self) -> bool:
        """Whether ``aggregate`` is the weighted mean and nothing else; strategies may ask."""
        return type(self).aggregate is Method.aggregate

    def effective(self, module: nn.Module) -> Tensor | None:
        """The dense matrix a module's trained factors stand for, or None if it has no factors.

        Read by the interference diagnostic: B A alpha/r, W2' C, a TT's product.
        """
        return None


def weighted_mean(states: Sequence[State], weights: Sequence[float]) -> State:
    """Sum of w_i theta_i by name, accumulated in float64, in each parameter's own dtype.

    Raises:
        ValueError: no states, as many weights as states are not given, or unequal keys.
    """
    if not states or len(states) != len(weights):
        raise ValueError(f"need one weight per state, got {len(states)} and {len(weights)}")
    if any(state.keys() != states[0].keys() for state in states):
        raise ValueError("states must have equal keys to be averaged")
    mean: State = {}
    for name, first in states[0].items():
        total = torch.zeros(first.shape, dtype=torch.float64)
        for state, weight in zip(states, weights, strict=True):
            total.add_(state[name], alpha=weight)  # in float64, without a copy in it
        mean[name] = total.to(first.dtype)
    return mean
