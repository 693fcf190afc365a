"""Modules called with several copies of their parameters at once, each on its share of the rows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode

from fedpeft.seeding import rng_state, set_rng_state


class Unsupported(Exception):
    """The model cannot train several clients in one pass; the message says why."""


def owners(model: nn.Module, names: Sequence[str]) -> dict[str, list[str]]:
    """Return the called modules of some parameters, by path, with the names below each.

    Raises:
        Unsupported: a parameter belongs to no module below the model.
    """
    paths = {_called(model, name.rpartition(".")[0]) for name in names}
    if "" in paths:
        raise Unsupported("a trained parameter belongs to the model as a whole")
    tops = sorted(p for p in paths if not any(p.startswith(f"{q}.") for q in paths))
    below: dict[str, list[str]] = {top: [] for top in tops}
    for name in names:
        top = next(t for t in tops if name.startswith(f"{t}."))
        below[top].append(name.removeprefix(f"{top}."))
    return below


def _called(model: nn.Module, path: str) -> str:
    """Return the path of the nearest module at or above with a forward (lists have none)."""
    while path and type(model.get_submodule(path)).forward is nn.Module.forward:
        path = path.rpartition(".")[0]
    return path


class Stack:
    """Takes the place of a module's forward and computes it with each client's parameters.

    Args:
        model: holds the module.
        path: the module's name in the model.
        names: names, below the module, of the parameters that differ by client.
    """

    def __init__(self, model: nn.Module, path: str, names: Sequence[str]) -> None:
        self.path, self.names = path, names
        self.module = model.get_submodule(path)
        self.shell = copy(self.module)  # the same parameters, but its own forward
        self.copies: dict[str, Tensor] = {}
        self.draws: Draws
        self.count = 0

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        folded = x.reshape(self.count, -1, *x.shape[1:])
        if type(self.shell) is nn.Linear:  # a fifth of vmap's overhead
            return self._linear(folded).flatten(0, 1)

        def one(copies: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(self.shell, copies, (x, *args), kwargs)

        self.draws.apart = False
        try:
            return vmap(one)(self.copies, folded).flatten(0, 1)
        finally:
            self.draws.apart = True

    def _linear(self, x: Tensor) -> Tensor:
        flat = x.flatten(1, -2)
        weight: Any = self.copies.get("weight", self.shell.weight)
        bias: Any = self.copies.get("bias", self.shell.bias)
        y = flat @ weight.mT
        if bias is not None:
            y = y + (bias.unsqueeze(1) if bias.dim() == 2 else bias)
        return y.unflatten(1, x.shape[1:-1])


@contextmanager
def calling(
    stacks: Sequence[Stack], copies: Mapping[str, Tensor], count: int, draws: "Draws"
) -> Iterator[None]:
    """Put stacks in the place of their modules' forward.

    Args:
        stacks: stacks of the modules whose parameters differ by client.
        copies: stacked parameters, (K, ...), by name in the model.
        count: K, the number of clients.
        draws: the clients' random draws.
    """
    for stack in stacks:
        stack.count, stack.draws = count, draws
        stack.copies = {name: copies[f"{stack.path}.{name}"] for name in stack.names}
        stack.module.forward = stack
    try:
        yield
    finally:
        for stack in stacks:
            del stack.module.forward


class Draws(TorchFunctionMode):
    """Lets dropout draw for each member as it would alone.

    Args:
        states: each member's state of the random generator; each draw sets it anew.
        sizes: each member's sequences and padded length.
        device: the device whose generator draws.
    """

    def __init__(
        self, states: Sequence[Tensor], sizes: Sequence[tuple[int, int]], device: torch.device
    ) -> None:
        super().__init__()
        self.states, self.device = list(states), device
        self.drew = False  # true once anything was drawn
        self.apart = True  # False within vmap, where members cannot be told apart
        self.rows = [rows for rows, _ in sizes]
        longest = max(length for _, length in sizes)
        self.excess = [longest - length for _, length in sizes]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention and kwargs.get("dropout_p", 0) > 0:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(
        self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0:
            return x
        if not self.apart:
            raise Unsupported("a module with trained parameters draws at random")
        tokens = {3: (1,), 4: (2, 3)}.get(x.dim(), ())  # (B, L, d); (B, heads, L, L)
        return self._each(lambda part: F.dropout(part, p), tokens, (x, tokens))

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, mask, **kwargs)

        inputs = [(x, (2,)) for x in (q, k, v)]  # (B, heads, L, d)
        return self._each(attend, (2,), *inputs, (attn_mask, (2, 3)))

    def _each(
        self,
        function: Callable[..., Tensor],
        tokens: Sequence[int],
        *inputs: tuple[Tensor | None, Sequence[int]],
    ) -> Tensor:
        """Apply a function to each member's part under its own generator, and pad with zeros.

        Args:
            function: maps one member's parts of ``inputs`` to its part of the result.
            tokens: axes of tokens in the result.
            inputs: tensors or null, each with its axes of tokens.
        """
        self.drew = True
        parts = [self._split(tensor, dims) for tensor, dims in inputs]
        results = []
        before = rng_state(self.device)
        for i, excess in enumerate(self.excess):
            set_rng_state(self.states[i], self.device)
            value = function(*(part[i] for part in parts))
            self.states[i] = rng_state(self.device)
            results.append(_filled(value, excess, tokens))
        set_rng_state(before, self.device)
        return torch.cat(results)

    def _split(self, tensor: Tensor | None, dims: Sequence[int]) -> Sequence[Tensor | None]:
        if tensor is None:
            return [None] * len(self.rows)
        if tensor.shape[0] == 1 < sum(self.rows):  # one mask for all
            tensor = tensor.expand(sum(self.rows), *tensor.shape[1:])
        if tensor.shape[0] != sum(self.rows):
            raise Unsupported("the model draws at random for what is no row of the batch")
        parts = tensor.split(self.rows)
        return [cut(part, n, dims) for part, n in zip(parts, self.excess, strict=True)]


def cut(tensor: Tensor, excess: int, dims: Sequence[int]) -> Tensor:
    """Cut the last tokens off; an axis of size 1 serves all tokens and stays.

    Args:
        tensor: one member's tensor.
        excess: number of tokens to cut off.
        dims: axes of tokens.
    """
    for dim in dims if excess else ():
        if tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, tensor.shape[dim] - excess)
    return tensor


def _filled(tensor: Tensor, excess: int, dims: Sequence[int]) -> Tensor:
    """Put zeros in the place of the tokens that ``cut`` cut off."""
    for dim in dims if excess else ():
        tensor = F.pad(tensor, [0, 0] * (tensor.dim() - 1 - dim) + [0, excess])
    return tensor
