"""Diagnostics that few systems report: interference, client drift, initial error."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedpeft.methods.base import Method
from fedpeft.state import State, load_state

BLOCK = 1 << 17
"""Numbers of each client's update that are held in float64 at a time."""


@torch.no_grad()
def interference(
    model: nn.Module,
    method: Method,
    before: State,
    states: Sequence[State],
    weights: Sequence[float],
    after: State,
) -> float | None:
    """|W(avg theta) - avg W(theta)|_F / |avg W(theta) - W(theta_0)|_F over all effective matrices.

    W is ``method.effective``, theta_0 the state that the round began with. 0 means that the
    aggregation is exact. None if no module has factors or nothing moved. One module's dense
    matrix at a time is held, in float64.

    Args:
        before: full trainable state at the round's start; the others override parts of it.
    """
    off = moved = 0.0
    found = False
    for name, module in model.named_modules():
        if method.effective(module) is None:
            continue
        found = True
        parts = [_part(state, name) for state in (before, after, *states)]
        start, average, *clients = (_effective(module, method, parts[0], p) for p in parts)
        mean = torch.zeros_like(start)
        for weight, own in zip(weights, clients, strict=True):
            mean.add_(own, alpha=weight)
        off += float((average - mean).square().sum())
        moved += float((mean - start).square().sum())
    return (off / moved) ** 0.5 if found and moved > 0 else None


def _part(state: State, module: str) -> State:
    prefix = module + "."
    return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}


def _effective(module: nn.Module, method: Method, before: State, state: State) -> Tensor:
    load_state(module, before, state)
    matrix = method.effective(module)
    assert matrix is not None
    return matrix.detach().to("cpu", torch.float64)


def drift(before: State, states: Sequence[State]) -> dict[str, float]:
    """Mean and spread of the clients' update norms, and the mean cosine between two updates."""
    if not states[0]:
        return {}  # nothing is sent
    products = torch.zeros(len(states), len(states), dtype=torch.float64)
    for name, start in before.items():
        if name in states[0]:
            after = [state[name].reshape(-1).split(BLOCK) for state in states]
            for block, *changed in zip(start.reshape(-1).split(BLOCK), *after, strict=True):
                updates = torch.stack([(own - block).double() for own in changed])
                products += updates @ updates.T
    norms = products.diagonal().sqrt()
    result = {
        "update_norm_mean": float(norms.mean()),
        "update_norm_std": float(norms.std(correction=0)),
    }
    if len(states) > 1 and float(norms.min()) > 0:
        cosines = products / norms.outer(norms)
        n = len(states)
        result["update_cosine"] = float((cosines.sum() - cosines.trace()) / (n * (n - 1)))
    return result


@torch.no_grad()
def initial_error(
    base: nn.Module, injected: nn.Module, forward: Callable[[nn.Module], Any]
) -> dict[str, float]:
    """|f'(x) - f(x)|_F / |f(x)|_F of every module that injection replaced, on real activations.

    Both get the inputs that the module sees in the untouched model, so errors of earlier layers
    do not add up. Padding is left in; it is the same for both.

    Args:
        forward: runs a model on a batch.
    """
    replaced = dict(injected.named_modules())
    sites = [
        name
        for name, module in base.named_modules()
        if name in replaced and type(module) is not type(replaced[name]) and _is_leaf(module)
    ]
    errors: dict[str, float] = {}

    def compare(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            new = replaced[name](*inputs)
            errors[name] = float((new - output).norm() / output.norm())

        return hook

    handles = [base.get_submodule(s).register_forward_hook(compare(s)) for s in sites]
    try:
        base.eval()
        injected.eval()
        forward(base)
    finally:
        for handle in handles:
            handle.remove()
    return errors


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None
