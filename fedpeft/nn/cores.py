"""An adapter of small trained matrices between frozen bases, beside a frozen linear layer."""

import torch
from torch import Tensor, nn

BASES = ("svd", "orthogonal")


class CoreAdapter(nn.Module):
    """``base(x) + sum over heads i of s_i B_i H_i A_i x``, where only H_i and s_i train.

    ``core`` is H, (heads, r, r), zero at the start; ``scales`` s, (heads,), one at the start, or
    absent. ``basis_in`` holds the A_i, (heads r, in), ``basis_out`` the B_i, (out, heads r).

    Unless the server sets them, bases are not sent. Where clients have processors of different
    kinds, only ``orthogonal`` bases are then the same everywhere, because singular vectors of
    nearly equal singular values may turn into one another.

    Args:
        base_layer: the frozen layer, to whose output the products are added.
        weight: the base layer's weight, as (out, in).
        rank: r; heads r <= min(out, in) for ``svd``.
        heads: number of the r x r matrices.
        init: ``svd`` takes leading singular vectors of the weight as bases, with signs that make
            the largest number of each left one positive. ``orthogonal`` draws random bases with
            orthonormal rows or columns, whichever are fewer.
        scaled: true if every head has a scale.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        weight: Tensor,
        rank: int,
        heads: int = 1,
        init: str = "orthogonal",
        scaled: bool = False,
    ) -> None:
        super().__init__()
        width, largest = heads * rank, min(weight.shape)
        if init not in BASES:
            raise ValueError(f"init must be one of {', '.join(BASES)}, got {init}")
        if init == "svd" and width > largest:
            raise ValueError(f"rank must be from 1 to {largest // heads} here, got {rank}")
        self.base_layer = base_layer
        basis_out, basis_in = _bases(weight.detach(), width, init)
        self.basis_out = nn.Parameter(basis_out, requires_grad=False)
        self.basis_in = nn.Parameter(basis_in, requires_grad=False)
        self.core = nn.Parameter(torch.zeros(heads, rank, rank, device=weight.device))
        self.scales = nn.Parameter(torch.ones(heads, device=weight.device)) if scaled else None

    def cores(self) -> Tensor:
        """Return s_i H_i, (heads, r, r)."""
        return self.core if self.scales is None else self.scales[:, None, None] * self.core

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return [s_1 B_1 H_1, ...], (out, heads r), and [A_1; ...], (heads r, in)."""
        left = self.basis_out.float() @ torch.block_diag(*self.cores())
        return left, self.basis_in.float()

    def dense(self) -> Tensor:
        """Return the sum of s_i B_i H_i A_i, (out, in)."""
        left, right = self.factors()
        return left @ right

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out), in the base layer's dtype."""
        y = self.base_layer(x)
        inner = (x @ self.basis_in.T).unflatten(-1, self.core.shape[:2]).to(self.core.dtype)
        inner = torch.einsum("...hi,hoi->...ho", inner, self.cores()).flatten(-2)
        return y + (inner.to(self.basis_out.dtype) @ self.basis_out.T).to(y.dtype)


def _bases(weight: Tensor, width: int, init: str) -> tuple[Tensor, Tensor]:
    """Return the bases (out, width) and (width, in), in the weight's dtype."""
    rows, columns = weight.shape
    if init == "svd" and not weight.is_meta:
        u, _, v = torch.linalg.svd(weight.float(), full_matrices=False)
        signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()  # an SVD leaves them open
        u, v = u * signs, v * signs.T
        return u[:, :width].contiguous().to(weight.dtype), v[:width].to(weight.dtype)
    bases = [
        torch.empty(shape, device=weight.device) for shape in ((rows, width), (width, columns))
    ]
    if not weight.is_meta:
        for basis in bases:
            nn.init.orthogonal_(basis)
    return bases[0].to(weight.dtype), bases[1].to(weight.dtype)
