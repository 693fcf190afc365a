"""FedProx: a client stays near where it began (https://arxiv.org/abs/1812.06127)."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from fedpeft.algorithms.base import FedAvg
from fedpeft.methods.base import Term
from fedpeft.state import State


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedAvg whose loss has the term mu/2 |theta - theta_received|^2 over the shared parameters.

    Args:
        proximal_mu: mu > 0.
    """

    proximal_mu: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.proximal_mu > 0:
            raise ValueError(f"strategy.proximal_mu must be > 0, got {self.proximal_mu}")

    def term(self, start: State, sent: State, kept: State) -> Term:
        """See ``FedAvg.term``."""
        return ProximalTerm(self.proximal_mu, start)


class ProximalTerm(Term):
    """Adds mu (theta - theta_received) to the gradients of shared parameters.

    Args:
        mu: strength of the pull.
        start: theta_received, full.
    """

    def __init__(self, mu: float, start: State) -> None:
        self.mu, self.start = mu, start

    def correct(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, value in self.start.items():
            parameter = parameters.get(name)  # null if it does not train in this phase
            if parameter is not None and parameter.grad is not None:
                start = value.to(parameter.device)
                parameter.grad.add_(parameter.detach() - start, alpha=self.mu)
