"""Plain training and evaluation loops; they know neither Flower nor methods."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from fedpeft.algorithms.base import Term
from fedpeft.config.optimization import Optimization
from fedpeft.data.batching import Batch, Examples, within
from fedpeft.engine.cpu import OnCPU
from fedpeft.engine.graphs import Graphs
from fedpeft.methods.base import State


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """How a pass is computed: under bfloat16 autocast or not, and on a CPU what ``OnCPU`` says."""
    own = OnCPU() if device.type == "cpu" else nullcontext()
    # A cast is used once in a pass, so that there is nothing to keep; a captured one must not be.
    with torch.autocast(
        device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False
    ):
        with own:
            yield


class Passes:
    """Forward and backward passes of a model over batches; the gradients stand in one vector.

    On a GPU shapes that come often are captured and replayed.

    Args:
        model: whatever of it requires a gradient trains.
        loss_fn: mean loss of a batch.
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
        hooked = any(p._backward_hooks for p in self.flat.named.values())
        self.graphs: Graphs | None = None
        if self.device.type == "cuda" and not hooked:
            self.graphs = Graphs(self.backward, self.device, pad_id(model))

    def run(self, batch: Batch) -> Tensor:
        """Adds a batch's gradients to those that are there; the loss."""
        if self.graphs is not None:
            return self.graphs.run(batch)
        return self.backward(to_device(batch, self.device))

    def backward(self, batch: Batch) -> Tensor:
        """The pass over a batch where the model is."""
        with autocast(self.device, self.precision):
            loss = self.loss_fn(self.model, batch)
        loss.backward()
        return loss.detach()


def pad_id(model: nn.Module) -> int:
    """The token that a model takes for padding; 0 where it does not say."""
    return getattr(getattr(model, "config", None), "pad_token_id", None) or 0


def train(
    passes: Passes,
    batches: list[Batch],
    optimization: Optimization,
    rate: Callable[[int], float],
    term: Term | None = None,
) -> float:
    """Steps over ``batches`` with a fresh optimizer; returns the mean loss.

    Args:
        rate: learning rate of a step.
        term: a federated algorithm's part, which may change the gradients.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    flat = passes.flat
    flat.zero()  # of a client before, whose training failed
    optimizer = optimization.build([flat.vector], rate(0))
    losses: list[Tensor] = []
    passes.model.train()
    for step, batch in enumerate(batches):
        losses.append(passes.run(batch))
        step_of(flat, optimizer, optimization, rate(step), term)
    return mean_loss(losses)


class Flat:
    """Parameters as views of one vector, and their gradients of another.

    A step, a load or a copy then takes as many operations for a thousand parameters as for one.

    Args:
        named: by name, of one dtype on one device.
        device: where they go; null for where they are.
    """

    def __init__(
        self, named: Mapping[str, nn.Parameter], device: torch.device | None = None
    ) -> None:
        self.named = named
        first = next(iter(named.values()))
        self.vector = nn.Parameter(joined(named.values()).to(device or first.device))
        self.vector.grad = torch.zeros_like(self.vector)
        data, grads = (self.parts(x) for x in (self.vector.data, self.vector.grad))
        for name, parameter in named.items():
            parameter.data, parameter.grad = data[name], grads[name]

    def parts(self, vectors: Tensor) -> State:
        """Views of (..., numbers) by name, (..., *shape)."""
        parts, at = {}, 0
        for name, parameter in self.named.items():
            part = vectors[..., at : at + parameter.numel()]
            parts[name] = part.view(*vectors.shape[:-1], *parameter.shape)
            at += parameter.numel()
        return parts

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Sets all parameters."""
        self.vector.copy_(joined(state[name] for name in self.named))

    def state(self) -> State:
        """Copies of all parameters, on the CPU."""
        parts = self.parts(self.vector.detach().cpu())
        return {name: part.clone() for name, part in parts.items()}

    def zero(self) -> None:
        """Forgets the gradients."""
        assert self.vector.grad is not None
        self.vector.grad.zero_()

    def release(self) -> None:
        """Lets the gradients go."""
        for parameter in self.named.values():
            parameter.grad = None


def joined(tensors: Iterable[Tensor]) -> Tensor:
    """All their numbers in one vector."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def step_of(
    flat: Flat,
    optimizer: torch.optim.Optimizer,
    optimization: Optimization,
    lr: float,
    term: Term | None,
) -> None:
    """An optimiser's step by the gradients that are there, which are zero afterwards."""
    if term is not None:
        term.correct(flat.named)
    if optimization.max_grad_norm is not None:
        nn.utils.clip_grad_norm_(flat.vector, optimization.max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch where the model is; to a GPU it is copied while earlier steps still run there."""
    if device.type == "cuda":
        batch = {key: value.pin_memory() for key, value in batch.items()}
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def mean_loss(losses: Sequence[Tensor]) -> float:
    """Of all steps: the round's one synchronisation.

    Raises:
        FloatingPointError: it is not finite.
    """
    mean = float(torch.stack(list(losses)).double().mean())
    if not math.isfinite(mean):
        raise FloatingPointError(f"training loss is {mean}: lower lr, or set precision=fp32")
    return mean


def evaluate(
    model: nn.Module,
    evaluate_batch: Callable[[nn.Module, Batch], dict[str, Tensor]],
    examples: Examples,
    batch_size: int,
    max_tokens: int,
    precision: str = "fp32",
    workers: int = 1,
) -> list[dict[str, Tensor]]:
    """What ``evaluate_batch`` gives for each batch of neighbouring length, in a fixed order.

    With it goes ``row`` (B,), the rows' numbers in their split. Batches run in ``workers``
    threads; each is computed by one thread of torch's own number, so the bits do not depend on it.
    """
    device = next(model.parameters()).device
    model.eval()

    def run(batch: Batch) -> dict[str, Tensor]:
        batch = to_device(batch, device)
        with torch.inference_mode(), autocast(device, precision):
            return {"row": batch["row"]} | evaluate_batch(model, batch)

    batches: Iterator[Batch] | Iterable[Batch] = (
        examples.batch(rows)
        for rows in within(
            examples.lengths, batch_size, max_tokens, examples.sequences, device.type
        )
    )
    if workers == 1 or device.type != "cpu":  # a GPU would have to hold all threads' batches
        return [run(batch) for batch in batches]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, batches))
