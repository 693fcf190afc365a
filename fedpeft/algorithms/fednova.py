"""FedNova: clients that step more do not weigh more (https://arxiv.org/abs/2007.07481)."""

from dataclasses import dataclass

import torch

from fedpeft.algorithms.base import FedAvg, RunFacts, require_plain_mean
from fedpeft.methods.base import Memory, Round
from fedpeft.state import State


@dataclass(frozen=True)
class FedNova(FedAvg):
    """theta + tau_eff sum_i p_i (y_i - theta) / |a_i|, with tau_eff = sum_i p_i |a_i|.

    |a_i| counts client i's steps. For SGD it is their number K_i. With momentum rho, each gradient
    also acts in later steps, and |a_i| = (K_i - rho (1 - rho^K_i) / (1 - rho)) / (1 - rho). With
    AdamW, |a_i| = K_i supposes that all steps move equally far. Where all clients take equally many
    steps, this is FedAvg.

    Args:
        local_momentum: rho in [0, 1), the clients' ``optimizer.momentum``.
    """

    local_momentum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.local_momentum < 1:
            raise ValueError(f"local_momentum must be in [0, 1), got {self.local_momentum}")

    def check(self, facts: RunFacts) -> None:
        require_plain_mean(self, facts)

    def norm(self, steps: int) -> float:
        """Return |a_i| of a client that took so many steps."""
        rho = self.local_momentum
        return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)

    def server(self, mean: State, round: Round, memory: Memory) -> State:
        """See ``FedAvg.server``."""
        norms = [self.norm(steps) for steps in round.steps]
        effective = sum(w * norm for w, norm in zip(round.weights, norms, strict=True))
        scales = [effective * w / norm for w, norm in zip(round.weights, norms, strict=True)]
        after: State = {}
        for name, value in mean.items():
            start = round.before[name].double()
            total = torch.zeros_like(start)
            for state, scale in zip(round.states, scales, strict=True):
                total += scale * (state[name].double() - start)
            after[name] = (start + total).to(value.dtype)
        return after
