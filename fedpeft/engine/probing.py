"""Tests whether a model can train several clients in one pass, before any client does."""

import logging
from collections.abc import Sequence
from enum import Enum
from typing import Any

import numpy as np
from torch import Tensor, nn

from fedpeft.data.batching import Batch, Examples
from fedpeft.data.tasks.base import Task
from fedpeft.engine.passes import autocast, to_device
from fedpeft.engine.replica import Replica
from fedpeft.engine.stacked import Draws, Unsupported, owners
from fedpeft.engine.together import size_of
from fedpeft.seeding import rng_state

log = logging.getLogger(__name__)


class Vectorised(Enum):
    """Tells whether clients can train in one pass, and whether the model then draws at random."""

    NO = "no"
    WITHOUT_DRAWS = "without draws"
    WITH_DRAWS = "with draws"


def vectorised(replica: Replica, rows: Examples) -> Vectorised:
    """Test how clients can train in one pass.

    Args:
        replica: the model, its method and the names that train in some round.
        rows: training rows; the model runs on the first one and the first two.

    Returns:
        The way; if it is ``NO``, the log says why.
    """
    config, model = replica.config, replica.model
    model.train()
    try:
        if config.model.gradient_checkpointing:
            raise Unsupported("gradient checkpointing draws anew in the backward pass")
        batches = [rows.select(rows.rows[:count]).batch(np.arange(count)) for count in (1, 2)]
        names, precision = replica.roles.names, config.precision
        replica.set_trainable(set(names))  # a head that trains is called in another way
        draws = [probe(model, config.data, names, batch, precision) for batch in batches]
    except Unsupported as reason:
        name = type(config.method).__name__
        log.warning("%s: clients train one by one, which is slower, because %s", name, reason)
        return Vectorised.NO
    return Vectorised.WITH_DRAWS if any(draws) else Vectorised.WITHOUT_DRAWS


def probe(model: nn.Module, task: Task, names: Sequence[str], batch: Batch, precision: str) -> bool:
    """Test in a forward pass whether modules can apply a copy of their parameters a client.

    Args:
        model: the model in training mode.
        task: says how the model is called.
        names: names of the parameters that train in some round.
        batch: one or more rows.
        precision: ``fp32`` or ``bf16``.

    Returns:
        True if the model drew at random.

    Raises:
        Unsupported: a module that holds some of the parameters does not turn one tensor with an
            entry a sequence into another.
    """
    rows, called, otherwise = size_of(batch)[0], set(), set()
    device = next(model.parameters()).device

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        alone = len(tensors) == 1 and args and args[0] is tensors[0]
        split = alone and isinstance(output, Tensor) and _by_sequence(tensors[0], rows)
        (called if split else otherwise).add(module)

    paths = owners(model, names)
    hooks = [model.get_submodule(p).register_forward_hook(note, with_kwargs=True) for p in paths]
    draws = Draws([rng_state(device)], [size_of(batch)], device)
    with autocast(device, precision), draws:
        task.forward(model, to_device(batch, device))
    for hook in hooks:
        hook.remove()
    for path in paths:
        if model.get_submodule(path) not in called - otherwise:
            raise Unsupported(f"{path} is not called with one entry a sequence")
    return draws.drew


def _by_sequence(x: Tensor, rows: int) -> bool:
    return x.dim() > 1 and x.shape[0] == rows
