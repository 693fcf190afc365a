"""Whether a model can train in other ways than its own, tried before any client does."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpeft.config.schema import Config
from fedpeft.data.batching import Batch, Examples
from fedpeft.data.tasks.base import Task
from fedpeft.engine.passes import autocast, to_device
from fedpeft.engine.stacked import Draws, Unsupported, owners
from fedpeft.engine.together import size_of
from fedpeft.seeding import rng_state

log = logging.getLogger(__name__)


def together(config: Config, model: nn.Module, names: list[str], rows: Examples) -> str | None:
    """How clients can train in one pass: ``alike``, or ``random`` where the model draws.

    Null if they cannot: then the log says why.

    Args:
        names: of the parameters that train in some round.
    """
    model.train()
    try:
        if config.model.gradient_checkpointing:
            raise Unsupported("gradient checkpointing draws anew in the backward pass")
        batches = [rows.select(rows.rows[:count]).batch(np.arange(count)) for count in (1, 2)]
        random = [probe(model, config.data, names, b, config.precision) for b in batches]
    except Unsupported as reason:
        name = type(config.method).__name__
        log.warning("%s: clients train one by one, for %s", name, reason)
        return None
    return "random" if any(random) else "alike"


def probe(model: nn.Module, task: Task, names: Sequence[str], batch: Batch, precision: str) -> bool:
    """Tries whether copies of parameters can be told apart, in a forward pass without gradients.

    Args:
        names: of the parameters that train in some round.

    Raises:
        Unsupported: a module that holds some does not make one tensor of one with an entry a
            sequence, or a parameter has a hook, which its copies would not run.
    """
    for name, parameter in model.named_parameters():
        if name in names and parameter._backward_hooks:
            raise Unsupported(f"{name} has a hook on its gradient")
    rows, called = size_of(batch)[0], set()
    device = next(model.parameters()).device

    def note(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        tensors = [x for x in (*given, *named.values()) if isinstance(x, Tensor)]
        alone = len(tensors) == 1 and given and given[0] is tensors[0]
        if alone and isinstance(output, Tensor) and _by_sequence(tensors[0], rows):
            called.add(module)

    paths = owners(model, names)
    hooks = [model.get_submodule(p).register_forward_hook(note, with_kwargs=True) for p in paths]
    draws = Draws([rng_state(device)], [size_of(batch)], device)
    with torch.no_grad(), autocast(device, precision), draws:
        task.logits(model, to_device(batch, device))
    for hook in hooks:
        hook.remove()
    for path in paths:
        if model.get_submodule(path) not in called:
            raise Unsupported(f"{path} is not called with one entry a sequence")
    return draws.drew


def _by_sequence(x: Tensor, rows: int) -> bool:
    return x.dim() > 1 and x.shape[0] == rows
