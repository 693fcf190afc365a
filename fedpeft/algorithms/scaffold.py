"""SCAFFOLD: control variates against client drift (https://arxiv.org/abs/1910.06378, option II).

The theory is that of SGD: a control is a mean gradient only where a step is lr times the gradient.
AdamW is refused, because its steps are about lr a coordinate whatever the gradient is, so that the
controls outweigh the gradients: on quadratics with noisy gradients it ends .96 from the optimum and
FedAvg .33, with SGD .023 and .032. With SGD's momentum it runs, but the controls are then too large
by up to 1 / (1 - momentum).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fedpeft.algorithms.base import FedAvg, RunFacts, require_plain_mean
from fedpeft.methods.base import Memory, Round, Term
from fedpeft.state import State, weighted_mean


@dataclass(frozen=True)
class Scaffold(FedAvg):
    """Clients step by g - c_i + c; c_i stays on the client, its change is sent to the server.

    Only parameters that are shared in a round are corrected in it, and only their controls change
    and are sent, which doubles the numbers sent both ways. A client whose reply is lost goes on
    from the c_i of its last accepted reply, so c contains the change of every c_i.

    Args:
        weights: ``uniform`` as in the paper, or ``examples``.
        server_lr: eta_g > 0.
    """

    weights: str = "uniform"
    server_lr: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.server_lr < float("inf"):
            raise ValueError(f"server_lr must be > 0, got {self.server_lr}")

    def check(self, facts: RunFacts) -> None:
        """Refuse AdamW, and methods and blocks that have no plain mean."""
        require_plain_mean(self, facts)
        if facts.optimizer != "sgd":
            raise ValueError(
                "strategy Scaffold needs optimizer.name=sgd, because its controls are mean "
                "gradients only where a step is lr times the gradient, got optimizer.name="
                f"{facts.optimizer}: use sgd with an lr for it, or strategy=fedavg"
            )

    def term(self, start: State, sent: State, kept: State) -> Term:
        """See ``FedAvg.term``."""
        return ControlTerm(start, sent, kept)

    def down(self, memory: Memory, shared: State) -> State:
        """Return c of what is shared, zero where no client has sent a change yet."""
        control = memory.get("control", {})
        return {n: control[n] if n in control else torch.zeros_like(v) for n, v in shared.items()}

    def up(self, shared: State) -> State:
        return shared

    def server(self, mean: State, round: Round, memory: Memory) -> State:
        """Return theta + eta_g (mean - theta), and set c to c + |S|/N mean(c_i+ - c_i).

        See ``FedAvg.server``.
        """
        control = memory.setdefault("control", {})
        for name, change in weighted_mean(round.extras, round.weights).items():
            old = control[name] if name in control else torch.zeros_like(change)
            control[name] = (old.double() + round.share * change.double()).to(change.dtype)
        return {
            name: torch.lerp(round.before[name].double(), value.double(), self.server_lr).to(
                value.dtype
            )
            for name, value in mean.items()
        }


class ControlTerm(Term):
    """Adds c - c_i to the gradients of shared parameters.

    Args:
        start: x, shared parameters as received, full.
        sent: c.
        kept: c_i of every parameter that this client has shared so far.
    """

    def __init__(self, start: State, sent: State, kept: State) -> None:
        self.start, self.server, self.kept = start, sent, kept
        self.client = {n: kept[n] if n in kept else torch.zeros_like(v) for n, v in start.items()}
        self.correction = {n: sent[n] - control for n, control in self.client.items()}

    def correct(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, value in self.correction.items():
            parameter = parameters.get(name)  # null if it does not train in this phase
            grad = None if parameter is None else parameter.grad
            if grad is not None:
                self.correction[name] = value = value.to(grad.device)
                grad.add_(value)

    def finish(self, trained: State, steps: int, lr: float) -> tuple[State, State]:
        """Return c_i+ - c_i = -c + (x - y_i) / (K lr), and every c_i. See ``Term.finish``."""
        change = {
            name: (self.start[name] - value) / (steps * lr) - self.server[name]
            for name, value in trained.items()
        }
        new = {name: self.client[name] + value for name, value in change.items()}
        return change, self.kept | new
