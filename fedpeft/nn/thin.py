"""Products with thin matrices: thousands of tokens, hundreds of features, a few columns.

They cost memory traffic, not arithmetic, and MKL takes up to eight times as long for a product
whose long axis does not come last (``x.T @ u`` for ``u.T @ x``). So thin results are computed
transposed, and an adapter builds and reads as few tensors of its input's width as it can.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which products keep their inputs' dtype."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class ThinLinear(torch.autograd.Function):
    """``x L R + b`` for rows x, (tokens, n); the first of its results.

    L is (n, q * m), R (m, k / q) and b (1, k). The row x L, read as q rows of m, times R is a row
    of k. ``vmap`` adds one more axis in front of all tensors. The second result, z = x L, is kept
    for backward and has no gradient.
    """

    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, Tensor]:  # torch is slow to bind many names
        x, left, right, bias = tensors
        z = _thin(x, left.mT, right.shape[-2])
        return _rows(z @ right, bias.shape[-1]).add_(bias), z

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """See ``torch.autograd.Function.setup_context``."""
        _keep(ctx, inputs[:3], output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, left, right, z = ctx.saved_tensors
        u, *grads_of_sides = _pull(grads[0], x, z, left, right, ctx.needs_input_grad[1:])
        return u @ left.mT if ctx.needs_input_grad[0] else None, *grads_of_sides

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *tensors: Tensor) -> tuple[Any, Any]:
        return ThinLinear.apply(*_stacked(info, in_dims, tensors)), (0, 0)


class ThinAdapter(torch.autograd.Function):
    """``x + relu(x L1 R1 + b1) L2 R2 + b2``, as in ``ThinLinear``; the first of its results."""

    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        x, left1, right1, bias1, left2, right2, bias2 = tensors
        h, z1 = ThinLinear.forward(x, left1, right1, bias1)
        z2 = _thin(h.relu_(), left2.mT, right2.shape[-2])
        y = _rows(x + bias2, right2.shape[-1])
        y = y.addmm_(z2, right2) if y.dim() == 2 else y.baddbmm_(z2, right2)
        return y.reshape(x.shape), z1, h, z2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """See ``torch.autograd.Function.setup_context``."""
        x, left1, right1, _, left2, right2, _ = inputs
        _keep(ctx, (x, left1, right1, left2, right2), output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, left1, right1, left2, right2, z1, h, z2 = ctx.saved_tensors
        grad, needs = grads[0], ctx.needs_input_grad
        u2, *grads2 = _pull(grad, h, z2, left2, right2, needs[4:])
        inner = (u2 @ left2.mT) * (h > 0)
        u1, *grads1 = _pull(inner, x, z1, left1, right1, needs[1:4])
        if not needs[0]:
            return None, *grads1, *grads2
        add = torch.addmm if x.dim() == 2 else torch.baddbmm
        return add(grad, u1, left1.mT), *grads1, *grads2

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *tensors: Tensor) -> tuple[Any, Any]:
        return ThinAdapter.apply(*_stacked(info, in_dims, tensors)), (0, 0, 0, 0)


def _keep(ctx: Any, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """Save inputs and results for backward; the results get no gradient."""
    ctx.save_for_backward(*inputs, *results)
    ctx.mark_non_differentiable(*results)
    ctx.set_materialize_grads(False)


def _stacked(info: Any, dims: Sequence[int | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Put vmap's axis in front of every tensor; a tensor without it is repeated."""
    pairs = zip(tensors, dims, strict=True)
    return [
        tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in pairs
    ]


def _rows(x: Tensor, columns: int) -> Tensor:
    """Reshape x to rows of so many columns, in order."""
    return x.reshape(*x.shape[:-2], -1, columns)


def _thin(x: Tensor, side: Tensor, columns: int) -> Tensor:
    """Return x side^T as rows of so many columns."""
    return _rows((side @ x.mT).mT, columns)


def _pull(
    grad: Tensor, x: Tensor, z: Tensor, left: Tensor, right: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients at z = x L and, where needed, at L, R and b.

    Args:
        grad: the gradient at z R + b.
        x: rows, (tokens, n).
        z: x L, as rows of R's height.
        left: L.
        right: R.
        needs: true where L, R and b need a gradient.
    """
    wide = _rows(grad, right.shape[-1])
    u = _thin(wide, right, left.shape[-1])
    return (
        u,
        (u.mT @ x).mT if needs[0] else None,
        z.mT @ wide if needs[1] else None,
        grad.sum(-2, keepdim=True) if needs[2] else None,
    )
