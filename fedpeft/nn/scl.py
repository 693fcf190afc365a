"""SCL's sequential compression layer (https://arxiv.org/abs/2412.07021)."""

import torch
from torch import Tensor, nn

INITS = ("random_pinv", "svd", "residual")


class CompressedProjection(nn.Module):
    """``W2 x + b2`` becomes ``W2' C x + b2``: C (r, f) compresses, W2' (d, r) projects.

    There is no activation between them, and C has no bias (open in the paper). The start is one of:

    - ``random_pinv``: C Gaussian, W2' = W2 C^+ (the paper's). Exact only where x lies in the row
      space of C; elsewhere the relative error is about sqrt(1 - r/f).
    - ``svd``: the truncated SVD of W2, the best rank-r start in the Frobenius norm.
    - ``residual``: keeps the frozen W2 and adds W2' C with W2' = 0, so the error is 0.

    Args:
        weight: W2 as (d, f).
        bias: b2 (d,), frozen, or null.
        rank: r, 1 <= r <= min(d, f).
        init: one of the starts above.
        transposed: true if the layer that this one replaces holds its weight as (f, d), as GPT-2's
            does.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        rank: int,
        init: str,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.transposed = transposed
        width, hidden = weight.shape
        if not 1 <= rank <= min(width, hidden):
            raise ValueError(f"rank must be from 1 to {min(width, hidden)} here, got {rank}")
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {init}")
        compress, project = _initial(weight.detach(), rank, init)
        self.compress = nn.Parameter(compress)
        self.project = nn.Parameter(project)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.weight = (
            nn.Parameter(weight.detach(), requires_grad=False) if init == "residual" else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., f) to (..., d) without building W2' C."""
        y = x @ self.compress.T @ self.project.T
        if self.weight is not None:
            y = y + x @ self.weight.T
        return y if self.bias is None else y + self.bias

    def folded(self) -> nn.Module:
        """Return the one linear layer that this one computes, of the kind that it replaced."""
        from transformers.pytorch_utils import Conv1D  # takes long to import

        weight = (self.project.double() @ self.compress.double()).to(self.project.dtype)
        if self.weight is not None:
            weight = weight + self.weight
        width, hidden = weight.shape
        if self.transposed:
            layer, weight = Conv1D(width, hidden), weight.T
        else:
            layer = nn.Linear(hidden, width, bias=self.bias is not None)
        layer.weight = nn.Parameter(weight.detach().contiguous())
        if self.bias is not None:
            layer.bias = self.bias
        return layer


def _initial(weight: Tensor, rank: int, init: str) -> tuple[Tensor, Tensor]:
    """Return C and W2' at the start; the decompositions run in float32."""
    width, hidden = weight.shape
    if init == "svd" and not weight.is_meta:
        u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
        root = s[:rank].sqrt()
        return (root[:, None] * v[:rank]).to(weight.dtype), (u[:, :rank] * root).to(weight.dtype)
    # Entries of variance 1/f keep C x at the scale of x.
    compress = torch.randn(rank, hidden, device=weight.device) / hidden**0.5
    if init == "residual" or weight.is_meta:
        return compress.to(weight.dtype), weight.new_zeros(width, rank)
    project = weight.float() @ torch.linalg.pinv(compress)
    return compress.to(weight.dtype), project.to(weight.dtype)
