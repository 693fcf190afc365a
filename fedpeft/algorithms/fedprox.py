"""FedProx: a client stays near where it began (https://arxiv.org/abs/1812.06127)."""

from dataclasses import dataclass

from fedpeft.algorithms.base import FedAvg
from fedpeft.methods.base import Term
from fedpeft.methods.parts.pull import ProximalPull
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
        return ProximalPull(self.proximal_mu, start)
