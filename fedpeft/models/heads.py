"""A language model without its head, so that the head need not read every token."""

from copy import copy
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn


class Parted(NamedTuple):
    """A language model in two parts.

    Attributes:
        backbone: is called as the model is; its ``logits`` are the vectors that the head reads.
        head: maps vectors (..., d) to logits (..., V).
        vocabulary: V.
    """

    backbone: nn.Module
    head: nn.Module
    vocabulary: int


class _Place(NamedTuple):
    path: str  # the head's name in the model
    vocabulary: int


_places: WeakKeyDictionary[nn.Module, _Place | None] = WeakKeyDictionary()


def parted(model: nn.Module) -> Parted | None:
    """Return a model in two parts that share its modules; null if its logits are more than these.

    The first call for a model computes the logits of a short text both ways. Only equal bits show
    that the head comes last, because some models scale or cap their logits after it.

    Args:
        model: reads text; perhaps inside a wrapper such as ``Prompted``.
    """
    if model not in _places:
        _places[model] = _place(model)
    place = _places[model]
    if place is None:
        return None
    return Parted(_without(model, place.path), model.get_submodule(place.path), place.vocabulary)


def _place(model: nn.Module) -> _Place | None:
    owner = getattr(model, "inner", model)
    head: Any = getattr(owner, "get_output_embeddings", lambda: None)()
    paths = [name for name, module in model.named_modules() if module is head]
    if not paths:
        return None
    backbone = _without(model, paths[0])
    ids = torch.arange(4, device=next(model.parameters()).device)[None]
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    training = {module: module.training for module in model.modules()}
    model.eval()
    backbone.eval()
    try:
        with torch.no_grad():
            logits = model(**text).logits.float()
            same = torch.equal(head(backbone(**text).logits).float(), logits)
    except (AttributeError, RuntimeError):  # the model reads more of its head than its result
        return None
    finally:
        for module, mode in training.items():
            module.training = mode
    return _Place(paths[0], logits.shape[-1]) if same else None


def _without(module: nn.Module, path: str) -> nn.Module:
    """Return a copy that shares all modules but the one at a path, which returns its input."""
    name, _, rest = path.partition(".")
    shell = copy(module)
    shell._modules = dict(module._modules)
    shell._modules[name] = _without(module.get_submodule(name), rest) if rest else nn.Identity()
    return shell
