"""Several clients in one forward and backward pass over the frozen base that they share.

The clients' batches stand one after another along the first axis. Only modules that hold trained
parameters tell clients apart: each is called with K stacked copies of its parameters, one a client.
The frozen rest, which is most of the arithmetic, sees one large batch. Gradients, clipping,
optimizer and random draws are each client's own, as if it had trained alone.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedpeft.data.batching import Batch, merged, within
from fedpeft.engine.flat import Flat, Stepper
from fedpeft.engine.graphs import Graphs
from fedpeft.engine.passes import autocast, mean_loss, pad_id, to_device
from fedpeft.engine.plan import Ended, Job, Part, Plan
from fedpeft.engine.replica import Replica
from fedpeft.engine.stacked import Draws, Stack, calling, cut, owners
from fedpeft.state import State

# A client whose step has more tokens than STEP_TOKENS trains alone; with fewer, clients fill a pass
# up to PASS_TOKENS. On a CPU (MiniLM, LoRA, float32, results/benchmarks/clients_per_pass.json) 16
# clients of 21 tokens train 1.48 times as fast as one by one, 16 of 85 tokens 1.03 times, and 4 of
# 85 tokens .97 times; 56 lies between and is not measured. The numbers for CUDA are a guess.
STEP_TOKENS = {"cpu": 56, "cuda": 16384}
PASS_TOKENS = {"cpu": 384, "cuda": 16384}
IMAGE_TOKENS = 196  # an image of 224 pixels in patches of 16
MOST = 16  # clients in a pass


def clients_in_a_pass(tokens: float, numbers: int, device: str) -> int:
    """Return how many clients to train in one pass.

    A pass over few tokens takes about as long with some more; over many tokens, it saves less than
    the copies cost. The copies with gradients and moments take 1 GiB at most.

    Args:
        tokens: number of tokens in one client's step.
        numbers: entries of the parameters that one client trains.
        device: ``cpu`` or ``cuda``.
    """
    if tokens > STEP_TOKENS[device]:
        return 1
    room = int(2**30 / (16 * numbers))
    return max(1, min(MOST, room, int(PASS_TOKENS[device] / tokens)))


class Member:
    """One client in a group that trains together, and how far it has come.

    Args:
        job: the client's job, which says where it starts.
        parts: phases of the client's round in which something trains.
    """

    def __init__(self, job: Job, parts: Sequence[Part]) -> None:
        self.job, self.parts = job, parts
        self.values, self.moments = job.start, job.moments
        self.ended: list[Ended] = []
        self.error: FloatingPointError | None = None
        self.loss = float("nan")
        self.losses: list[Tensor] = []
        self.plan: Plan
        self.draws: Tensor  # state of the random generator at the next step

    def begin(self, plan: Plan, draws: Tensor) -> None:
        """Begin a phase with its plan and the state of its random generator."""
        self.plan, self.draws, self.losses = plan, draws, []

    def finish(self, flat: Flat, stepper: Stepper, keep: bool) -> None:
        """Take the phase's loss, values and moments, or the error if the loss is not finite.

        Args:
            flat: the member's trained parameters.
            stepper: the member's optimizer.
            keep: true to keep the optimizer's moments.
        """
        try:
            self.loss = mean_loss(self.losses)
        except FloatingPointError as error:
            self.error = error
            return
        self.values = self.values | flat.state()
        self.moments = self.moments | (stepper.moments() if keep else {})


class Together:
    """Trains members together; batches of like length share a pass, so that little is padded.

    It is used again from round to round. On a GPU, passes that come often are captured, unless the
    model draws at random, because each member draws from a generator of its own.

    Args:
        replica: the model.
        trained: names of the parameters that train.
        random: true if the model draws at random while it trains.
    """

    def __init__(self, replica: Replica, trained: Sequence[str], random: bool) -> None:
        self.model, self.task, self.trained = replica.model, replica.task, list(trained)
        self.optimization, self.precision = replica.config.optimizer, replica.config.precision
        self.device = replica.device
        self.captures = self.device.type == "cuda" and not random
        self.lanes: dict[int, _Lane] = {}

    def train(self, members: Sequence[Member]) -> None:
        """Run one phase; members with fewer steps leave early."""
        steps = _Steps(self, members)
        for step in range(max(len(member.plan.steps) for member in members)):
            for group in _groups(members, step, self.device.type):
                steps.run(group, step)
        steps.finish()

    def lane(self, count: int, like: Flat) -> "_Lane":
        """Return the cached buffers for ``count`` members with parameters ``like`` these."""
        if count not in self.lanes:
            self.lanes[count] = _Lane(self, count, like)
        return self.lanes[count]

    def losses(
        self, stacks: Sequence[Stack], copies: State, draws: Draws, batches: Sequence[Batch]
    ) -> Tensor:
        """Return each member's loss (K,), from which gradients can be computed.

        Args:
            stacks: stacks of the modules that hold trained parameters.
            copies: stacked parameters, (K, ...), by name.
            draws: the members' random draws.
            batches: one batch a member, on the model's device.
        """
        with autocast(self.device, self.precision):
            with draws, calling(stacks, copies, len(batches), draws):
                outputs = self.task.forward(self.model, merged(batches, pad_id(self.model)))
            return torch.stack(self._apart(outputs, batches))

    def _apart(self, outputs: Tensor, batches: Sequence[Batch]) -> list[Tensor]:
        """Return each member's loss of its own rows, cut to its own length."""
        sizes = [size_of(batch) for batch in batches]
        longest = max(length for _, length in sizes)
        tokens = (1,) if outputs.dim() > 2 else ()  # (sequences, tokens, ...)
        parts = outputs.split([rows for rows, _ in sizes])
        return [
            self.task.loss(cut(part, longest - length, tokens), batch)
            for part, batch, (_, length) in zip(parts, batches, sizes, strict=True)
        ]


class _Lane:
    """K members' parameters and gradients side by side, and the passes over them."""

    def __init__(self, together: Together, count: int, like: Flat) -> None:
        self.together, self.count = together, count
        self.values = like.vector.detach().expand(count, -1).clone()
        self.copies = like.parts(self.values)  # leaves of the graph
        self.grads = torch.zeros(self.values.numel(), device=together.device)
        sizes = [copy.numel() for copy in self.copies.values()]
        for copy, grad in zip(self.copies.values(), self.grads.split(sizes), strict=True):
            # contiguous, because autograd expects that where the parameter is not
            copy.requires_grad_().grad = grad.view(copy.shape)
        self.stacks = stacks_of(together.model, together.trained)
        self.graphs: Graphs | None = None
        if together.captures:
            self.graphs = Graphs(self._captured, together.device, pad_id(together.model))

    @torch.no_grad()
    def set(self, flats: Sequence[Flat]) -> None:
        """Copy the members' values, and set the gradients to zero."""
        torch.stack([flat.vector for flat in flats], out=self.values)
        self.grads.zero_()

    def gradients(self) -> Tensor:
        """Return each member's gradients, (K, numbers)."""
        sizes = [copy.numel() for copy in self.copies.values()]
        parts = self.grads.split(sizes)
        return torch.cat([part.view(self.count, -1) for part in parts], dim=1)

    def run(self, batches: Sequence[Batch], draws: Draws, fixed: State) -> Tensor:
        """Run a pass over the members' batches, and return their losses (K,).

        Args:
            batches: one batch a member, on the CPU.
            draws: the members' random draws.
            fixed: parameters that do not train but differ by member, (K, ...) by name.
        """
        shapes = [{name: value.shape[0] for name, value in batch.items()} for batch in batches]
        if self.graphs is not None and not fixed and all(s == shapes[0] for s in shapes):
            return self.graphs.run(merged(batches, pad_id(self.together.model)))
        device = self.together.device
        stacks = stacks_of(self.together.model, [*self.copies, *fixed]) if fixed else self.stacks
        return self._backward(
            stacks, self.copies | fixed, draws, [to_device(b, device) for b in batches]
        )

    def _captured(self, batch: Batch) -> Tensor:
        """Run a pass over K batches of equal shapes, merged into one."""
        parts = [
            dict(zip(batch, each, strict=True))
            for each in zip(*(value.chunk(self.count) for value in batch.values()), strict=True)
        ]
        none = Draws([], [size_of(part) for part in parts], self.together.device)
        return self._backward(self.stacks, self.copies, none, parts)

    def _backward(
        self, stacks: Sequence[Stack], copies: State, draws: Draws, batches: Sequence[Batch]
    ) -> Tensor:
        losses = self.together.losses(stacks, copies, draws, batches)
        losses.sum().backward()
        return losses.detach()


def stacks_of(model: nn.Module, names: Sequence[str]) -> list[Stack]:
    """Return a stack for every module that holds some of the parameters."""
    return [Stack(model, path, below) for path, below in owners(model, names).items()]


def _groups(members: Sequence[Member], step: int, device: str) -> Iterator[list[int]]:
    """Yield members with equally many sequences in a step, of neighbouring lengths."""
    sizes: dict[int, list[tuple[int, int]]] = {}
    for k, member in enumerate(members):
        if step < len(member.plan.steps):
            rows, length = size_of(member.plan.steps[step][0])
            sizes.setdefault(rows, []).append((k, length))
    for rows, alike in sizes.items():
        lengths = np.array([length for _, length in alike])
        for group in within(
            rows * lengths, len(alike), sum(lengths) * rows * len(alike), None, device
        ):
            yield [alike[i][0] for i in sorted(group)]


def size_of(batch: Batch) -> tuple[int, int]:
    """Return the number of sequences and their padded length; for images, their number and 1."""
    ids = batch.get("input_ids")
    return (len(batch["row"]), 1) if ids is None else (ids.shape[0], ids.shape[1])


class _Steps:
    """Holds the members' parameters and optimizers, and takes their steps."""

    def __init__(self, together: Together, members: Sequence[Member]) -> None:
        self.together, self.members, trained = together, members, together.trained
        names = members[0].values
        self.fixed = [n for n in names if n not in trained and _differs(n, members)]
        self.flats = [
            Flat({n: nn.Parameter(m.values[n]) for n in trained}, together.device) for m in members
        ]
        self.steppers = [
            Stepper(flat, together.optimization, m.plan.rate(0), m.moments)
            for flat, m in zip(self.flats, members, strict=True)
        ]

    def run(self, group: Sequence[int], step: int) -> None:
        """Take one step of a group of members."""
        members, flats = [self.members[k] for k in group], [self.flats[k] for k in group]
        batches = [m.plan.steps[step][0] for m in members]
        sizes, device = [size_of(batch) for batch in batches], self.together.device
        draws = Draws([m.draws for m in members], sizes, device)
        lane = self.together.lane(len(group), flats[0])
        lane.set(flats)
        losses = lane.run(batches, draws, self._fixed(group))
        gradients = lane.gradients()
        for i, (k, member, flat) in enumerate(zip(group, members, flats, strict=True)):
            assert flat.vector.grad is not None
            flat.vector.grad.copy_(gradients[i])
            member.draws = draws.states[i]
            member.losses.append(losses[i])
            self.steppers[k].step(member.plan.rate(step), member.job.terms)

    def finish(self) -> None:
        """Hand each member its loss, values and moments."""
        keep = self.together.optimization.keep_state
        for member, flat, stepper in zip(self.members, self.flats, self.steppers, strict=True):
            member.finish(flat, stepper, keep)

    def _fixed(self, group: Sequence[int]) -> State:
        """Stack the parameters that do not train but differ by member, (K, ...)."""
        return {
            name: torch.stack([self.members[k].values[name] for k in group]).to(
                self.together.device
            )
            for name in self.fixed
        }


def _differs(name: str, members: Sequence[Member]) -> bool:
    first = members[0].values[name]
    return any(not torch.equal(first, member.values[name]) for member in members[1:])
