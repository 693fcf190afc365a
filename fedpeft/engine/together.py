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
from fedpeft.config.optimization import Optimization
from fedpeft.data.batching import Batch, merged, within
from fedpeft.data.tasks.base import Task
from fedpeft.engine.graphs import Graphs
from fedpeft.engine.passes import Flat, autocast, mean_loss, pad_id, step_of, to_device
from fedpeft.engine.stacked import Draws, Stack, calling, cut, owners
from fedpeft.methods.base import State

# Tokens of a step above which a client trains alone, and up to which clients fill a pass. cpu: of
# their time one by one (MiniLM, LoRA, float32) 16 clients of 21 tokens take 1/1.58, 8 of 42 1/1.20,
# 8 of 64 1/1.02, and 4 of 85 take 1.07 times as long; cuda: a guess.
STEP_TOKENS = {"cpu": 56, "cuda": 16384}
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
    if tokens > STEP_TOKENS[device]:
        return 1
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


class Cohort:
    """Trains members together, whose batches are put in passes so that little is padded.

    It stands ready from round to round: on a GPU passes that come often are captured, unless the
    model draws at random, which each member does from a generator of its own.

    Args:
        trained: names of the parameters that train.
        random: whether the model draws at random while it trains.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        trained: Sequence[str],
        optimization: Optimization,
        precision: str,
        random: bool,
    ) -> None:
        self.model, self.task, self.trained = model, task, list(trained)
        self.optimization, self.precision = optimization, precision
        self.device = next(model.parameters()).device
        self.captures = self.device.type == "cuda" and not random
        self.lanes: dict[int, _Lane] = {}

    def train(self, members: Sequence[Member]) -> list[tuple[float, State] | FloatingPointError]:
        """Each member's mean loss, and the values of all that can change after its last step.

        Members with fewer steps leave early.

        Returns:
            In a member's place an error, if its loss is not finite.
        """
        steps = _Steps(self, members)
        for step in range(max(len(member.batches) for member in members)):
            for group in _groups(members, step, self.device.type):
                steps.run(group, step)
        return [steps.result(k) for k in range(len(members))]

    def lane(self, count: int, like: Flat) -> "_Lane":
        """The buffers for so many members in a pass."""
        if count not in self.lanes:
            self.lanes[count] = _Lane(self, count, like)
        return self.lanes[count]

    def losses(
        self, stacks: Sequence[Stack], copies: State, draws: Draws, batches: Sequence[Batch]
    ) -> Tensor:
        """Each member's loss (K,), with what its gradients need."""
        with autocast(self.device, self.precision):
            with draws, calling(stacks, copies, len(batches), draws):
                logits = self.task.logits(self.model, merged(batches, pad_id(self.model)))
            return torch.stack(self._apart(logits, batches))

    def _apart(self, logits: Tensor, batches: Sequence[Batch]) -> list[Tensor]:
        """Each member's own loss, of its own rows and length."""
        sizes = [size_of(batch) for batch in batches]
        longest = max(length for _, length in sizes)
        parts = logits.split([rows for rows, _ in sizes])
        return [
            self.task.loss(_Given(cut(part, longest - length, (1,)[: part.dim() - 2])), batch)
            for part, batch, (_, length) in zip(parts, batches, sizes, strict=True)
        ]


class _Lane:
    """K members' parameters and gradients side by side, and the passes over them."""

    def __init__(self, cohort: Cohort, count: int, like: Flat) -> None:
        self.cohort, self.count = cohort, count
        self.values = like.vector.detach().expand(count, -1).clone()
        self.copies = like.parts(self.values)  # leaves of the graph
        self.grads = torch.zeros(self.values.numel(), device=cohort.device)
        sizes = [copy.numel() for copy in self.copies.values()]
        for copy, grad in zip(self.copies.values(), self.grads.split(sizes), strict=True):
            # contiguous, as autograd wants the gradient of what is not
            copy.requires_grad_().grad = grad.view(copy.shape)
        self.stacks = stacks_of(cohort.model, cohort.trained)
        self.graphs: Graphs | None = None
        if cohort.captures:
            self.graphs = Graphs(self._captured, cohort.device, pad_id(cohort.model))

    @torch.no_grad()
    def set(self, flats: Sequence[Flat]) -> None:
        """Members' values, and no gradients."""
        torch.stack([flat.vector for flat in flats], out=self.values)
        self.grads.zero_()

    def gradients(self) -> Tensor:
        """Each member's, (K, numbers)."""
        sizes = [copy.numel() for copy in self.copies.values()]
        parts = self.grads.split(sizes)
        return torch.cat([part.view(self.count, -1) for part in parts], dim=1)

    def run(self, batches: Sequence[Batch], draws: Draws, fixed: State) -> Tensor:
        """A pass over the members' batches; their losses (K,).

        Args:
            fixed: what else differs by member, (K, ...).
        """
        shapes = [{name: value.shape[0] for name, value in batch.items()} for batch in batches]
        if self.graphs is not None and not fixed and all(s == shapes[0] for s in shapes):
            return self.graphs.run(merged(batches, pad_id(self.cohort.model)))
        device = self.cohort.device
        stacks = stacks_of(self.cohort.model, [*self.copies, *fixed]) if fixed else self.stacks
        return self._backward(
            stacks, self.copies | fixed, draws, [to_device(b, device) for b in batches]
        )

    def _captured(self, batch: Batch) -> Tensor:
        """A pass over batches of equal shapes, one after another in one."""
        parts = [
            dict(zip(batch, each, strict=True))
            for each in zip(*(value.chunk(self.count) for value in batch.values()), strict=True)
        ]
        none = Draws([], [size_of(part) for part in parts], self.cohort.device)
        return self._backward(self.stacks, self.copies, none, parts)

    def _backward(
        self, stacks: Sequence[Stack], copies: State, draws: Draws, batches: Sequence[Batch]
    ) -> Tensor:
        losses = self.cohort.losses(stacks, copies, draws, batches)
        losses.sum().backward()
        return losses.detach()


def stacks_of(model: nn.Module, names: Sequence[str]) -> list[Stack]:
    """A stack for every module that holds some of the parameters."""
    return [Stack(model, path, own) for path, own in owners(model, names).items()]


def _groups(members: Sequence[Member], step: int, device: str) -> Iterator[list[int]]:
    """Members that take a step together: as many sequences each, of neighbouring lengths."""
    sizes: dict[int, list[tuple[int, int]]] = {}
    for k, member in enumerate(members):
        if step < len(member.batches):
            rows, length = size_of(member.batches[step])
            sizes.setdefault(rows, []).append((k, length))
    for rows, found in sizes.items():
        lengths = np.array([length for _, length in found])
        for group in within(
            rows * lengths, len(found), sum(lengths) * rows * len(found), None, device
        ):
            yield [found[i][0] for i in sorted(group)]


def size_of(batch: Batch) -> tuple[int, int]:
    """Sequences and their padded length; of images, their number and 1."""
    ids = batch.get("input_ids")
    return (len(batch["row"]), 1) if ids is None else (ids.shape[0], ids.shape[1])


class _Steps:
    """The members' parameters and optimisers, and a step of some of them."""

    def __init__(self, cohort: Cohort, members: Sequence[Member]) -> None:
        self.cohort, self.members, trained = cohort, members, cohort.trained
        self.fixed = [n for n in members[0].start if n not in trained and _differs(n, members)]
        self.flats = [
            Flat({n: nn.Parameter(m.start[n]) for n in trained}, cohort.device) for m in members
        ]
        self.optimizers = [
            cohort.optimization.build([flat.vector], m.rate(0))
            for flat, m in zip(self.flats, members, strict=True)
        ]

    def run(self, group: Sequence[int], step: int) -> None:
        """One step of some members."""
        members, flats = [self.members[k] for k in group], [self.flats[k] for k in group]
        batches = [m.batches[step] for m in members]
        draws = Draws([m.draws for m in members], [size_of(b) for b in batches], self.cohort.device)
        lane = self.cohort.lane(len(group), flats[0])
        lane.set(flats)
        losses = lane.run(batches, draws, self._fixed(group))
        gradients = lane.gradients()
        for i, (k, member, flat) in enumerate(zip(group, members, flats, strict=True)):
            assert flat.vector.grad is not None
            flat.vector.grad.copy_(gradients[i])
            member.draws = draws.states[i]
            member.losses.append(losses[i])
            step_of(
                flat, self.optimizers[k], self.cohort.optimization, member.rate(step), member.term
            )

    def result(self, k: int) -> tuple[float, State] | FloatingPointError:
        """A member's mean loss, and all of its parameters on the CPU."""
        try:
            loss = mean_loss(self.members[k].losses)
        except FloatingPointError as error:
            return error
        return loss, self.members[k].start | self.flats[k].state()

    def _fixed(self, group: Sequence[int]) -> State:
        """(K, ...) of what does not train and differs by member."""
        return {
            name: torch.stack([self.members[k].start[name] for k in group]).to(self.cohort.device)
            for name in self.fixed
        }


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
