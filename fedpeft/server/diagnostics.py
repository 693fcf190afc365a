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
    """Measure how far the aggregate is from the mean of the clients' effective matrices.

    It is |W(avg theta) - avg W(theta)|_F / |avg W(theta) - W(theta_0)|_F over all modules, where W
    is ``method.effective`` and theta_0 the state that the round began with. 0 means that the
    aggregation is exact. One module's dense matrices at a time are held, in float64.

    Args:
        model: holds the method; its parameters are overwritten.
        method: gives the effective matrices.
        before: every parameter that can change, full, at the round's start; the other states
            override parts of it.
        states: each client's state after training, full.
        weights: one weight a client, in the order of ``states``, summing to 1.
        after: the aggregate, full.

    Returns:
        The ratio, or null if no module has factors or nothing moved.
    """
    off = moved = 0.0
    factored = False
    for name, module in model.named_modules():
        if method.effective(module) is None:
            continue
        factored = True
        parts = [_part(state, name) for state in (before, after, *states)]
        start, average, *clients = (_effective(module, method, parts[0], p) for p in parts)
        mean = torch.zeros_like(start)
        for weight, matrix in zip(weights, clients, strict=True):
            mean.add_(matrix, alpha=weight)
        off += float((average - mean).square().sum())
        moved += float((mean - start).square().sum())
    return (off / moved) ** 0.5 if factored and moved > 0 else None


def _part(state: State, module: str) -> State:
    prefix = module + "."
    return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}


def _effective(module: nn.Module, method: Method, before: State, state: State) -> Tensor:
    load_state(module, before, state)
    matrix = method.effective(module)
    assert matrix is not None
    return matrix.detach().to("cpu", torch.float64)


def drift(starts: Sequence[State], states: Sequence[State]) -> dict[str, float]:
    """Return mean and spread of the clients' update norms, and the mean cosine of two updates.

    Args:
        starts: each client's shared parameters before training, full; zero where the client trains
            no entry, as in ``states``.
        states: the same parameters after training, full.
    """
    if not states[0]:
        return {}  # nothing is sent
    products = torch.zeros(len(states), len(states), dtype=torch.float64)
    for name in states[0]:
        before, after = ([s[name].reshape(-1).split(BLOCK) for s in ss] for ss in (starts, states))
        for block in range(len(after[0])):
            pairs = zip(before, after, strict=True)
            updates = torch.stack([(end[block] - start[block]).double() for start, end in pairs])
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
    """Measure |f'(x) - f(x)|_F / |f(x)|_F for every module f that injection replaced by f'.

    Both get the inputs that f sees in the untouched model, so errors of earlier layers do not add
    up. Padding is left in, because it is the same for both.

    Args:
        base: the untouched model.
        injected: the model with the method in it.
        forward: runs a model on a batch.

    Returns:
        The errors, by the module's name.
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
