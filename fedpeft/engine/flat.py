"""Trained parameters as one vector, and one client's optimizer over it."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedpeft.config.optimization import Optimization
from fedpeft.methods.base import Term
from fedpeft.state import State


class Flat:
    """Parameters as views of one vector, and their gradients as views of another.

    A step, a load or a copy takes as many operations for a thousand parameters as for one. All
    parameters have one learning rate and one weight decay.

    Args:
        named: parameters by name, of one dtype on one device.
        device: device of the vector; null for the parameters' own.
    """

    def __init__(
        self, named: Mapping[str, nn.Parameter], device: torch.device | None = None
    ) -> None:
        self.named = named
        first = next(iter(named.values()))
        self.vector = nn.Parameter(joined(named.values()).to(device or first.device))
        self.vector.grad = torch.zeros_like(self.vector)
        self.attach()

    def attach(self) -> None:
        """Make the parameters views of this vector, even if another ``Flat`` has them."""
        assert self.vector.grad is not None
        data, grads = (self.parts(x) for x in (self.vector.data, self.vector.grad))
        for name, parameter in self.named.items():
            parameter.data, parameter.grad = data[name], grads[name]

    def parts(self, vectors: Tensor) -> State:
        """Cut (..., numbers) into one view a parameter, (..., *shape), by name."""
        parts, at = {}, 0
        for name, parameter in self.named.items():
            part = vectors[..., at : at + parameter.numel()]
            parts[name] = part.view(*vectors.shape[:-1], *parameter.shape)
            at += parameter.numel()
        return parts

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Set all parameters from a full state, which may hold more."""
        self.vector.copy_(joined(state[name] for name in self.named))

    def state(self) -> State:
        """Copy all parameters to the CPU, full."""
        parts = self.parts(self.vector.detach().cpu())
        return {name: part.clone() for name, part in parts.items()}

    def zero(self) -> None:
        """Set the gradients to zero."""
        assert self.vector.grad is not None
        self.vector.grad.zero_()

    def release(self) -> None:
        """Remove the parameters' gradients; the vector keeps its own."""
        for parameter in self.named.values():
            parameter.grad = None


def joined(tensors: Iterable[Tensor]) -> Tensor:
    """Copy all numbers into one vector."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


class Stepper:
    """One client's optimizer over a ``Flat``.

    AdamW corrects its moments by the number of steps, which differs by parameter if roles differ
    by round. So neighbouring parameters of equal step counts are one tensor for the optimizer.

    Args:
        flat: the parameters and gradients.
        optimization: name and settings of the optimizer.
        lr: learning rate of the first step.
        moments: result of ``moments`` in an earlier round, for any names; null or empty for none.
    """

    def __init__(
        self, flat: Flat, optimization: Optimization, lr: float, moments: State | None = None
    ) -> None:
        self.flat, self.optimization = flat, optimization
        moments = moments or {}
        self._stretches = _stretches(flat, moments)
        self._tensors = [flat.vector] if len(self._stretches) == 1 else self._slices()
        self._optimizer = optimization.build(self._tensors, lr)
        for tensor, names in zip(self._tensors, self._stretches, strict=True):
            if state := _state_of(names, moments, tensor.device):
                self._optimizer.state[tensor] = state

    def _slices(self) -> list[nn.Parameter]:
        """Return views of the vector, one a stretch, whose gradients are views too."""
        assert self.flat.vector.grad is not None
        slices, at = [], 0
        for names in self._stretches:
            end = at + sum(self.flat.named[name].numel() for name in names)
            part = nn.Parameter(self.flat.vector.data[at:end])
            part.grad = self.flat.vector.grad[at:end]
            slices.append(part)
            at = end
        return slices

    def step(self, lr: float, terms: Sequence[Term]) -> None:
        """Take one step by the accumulated gradients, and set them to zero.

        Args:
            lr: learning rate of this step.
            terms: corrections of the gradients, in order.
        """
        for term in terms:
            term.correct(self.flat.named)
        if self.optimization.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.flat.vector, self.optimization.max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)

    def moments(self) -> State:
        """Return the optimizer's state as ``kind:name``, on the CPU.

        Kinds are ``exp_avg``, ``exp_avg_sq`` or ``momentum_buffer``, of a parameter's shape, and
        ``step``, a scalar.
        """
        moments: State = {}
        for tensor, names in zip(self._tensors, self._stretches, strict=True):
            for kind, value in self._optimizer.state[tensor].items():
                if value is None:
                    continue
                sizes = [self.flat.named[name].numel() for name in names]
                parts = value.split(sizes) if value.dim() else [value] * len(names)
                for name, part in zip(names, parts, strict=True):
                    shape = self.flat.named[name].shape if value.dim() else ()
                    moments[f"{kind}:{name}"] = part.detach().to("cpu", copy=True).reshape(shape)
        return moments


def _stretches(flat: Flat, moments: State) -> list[list[str]]:
    """Cut the names, in order, wherever the number of steps changes."""
    stretches: list[list[str]] = []
    last: object = None
    for name in flat.named:
        count = _count(name, moments)
        if not stretches or count != last:
            stretches.append([])
        stretches[-1].append(name)
        last = count
    return stretches


def _count(name: str, moments: State) -> float | None:
    """Return a parameter's steps so far; null if it has no moments."""
    if step := moments.get(f"step:{name}"):
        return float(step)
    return 0.0 if f"momentum_buffer:{name}" in moments else None


def _state_of(names: Sequence[str], moments: State, device: torch.device) -> dict[str, Tensor]:
    """Join the moments of neighbouring parameters with equal numbers of steps."""
    state: dict[str, Tensor] = {}
    for kind in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
        if f"{kind}:{names[0]}" in moments:
            state[kind] = joined(moments[f"{kind}:{name}"] for name in names).to(device)
    if f"step:{names[0]}" in moments:
        state["step"] = moments[f"step:{names[0]}"].clone().to(device)
    return state
