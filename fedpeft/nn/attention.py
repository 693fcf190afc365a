"""Attention under autocast on a CPU, where short sequences train faster in float32."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

SHORT = 256
"""Tokens up to which torch 2.13's bfloat16 backward pass takes longer than float32's, casts
included: 10 times at 16 tokens, 1.3 times at 256, and .7 times at 512, forward and backward."""


class ShortInFloat32(TorchFunctionMode):
    """Computes ``scaled_dot_product_attention`` of short sequences that train in float32.

    Only under a CPU's autocast. The result is bfloat16, as it would be without.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        function = _attention if func is F.scaled_dot_product_attention else func
        return function(*args, **kwargs or {})


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    trains = query.requires_grad or key.requires_grad or value.requires_grad
    short = max(query.size(-2), key.size(-2)) <= SHORT
    if not (trains and short and query.is_cpu and torch.is_autocast_enabled("cpu")):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.float()
    with torch.autocast("cpu", enabled=False):
        wide = (query.float(), key.float(), value.float())
        return F.scaled_dot_product_attention(*wide, attn_mask, *args, **kwargs).bfloat16()
