"""Passes on a GPU as CUDA graphs: one launch in place of the hundreds that a small step waits for.

https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.data.batching import Batch, lengthened

log = logging.getLogger(__name__)

EAGER = 2  # passes of a shape before it is captured: rare shapes would not earn it back
MOST = 256  # graphs of a process


@dataclass
class Graph:
    """A captured pass, the tensors that it reads, and the one that it writes."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    loss: Tensor


class Graphs:
    """A pass over batches, captured for each shape that comes often, and then replayed.

    A replay draws dropout from the generator as it then stands. What cannot be captured, since it
    waits for the GPU or decides by values there, runs as it is, and the log says so once.

    Args:
        backward: forward and backward pass over a batch on the GPU; returns the loss. What it
            reads and adds gradients to must stay in place.
        device: the GPU.
        pad_id: a token that the model does not attend to.
    """

    def __init__(
        self, backward: Callable[[Batch], Tensor], device: torch.device, pad_id: int
    ) -> None:
        self.backward, self.device, self.pad_id = backward, device, pad_id
        self.seen: Counter[object] = Counter()
        self.graphs: dict[object, Graph] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.works = True

    def run(self, batch: Batch) -> Tensor:
        """A pass over a batch of the CPU's; the loss."""
        batch = lengthened(batch, self.pad_id)
        batch = {name: value.pin_memory() for name, value in batch.items()}
        shapes = tuple((name, tuple(v.shape), v.dtype) for name, v in sorted(batch.items()))
        self.seen[shapes] += 1
        if shapes not in self.graphs and self._worth(shapes):
            self._capture(shapes, batch)
        if shapes not in self.graphs:
            return self.backward(self._moved(batch))
        found = self.graphs[shapes]
        for name, value in batch.items():
            found.batch[name].copy_(value, non_blocking=True)
        found.graph.replay()
        return found.loss.clone()

    def _worth(self, shapes: object) -> bool:
        return self.works and self.seen[shapes] > EAGER and len(self.graphs) < MOST

    def _moved(self, batch: Batch) -> Batch:
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def _capture(self, shapes: object, batch: Batch) -> None:
        graph, given = torch.cuda.CUDAGraph(), self._moved(batch)
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                loss = self.backward(given)
        except RuntimeError as error:
            self.works = False
            reason = str(error).splitlines()[0]
            log.warning("steps are launched one operation after another, for %s", reason)
            return
        self.graphs[shapes] = Graph(graph, given, loss)
