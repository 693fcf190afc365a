"""The bottleneck adapter (https://arxiv.org/abs/1902.00751)."""

import torch
from torch import Tensor, nn

ACTIVATIONS = {"gelu": nn.functional.gelu, "relu": torch.relu}


class BottleneckAdapter(nn.Module):
    """``x + up(act(down(x)))``, the identity at the start.

    ``up`` and the biases start at zero. ``down`` is normal with standard deviation 0.01, cut at two
    of them, as in the paper. The paper draws ``up`` alike, so its start is only near the identity.

    Args:
        width: features of input and output.
        bottleneck: inner width.
        activation: ``gelu`` or ``relu``; open in the paper.
        device: the parameters' device; null for torch's default.
    """

    def __init__(
        self, width: int, bottleneck: int, activation: str, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck, device=device)
        self.up = nn.Linear(bottleneck, width, device=device)
        self.activation = ACTIVATIONS[activation]
        nn.init.trunc_normal_(self.down.weight, std=0.01, a=-0.02, b=0.02)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        return x + self.up(self.activation(self.down(x)))
