"""The server's resident model with its rows, for steps of a server that need data."""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch

from fedpeft.data.batching import Batch, training_batches
from fedpeft.engine.engine import Engine
from fedpeft.engine.passes import autocast, to_device
from fedpeft.seeding import generator
from fedpeft.state import State


class EngineModel:
    """Implements ``fedpeft.methods.base.ServerModel`` with an engine.

    Args:
        engine: the server's engine.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.model, self.task = engine.replica.model, engine.task

    def load(self, *states: State) -> None:
        """Set every parameter that can change; later states win, the rest is initial."""
        self.engine.replica.load(*states)

    def batches(self, size: int, purpose: str, *path: int) -> Iterator[Batch]:
        """Yield batches of the server's validation rows without end, in a seeded order.

        Args:
            size: rows a batch, at most.
            purpose: names the draw.
            path: places the draw, for example the round.
        """
        examples = self.engine.rows.examples("validation")
        for epoch in count():
            draws = generator(self.engine.config.seed, purpose, *path, epoch)
            for rows in training_batches(examples.lengths, size, None, 1, draws):
                yield examples.batch(rows)

    def gradients(self, names: Sequence[str], batch: Any) -> tuple[float, State]:
        """Return the loss of the loaded model on a batch and its gradients, on the CPU.

        Args:
            names: names of parameters, which need not train in any round.
            batch: a batch of ``batches``.
        """
        model, replica = self.model.eval(), self.engine.replica
        parameters = {name: model.get_parameter(name) for name in names}
        replica.set_trainable(set(names))
        with autocast(replica.device, self.engine.config.precision):
            moved = to_device(batch, replica.device)
            loss = self.task.loss(self.task.forward(model, moved), moved)
        if not names:
            return float(loss.detach()), {}
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        gradients = {
            name: torch.zeros_like(parameter) if gradient is None else gradient
            for (name, parameter), gradient in zip(parameters.items(), grads, strict=True)
        }
        return float(loss.detach()), {n: g.float().cpu() for n, g in gradients.items()}
