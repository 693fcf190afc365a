"""Several clients in one forward and backward pass over the frozen base that they share.

The clients' batches stand one after another along the first axis. Only modules that hold trained
parameters know of it: each is called with K stacked copies of its parameters, one a client. The
frozen rest, which is most of the arithmetic, sees one large batch. Gradients, clipping, optimiser
and random draws are each client's own, as if it had trained alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpeft.algorithms.base import Term
from fedpeft.data.batching import Batch, merged, within
from fedpeft.data.task import Task
from fedpeft.methods.base import State
from fedpeft.nn.stacked import Draws, Stack, Unsupported, calling, cut, owners
from fedpeft.training import (
    Flat,
    Optimization,
    autocast,
    mean_loss,
    pad_id,
    step_of,
    to_device,
)

# Tokens up to which clients are worth putting together in one pass; cuda: a guess, not measured.
PASS_TOKENS = {"cpu": 384, "cuda": 16384}
IMAGE_TOKENS = 196  # an image's, at 224 pixels in patches of 16
MOST = 16


def members(tokens: float, numbers: int, device: str) -> int:
    """How many clients to train in one pass.

    A pass of few tokens costs about the same with some more; where there are many, copies only
    cost. The copies with gradients and moments take 1 GiB at most.

    Args:
        tokens: of a client's step.
        numbers: that a client trains.
    """
    room = int(2**30 / (16 * numbers))
    return max(1, min(MOST, room, int(PASS_TOKENS[device] / tokens)))


@dataclass
class Member:
    """One client of a cohort.

    Attributes:
        batches: one a step.
        rate: learning rate of a step.
        start: values of all parameters that can change.
        draws: state of the random generator at the first step.
    """

    batches: Sequence[Batch]
    rate: Callable[[int], float]
    start: State
    term: Term
    draws: Tensor
    losses: list[Tensor] = field(default_factory=list)


def train_together(
    model: nn.Module,
    task: Task,
    members: Sequence[Member],
    trained: Sequence[str],
    optimization: Optimization,
    precision: str,
) -> list[tuple[float, State] | FloatingPointError]:
    """Each member's mean loss, and the values of all that can change after its last step.

    A step's batches are put together in passes so that little is padded. Members with fewer steps
    leave early.

    Args:
        trained: names of the parameters that train.

    Returns:
        In a member's place an error, if its loss is not finite.
    """
    passes = _Passes(model, task, members, trained, optimization, precision)
    for step in range(max(len(member.batches) for member in members)):
        for group in _groups(members, step):
            passes.run(group, step)
    return [passes.result(k) for k in range(len(members))]


def _groups(members: Sequence[Member], step: int) -> Iterator[list[int]]:
    """Members that take a step together: as many sequences each, of neighbouring lengths."""
    sizes: dict[int, list[tuple[int, int]]] = {}
    for k, member in enumerate(members):
        if step < len(member.batches):
            rows, length = _size(member.batches[step])
            sizes.setdefault(rows, []).append((k, length))
    for rows, found in sizes.items():
        lengths = np.array([length for _, length in found])
        for group in within(rows * lengths, len(found), sum(lengths) * rows * len(found)):
            yield [found[i][0] for i in sorted(group)]


def _size(batch: Batch) -> tuple[int, int]:
    """Sequences and their padded length; of images, their number and 1."""
    ids = batch.get("input_ids")
    return (len(batch["row"]), 1) if ids is None else (ids.shape[0], ids.shape[1])


class _Passes:
    """The members' parameters, gradients and optimisers, and a pass over some of them."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        members: Sequence[Member],
        trained: Sequence[str],
        optimization: Optimization,
        precision: str,
    ) -> None:
        self.model, self.task, self.members = model, task, members
        self.optimization, self.precision = optimization, precision
        self.device = next(model.parameters()).device
        self.fixed = [n for n in members[0].start if n not in trained and _differs(n, members)]
        self.flats = [
            Flat({n: nn.Parameter(m.start[n].to(self.device)) for n in trained}) for m in members
        ]
        self.optimizers = [
            optimization.build([flat.vector], m.rate(0))
            for flat, m in zip(self.flats, members, strict=True)
        ]
        self.stacks = [
            Stack(model, path, names)
            for path, names in owners(model, [*trained, *self.fixed]).items()
        ]

    def run(self, group: Sequence[int], step: int) -> None:
        """One step of some members."""
        members = [self.members[k] for k in group]
        batches = [to_device(m.batches[step], self.device) for m in members]
        copies = self._copies(group)
        draws = Draws([m.draws for m in members], [_size(b) for b in batches], self.device)
        with autocast(self.device, self.precision):
            with draws, calling(self.stacks, copies, len(group), draws):
                logits = self.task.logits(self.model, merged(batches, pad_id(self.model)))
            losses = self._losses(logits, batches)
        torch.stack(losses).sum().backward()
        for i, (k, member) in enumerate(zip(group, members, strict=True)):
            for name, parameter in self.flats[k].named.items():
                assert parameter.grad is not None
                if (grad := copies[name].grad) is not None:
                    parameter.grad.copy_(grad[i])
            member.draws = draws.states[i]
            member.losses.append(losses[i].detach())
            step_of(
                self.flats[k], self.optimizers[k], self.optimization, member.rate(step), member.term
            )

    def result(self, k: int) -> tuple[float, State] | FloatingPointError:
        """A member's mean loss, and all of its parameters on the CPU."""
        try:
            loss = mean_loss(self.members[k].losses)
        except FloatingPointError as error:
            return error
        own = {n: p.detach().to("cpu", copy=True) for n, p in self.flats[k].named.items()}
        return loss, self.members[k].start | own

    def _copies(self, group: Sequence[int]) -> dict[str, Tensor]:
        """(K, ...) of each parameter that differs by client; leaves of the graph."""
        together = torch.stack([self.flats[k].vector.detach() for k in group])
        copies, at = {}, 0
        for name, parameter in self.flats[group[0]].named.items():
            part = together[:, at : at + parameter.numel()]
            copies[name] = part.view(len(group), *parameter.shape).requires_grad_()
            at += parameter.numel()
        for name in self.fixed:
            values = [self.members[k].start[name] for k in group]
            copies[name] = torch.stack(values).to(self.device)
        return copies

    def _losses(self, logits: Tensor, batches: Sequence[Batch]) -> list[Tensor]:
        """Each member's own loss, of its own rows and length."""
        sizes = [_size(batch) for batch in batches]
        longest = max(length for _, length in sizes)
        parts = logits.split([rows for rows, _ in sizes])
        return [
            self.task.loss(_Given(cut(part, longest - length, (1,)[: part.dim() - 2])), batch)
            for part, batch, (_, length) in zip(parts, batches, sizes, strict=True)
        ]


class _Given(nn.Module):
    """Stands for a model whose logits are known."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits)


def _differs(name: str, members: Sequence[Member]) -> bool:
    first = members[0].start[name]
    return any(not torch.equal(first, member.start[name]) for member in members[1:])


def probe(model: nn.Module, task: Task, names: Sequence[str], batch: Batch, precision: str) -> None:
    """Tries whether copies of parameters can be told apart, in a forward pass without gradients.

    Args:
        names: of the parameters that train in some round.

    Raises:
        Unsupported: a module that holds some is not called with one entry a sequence, or a
            parameter has a hook, which its copies would not run.
    """
    for name, parameter in model.named_parameters():
        if name in names and parameter._backward_hooks:
            raise Unsupported(f"{name} has a hook on its gradient")
    rows, called = _size(batch)[0], set()
    device = next(model.parameters()).device

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        first = given[0] if given else None
        if isinstance(first, Tensor) and first.dim() > 1 and first.shape[0] == rows:
            called.add(module)

    paths = owners(model, names)
    hooks = [model.get_submodule(p).register_forward_pre_hook(note) for p in paths]
    with torch.no_grad(), autocast(device, precision):
        task.logits(model, to_device(batch, device))
    for hook in hooks:
        hook.remove()
    for path in paths:
        if model.get_submodule(path) not in called:
            raise Unsupported(f"{path} is not called with one entry a sequence")
