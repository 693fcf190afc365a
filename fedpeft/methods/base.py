"""The seam: what a federated fine-tuning method is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


class Role(Enum):
    """What happens to a parameter in one round; "sent but untrained" cannot be said."""

    SHARED = "shared"  # trained, sent, aggregated
    PERSONAL = "personal"  # trained, never leaves the client
    FROZEN = "frozen"  # neither trained nor sent this round


class Method(ABC):
    """A method is a frozen dataclass whose fields are its hyperparameters."""

    @abstractmethod
    def inject(self, model: nn.Module) -> nn.Module:
        """Adds the method's parameters to a transformers model and freezes the rest.

        Exactly the parameters that train in some round leave with ``requires_grad``. All draws
        come from torch's global generator, which the caller seeds: a frozen random part is
        then the same on every client.
        """

    def role(self, name: str, round: int) -> Role:
        """Role of an injected model's trainable parameter in a round; rounds start at 1."""
        return Role.SHARED

    def aggregate(self, states: Sequence[State], weights: Sequence[float]) -> State:
        """The new shared state from the clients' (equal keys), ``weights`` summing to 1."""
        return weighted_mean(states, weights)

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
            total += weight * state[name].double()
        mean[name] = total.to(first.dtype)
    return mean
