"""A CPU: its cores, faster dropout and attention, checkpointed blocks, the return of memory."""

import ctypes
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Functions import transformers, because it takes seconds.

SHORT = 256
"""Longest sequence, in tokens, for which attention trains in float32 under bfloat16 autocast.

In torch 2.13, bfloat16 takes 10 times as long as float32 at 16 tokens, 1.3 times at 256 and .7
times at 512, forward and backward, casts included."""
PARTS = 2**16
GIVE_BACK_EVERY = 3.0  # seconds; getting the pages again costs about .07 s, 2 % of that
_given_back = -GIVE_BACK_EVERY


class OnCPU(TorchFunctionMode):
    """Replaces dropout by one with cheap draws, and dropping or short attention by float32's.

    On other devices, in evaluation and for all other functions, PyTorch's own are called. Results
    have the dtype that PyTorch's own functions would give them.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.dropout:
            func = _dropout
        elif func is F.scaled_dot_product_attention:
            func = attention
        return func(*args, **kwargs or {})


def cores() -> int:
    """Return the number of cores that this process may use, at least 1."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def dropout_mask(shape: torch.Size | tuple[int, ...], p: float) -> tuple[Tensor, float]:
    """Draw a mask of the entries that dropout keeps.

    PyTorch draws a Bernoulli number in 7 ns, this function in .7: one number of torch's generator
    seeds a faster generator, and each 64-bit number of that one decides about four entries.

    Args:
        shape: the mask's shape.
        p: probability that an entry is dropped, in [0, 1), rounded to 16 bits.

    Returns:
        The mask, bool, and the factor of the kept entries, 1 / (1 - p).
    """
    dropped = min(round(p * PARTS), PARTS - 1)
    seed = int(torch.empty((), dtype=torch.int64).random_().numpy())
    count = int(np.prod(shape))
    draws = np.random.SFC64(seed).random_raw(-(-count // 4)).view(np.uint16)[:count]
    return torch.from_numpy(draws >= dropped).view(shape), PARTS / (PARTS - dropped)


def scaled(x: Tensor, mask: Tensor, factor: float) -> Tensor:
    """Multiply the kept entries by a factor and the others by zero.

    Args:
        x: any shape.
        mask: bool, of the same shape; true where an entry is kept.
        factor: number by which the kept entries are multiplied.
    """
    return x * mask.to(x.dtype).mul_(factor)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not (training and 0 < p < 1 and x.is_cpu and not inplace):
        return F.dropout(x, p, training, inplace)
    return scaled(x, *dropout_mask(x.shape, p))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Compute attention, see ``F.scaled_dot_product_attention``, which documents the arguments.

    On a CPU it runs step by step if it drops, and in float32 under autocast if it drops or is a
    training step over at most ``SHORT`` tokens.
    """
    trains = query.requires_grad or key.requires_grad or value.requires_grad
    short = trains and max(query.size(-2), key.size(-2)) <= SHORT
    options = (attn_mask, dropout_p, is_causal)
    if not (query.is_cpu and (short or dropout_p > 0)):
        return F.scaled_dot_product_attention(query, key, value, *options, **kwargs)
    if not torch.is_autocast_enabled("cpu"):
        return _wide(query, key, value, *options, **kwargs)
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.float()
    with torch.autocast("cpu", enabled=False):
        options = (attn_mask, dropout_p, is_causal)
        return _wide(query.float(), key.float(), value.float(), *options, **kwargs).bfloat16()


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
    """Compute attention in the inputs' dtype.

    With dropout, the scores (B, heads, L, S) are held in memory, as PyTorch does.
    """
    if not 0 < dropout_p < 1 or enable_gqa:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    scores = (query * (query.size(-1) ** -0.5 if scale is None else scale)) @ key.mT
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        least = torch.finfo(scores.dtype).min  # not -inf, or a row without keys would be nan
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape).masked_fill_(~attn_mask, least)
        scores = scores + attn_mask.clamp(min=least)
    mask, factor = dropout_mask(scores.shape, dropout_p)
    return (scores.softmax(-1) * mask.to(scores.dtype)) @ (value * factor)


def checkpoint_blocks(model: nn.Module) -> None:
    """Let every block keep only its inputs and compute the rest again in the backward pass.

    The cache of keys and values is switched off, because it excludes checkpoints.
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
    """Return freed pages to the system, at most once in ``GIVE_BACK_EVERY`` seconds.

    Without it, glibc keeps about 200 MiB of past batches' activations in a worker that trains
    MiniLM.
    """
    global _given_back
    now = time.monotonic()
    if sys.platform != "linux" or now - _given_back < GIVE_BACK_EVERY:
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    if trim is not None:
        trim(0)
        _given_back = now
