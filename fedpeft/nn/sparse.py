"""A sparse trained change of a frozen linear layer's weight."""

import torch
from torch import Tensor, nn


class SparseDelta(nn.Module):
    """``base(x) + D x``, D (out, in) zero but for ``values`` at the places ``index`` (2, n)."""

    def __init__(self, base_layer: nn.Module, index: Tensor, shape: tuple[int, int]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.shape = shape
        device = next(base_layer.parameters()).device
        self.register_buffer("index", index.to(device), persistent=False)
        self.index: Tensor
        self.values = nn.Parameter(torch.zeros(index.shape[1], device=device))

    def dense(self) -> Tensor:
        """D."""
        return scattered(self.values, self.index, self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the base layer's dtype."""
        y = self.base_layer(x)
        rows, columns = self.index
        added = (x[..., columns] * self.values).to(y.dtype)
        return y.index_add(y.dim() - 1, rows, added)


def scattered(values: Tensor, index: Tensor, shape: tuple[int, int]) -> Tensor:
    """Zeros of a shape but for values at places (2, n)."""
    return values.new_zeros(shape).index_put((index[0], index[1]), values)
