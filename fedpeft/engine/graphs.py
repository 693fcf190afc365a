"""Passes on a GPU as CUDA graphs: one launch in place of the hundreds that a small step waits for.

https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedpeft.data.batching import Batch, lengthened

log = logging.getLogger(__name__)

EAGER = 2  # passes of a shape before its capture, because a rare shape would not pay it back
MOST = 256  # graphs of one ``Graphs``


@dataclass
class Graph:
    """A captured pass, the tensors that it reads, and the one that it writes."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    loss: Tensor


class Graphs:
    """A pass over batches, captured for each shape that comes often, and then replayed.

    A replay draws dropout from the generator's current state. A pass that needs values of the GPU
    on the host cannot be captured; it runs without a graph, and the log says so once.

    Args:
        backward: forward and backward pass over a batch on the GPU; returns the loss. The
            tensors that it reads and the gradients that it adds to must stay in place.
        device: the GPU.
        pad_id: a token that the model does not attend to.
    """

    failed: ClassVar[bool] = False  # a capture of this process failed; no other would be safe

    def __init__(
        self, backward: Callable[[Batch], Tensor], device: torch.device, pad_id: int
    ) -> None:
        self.backward, self.device, self.pad_id = backward, device, pad_id
        self.seen: Counter[object] = Counter()
        self.graphs: dict[object, Graph] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.works = True

    def run(self, batch: Batch) -> Tensor:
        """Run a pass over a batch on the CPU, and return its loss."""
        batch = lengthened(batch, self.pad_id)
        batch = {name: value.pin_memory() for name, value in batch.items()}
        shapes = tuple((name, tuple(v.shape), v.dtype) for name, v in sorted(batch.items()))
        self.seen[shapes] += 1
        if not self.works or Graphs.failed or self.seen[shapes] < EAGER:
            return self.backward(self._moved(batch))
        if self.seen[shapes] == EAGER:
            return self._rehearsed(self._moved(batch))
        if shapes not in self.graphs and len(self.graphs) < MOST:
            self._capture(shapes, batch)
        if Graphs.failed or shapes not in self.graphs:
            return self.backward(self._moved(batch))
        captured = self.graphs[shapes]
        for name, value in batch.items():
            captured.batch[name].copy_(value, non_blocking=True)
        captured.graph.replay()
        return captured.loss.clone()

    def _moved(self, batch: Batch) -> Batch:
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def _rehearsed(self, batch: Batch) -> Tensor:
        loss, waits = rehearsed(self.backward, batch)
        if waits is not None:
            self.works = False
            _say(f"{waits} in them needs values of the GPU")
        return loss

    def _capture(self, shapes: object, batch: Batch) -> None:
        graph, inputs = torch.cuda.CUDAGraph(), self._moved(batch)
        generator = torch.cuda.default_generators[self.device.index or 0]
        before = generator.clone_state()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                loss = self.backward(inputs)
        except RuntimeError as error:
            Graphs.failed = True  # a replay would draw from the state left behind
            generator.graphsafe_set_state(before)
            _say(str(error).splitlines()[0])
            return
        self.graphs[shapes] = Graph(graph, inputs, loss)


def _say(reason: str) -> None:
    log.warning("steps are launched one operation after another, for %s", reason)


def rehearsed(backward: Callable[[Batch], Tensor], batch: Batch) -> tuple[Tensor, str | None]:
    """Run a pass and find the first operation in it that needs values of the device.

    Returns:
        The loss, and the operation's name or null.
    """
    with _as_if_capturing(), Waits() as waits:
        loss = backward(batch)
    return loss, waits.first


@contextmanager
def _as_if_capturing() -> Iterator[None]:
    """Make torch say that a capture is under way.

    Transformers then skips the checks of values that it can do without, as it will in the capture
    itself. PyTorch has no other way to say so.
    """
    original = torch.cuda.is_current_stream_capturing
    torch.cuda.is_current_stream_capturing = lambda: True
    try:
        yield
    finally:
        torch.cuda.is_current_stream_capturing = original


class Waits(TorchDispatchMode):
    """Notes the first operation whose result's shape or use depends on values."""

    first: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags or (
            torch.Tag.dynamic_output_shape in func.tags and _by_mask(func, args)
        ):
            self.first = self.first or str(func)
        return func(*args, **(kwargs or {}))


def _by_mask(func: Any, args: Any) -> bool:
    """Return false for an indexing without a mask, because values do not decide its shape."""
    if func is not torch.ops.aten.index.Tensor:
        return True
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
