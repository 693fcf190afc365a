"""Forward and backward passes, and one client's steps."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from fedpeft.config.optimization import Optimization
from fedpeft.data.batching import Batch
from fedpeft.engine.cpu import OnCPU
from fedpeft.engine.flat import Flat, Stepper
from fedpeft.engine.graphs import Graphs
from fedpeft.engine.plan import WEIGHT
from fedpeft.methods.base import Term
from fedpeft.state import State


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Run the block under autocast if ``precision`` is bf16, and under ``OnCPU`` on a CPU."""
    functions = OnCPU() if device.type == "cpu" else nullcontext()
    # A cast is used once in a pass, so a cache of casts gains nothing, and a captured pass must
    # not read a cast that another pass made.
    with torch.autocast(
        device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False
    ):
        with functions:
            yield


class Passes:
    """Forward and backward passes of a model over batches; the gradients stand in one vector.

    On a GPU a pass over a shape that comes often is captured as a graph and replayed.

    Args:
        model: the model; its parameters that require a gradient train.
        loss_fn: returns the mean loss of a batch.
        precision: ``fp32``, or ``bf16`` for autocast.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[nn.Module, Batch], Tensor],
        precision: str = "fp32",
    ) -> None:
        self.model, self.loss_fn, self.precision = model, loss_fn, precision
        self.flat = Flat({n: p for n, p in model.named_parameters() if p.requires_grad})
        self.device = self.flat.vector.device
        self.graphs: Graphs | None = None
        if self.device.type == "cuda":
            self.graphs = Graphs(self.backward, self.device, pad_id(model))

    def run(self, parts: Sequence[Batch]) -> Tensor:
        """Add the gradients of a step, given in parts, and return the step's loss."""
        losses = [self._run(part) for part in parts]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _run(self, batch: Batch) -> Tensor:
        if self.graphs is not None:
            return self.graphs.run(batch)
        return self.backward(to_device(batch, self.device))

    def backward(self, batch: Batch) -> Tensor:
        """Run forward and backward over a batch that is where the model is."""
        with autocast(self.device, self.precision):
            loss = self.loss_fn(self.model, batch)
            if WEIGHT in batch:
                loss = loss * batch[WEIGHT]
        loss.backward()
        return loss.detach()


def pad_id(model: nn.Module) -> int:
    """Return the token that a model takes for padding; 0 where it does not say."""
    return getattr(getattr(model, "config", None), "pad_token_id", None) or 0


def train(
    passes: Passes,
    steps: Sequence[Sequence[Batch]],
    rate: Callable[[int], float],
    optimization: Optimization,
    terms: Sequence[Term] = (),
    moments: State | None = None,
) -> tuple[float, State]:
    """Take one client's steps.

    Args:
        passes: over the model, which holds the values to start from.
        steps: each step's batch, whole or in parts.
        rate: learning rate of step 0, 1, ....
        optimization: name and settings of the optimizer.
        terms: corrections of the gradients, in order.
        moments: the optimizer's state of earlier rounds; null for a fresh one.

    Returns:
        The mean loss, and the optimizer's state if ``optimization.keep_state``.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    flat = passes.flat
    flat.zero()  # a client whose training failed may have left gradients
    stepper = Stepper(flat, optimization, rate(0), moments)
    losses: list[Tensor] = []
    passes.model.train()
    for step, parts in enumerate(steps):
        losses.append(passes.run(parts))
        stepper.step(rate(step), terms)
    return mean_loss(losses), stepper.moments() if optimization.keep_state else {}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch to a device; to a GPU it is copied while earlier steps still run there."""
    if device.type == "cuda":
        batch = {key: value.pin_memory() for key, value in batch.items()}
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def mean_loss(losses: Sequence[Tensor]) -> float:
    """Return the mean over all steps; it is the round's one synchronisation with a GPU.

    Raises:
        FloatingPointError: the mean is not finite.
    """
    mean = float(torch.stack(list(losses)).double().mean())
    if not math.isfinite(mean):
        raise FloatingPointError(f"training loss is {mean}: lower lr, or set precision=fp32")
    return mean
