"""A sparse trained change of a frozen linear layer's weight."""

import torch
from torch import Tensor, nn


class SparseDelta(nn.Module):
    """``base(x) + D x``, where D (out, in) is zero but for ``values`` (n,) at the places ``index``.

    Args:
        base_layer: the frozen layer.
        index: rows and columns of the values, (2, n).
        shape: (out, in).
    """

    def __init__(self, base_layer: nn.Module, index: Tensor, shape: tuple[int, int]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.shape = shape
        device = next(base_layer.parameters()).device
        self.register_buffer("index", index.to(device), persistent=False)
        self.index: Tensor
        self.values = nn.Parameter(torch.zeros(index.shape[1], device=device))

    def dense(self) -> Tensor:
        """Return D, (out, in)."""
        return scattered(self.values, self.index, self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out), in the base layer's dtype."""
        y = self.base_layer(x)
        rows, columns = self.index
        added = (x[..., columns] * self.values).to(y.dtype)
        return y.index_add(y.dim() - 1, rows, added)


def scattered(values: Tensor, index: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return a matrix of zeros but for given values.

    Args:
        values: (n,).
        index: rows and columns of the values, (2, n).
        shape: the matrix's rows and columns.
    """
    return values.new_zeros(shape).index_put((index[0], index[1]), values)
