"""SCAFFOLD: control variates against client drift (https://arxiv.org/abs/1910.06378, option II).

The theory is that of SGD: a control is a mean gradient only where a step is lr times the gradient
(``optimizer.name=sgd``, no momentum). With momentum or AdamW it runs, but the controls are then in
units of the optimiser's steps, with AdamW about 1 a coordinate, and can outweigh the gradients.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fedpeft.algorithms.base import FedAvg, Setting, require_plain_mean
from fedpeft.methods.base import Memory, Round, Term
from fedpeft.state import State, weighted_mean


@dataclass(frozen=True)
class Scaffold(FedAvg):
    """Clients step by g - c_i + c; c_i stays on the client, its change goes to the server.

    Only parameters that are shared in a round are corrected in it, and only their controls change
    and travel: as much again as the parameters, both ways. A client whose reply is lost keeps its
    new c_i, of which c then knows nothing.

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

    def check(self, setting: Setting) -> None:
        require_plain_mean(self, setting)

    def term(self, start: State, sent: State, kept: State) -> Term:
        return ControlTerm(start, sent, kept)

    def down(self, memory: Memory, shared: State) -> State:
        """c, zero where no client has said anything yet."""
        control = memory.get("control", {})
        return {n: control[n] if n in control else torch.zeros_like(v) for n, v in shared.items()}

    def up(self, shared: State) -> State:
        return shared

    def server(self, mean: State, round: Round, memory: Memory) -> State:
        """theta + eta_g (mean - theta), and c + |S|/N mean(c_i+ - c_i)."""
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
    """c - c_i on every gradient.

    Args:
        start: x, shared parameters as received.
        sent: c.
        kept: c_i of all that this client ever shared.
    """

    def __init__(self, start: State, sent: State, kept: State) -> None:
        self.start, self.server, self.kept = start, sent, kept
        self.own = {n: kept[n] if n in kept else torch.zeros_like(v) for n, v in start.items()}
        self.correction = {n: sent[n] - own for n, own in self.own.items()}

    def correct(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, value in self.correction.items():
            parameter = parameters.get(name)  # null if it does not train in this phase
            grad = None if parameter is None else parameter.grad
            if grad is not None:
                self.correction[name] = value = value.to(grad.device)
                grad.add_(value)

    def finish(self, trained: State, steps: int, lr: float) -> tuple[State, State]:
        """c_i+ - c_i = -c + (x - y_i) / (K lr), and every c_i."""
        change = {
            name: (self.start[name] - value) / (steps * lr) - self.server[name]
            for name, value in trained.items()
        }
        new = {name: self.own[name] + value for name, value in change.items()}
        return change, self.kept | new
