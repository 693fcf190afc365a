"""Dropout and attention that a CPU computes faster than PyTorch's own; checkpoints; freed pages."""

import ctypes
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SHORT = 256
"""Tokens up to which torch 2.13's bfloat16 backward pass takes longer than float32's, casts
included: 10 times at 16 tokens, 1.3 times at 256, and .7 times at 512, forward and backward."""
PARTS = 2**16
GIVE_BACK_EVERY = 3.0  # seconds; pages that return cost about .07 s, 2 % of that
_given_back = -GIVE_BACK_EVERY


class OnCPU(TorchFunctionMode):
    """Dropout whose draws are cheap; attention in float32 where it drops or is short.

    Elsewhere, in evaluation and for what it does not know PyTorch's own functions are called. The
    dtype of a result is what it would be without.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.dropout:
            func = _dropout
        elif func is F.scaled_dot_product_attention:
            func = attention
        return func(*args, **kwargs or {})


def kept(shape: torch.Size | tuple[int, ...], p: float) -> tuple[Tensor, float]:
    """Draw what dropout keeps, true with probability 1 - p to 16 bits, and its factor.

    PyTorch draws a Bernoulli number in 7 ns, this in .7: one number of torch's own generator
    seeds another whose 64 bits decide about four entries.

    Args:
        p: in [0, 1).
    """
    dropped = min(round(p * PARTS), PARTS - 1)
    seed = int(torch.empty((), dtype=torch.int64).random_().numpy())
    count = int(np.prod(shape))
    draws = np.random.SFC64(seed).random_raw(-(-count // 4)).view(np.uint16)[:count]
    return torch.from_numpy(draws >= dropped).view(shape), PARTS / (PARTS - dropped)


def scaled(x: Tensor, kept: Tensor, factor: float) -> Tensor:
    """Multiply what is kept of x by the factor, and the rest by zero."""
    return x * kept.to(x.dtype).mul_(factor)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not (training and 0 < p < 1 and x.is_cpu and not inplace):
        return F.dropout(x, p, training, inplace)
    return scaled(x, *kept(x.shape, p))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **how: Any,
) -> Tensor:
    """``F.scaled_dot_product_attention``."""
    trains = query.requires_grad or key.requires_grad or value.requires_grad
    short = trains and max(query.size(-2), key.size(-2)) <= SHORT
    given = (attn_mask, dropout_p, is_causal)
    if not (query.is_cpu and (short or dropout_p > 0)):
        return F.scaled_dot_product_attention(query, key, value, *given, **how)
    if not torch.is_autocast_enabled("cpu"):
        return _wide(query, key, value, *given, **how)
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.float()
    with torch.autocast("cpu", enabled=False):
        given = (attn_mask, dropout_p, is_causal)
        return _wide(query.float(), key.float(), value.float(), *given, **how).bfloat16()


def _wide(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """With dropout, (B, heads, L, S) in memory as PyTorch holds them too."""
    if not 0 < dropout_p < 1 or enable_gqa:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    scores = (query * (query.size(-1) ** -0.5 if scale is None else scale)) @ key.mT
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        least = torch.finfo(scores.dtype).min  # for -inf: a row without any must not become nan
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape).masked_fill_(~attn_mask, least)
        scores = scores + attn_mask.clamp(min=least)
    where, factor = kept(scores.shape, dropout_p)
    return (scores.softmax(-1) * where.to(scores.dtype)) @ (value * factor)


def checkpoint_blocks(model: nn.Module) -> None:
    """Let every block keep its inputs alone and compute the rest again for the gradient.

    The cache of keys and values, of no use in training, is switched off: it excludes this.
    """
    from transformers import PreTrainedModel

    inner = next(m for m in model.modules() if isinstance(m, PreTrainedModel))
    inner.activation_checkpointing_enable({"use_reentrant": False, "context_fn": _contexts})
    if hasattr(inner.config, "use_cache"):
        inner.config.use_cache = False


def _contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return contexts for the forward pass and for the recomputation.

    The forward pass already runs under ``OnCPU``. The recomputation must run under it too, because
    its dropout draws differ otherwise.
    """
    return nullcontext(), OnCPU()


def give_back() -> None:
    """Give the system the pages that training freed and glibc keeps, but not at every call.

    Without it a worker that trains MiniLM keeps about 200 MiB of activations of past batches.
    """
    global _given_back
    now = time.monotonic()
    if sys.platform != "linux" or now - _given_back < GIVE_BACK_EVERY:
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    if trim is not None:
        trim(0)
        _given_back = now
