"""Blocks of a transformer that see the real tokens of a batch alone, in one row.

What a block does to each token by itself (linear layers, norms, adapters), which is nearly all of
its arithmetic, then skips padding; attention and dropout see the tokens where they stood, so that
the result and the random draws are those of the padded batch.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedpeft.nn.cpu import kept, scaled
from fedpeft.nn.stacked import Unsupported


def pays(padded: int, real: int) -> bool:
    """Whether so many tokens take less time without padding, which costs moving them to and fro.

    Measured with MiniLM and LoRA on a CPU: 531 tokens, 204 of them real, take 1.54 times as long
    as without padding; 326 and 212, 1.18; 274 and 221, 1.09; 949 and 841, 1.0; 263 and 236, .96;
    of a batch of four, 89 and 49, 1.09; 69 and 54, .96.
    """
    return padded >= 1.1 * real + 24


class Unpadding:
    """Of a model whose blocks are called one after another.

    Raises:
        Unsupported: it has no list of blocks, or several.
    """

    def __init__(self, model: nn.Module) -> None:
        from transformers.modeling_layers import GradientCheckpointingLayer

        lists = [
            list(module)
            for module in model.modules()
            if isinstance(module, nn.ModuleList)
            and any(isinstance(block, GradientCheckpointingLayer) for block in module)
        ]
        if len(lists) != 1:
            raise Unsupported(f"the model has {len(lists)} lists of blocks")
        self.blocks: Sequence[nn.Module] = lists[0]

    def of(self, batch: Mapping[str, Tensor], always: bool = False) -> AbstractContextManager[Any]:
        """For a forward pass over a batch; without ``always``, where it pays."""
        mask = batch.get("attention_mask")
        if mask is None or not (always or pays(mask.numel(), int(mask.sum()))):
            return nullcontext()
        return _Unpadded(self.blocks, mask)


class _Unpadded(TorchFunctionMode):
    """While it is active (B, L, ...) is (1, T, ...) in blocks, T the real tokens of the mask."""

    def __init__(self, blocks: Sequence[nn.Module], mask: Tensor) -> None:
        super().__init__()
        self.blocks, self.shape = blocks, tuple(mask.shape)
        self.at = mask.flatten().nonzero().squeeze(1)
        self.hooks = ExitStack()

    def __enter__(self) -> "_Unpadded":
        first, last = self.blocks[0], self.blocks[-1]
        for handle in (
            *(b.register_forward_pre_hook(self._positions, with_kwargs=True) for b in self.blocks),
            first.register_forward_pre_hook(self._enter, with_kwargs=True),
            last.register_forward_hook(self._leave),
        ):
            self.hooks.callback(handle.remove)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.hooks.close()
        super().__exit__(*error)

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (self.packed(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self.packed(kwargs["hidden_states"])}

    def _positions(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Rotary angles, which a model computes once for all blocks."""
        if (angles := kwargs.get("position_embeddings")) is not None:
            own = tuple(self.packed(part.expand(*self.shape, -1)) for part in angles)
            kwargs = kwargs | {"position_embeddings": own}
        return args, kwargs

    def _leave(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (self.unpacked(output[0]), *output[1:])
        return self.unpacked(output)

    def packed(self, x: Tensor) -> Tensor:
        """(1, T, ...) of (B, L, ...)."""
        return _Taken.apply(x.flatten(0, 1), self.at)[None]  # type: ignore[index]

    def unpacked(self, x: Tensor) -> Tensor:
        """(B, L, ...) of (1, T, ...), zeros where there is padding."""
        rows, length = self.shape
        return _Put.apply(x[0], self.at, rows * length).unflatten(0, self.shape)  # type: ignore[union-attr]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **how: Any) -> Any:
        """Of (1, heads, T, width), as the rows of the batch with the batch's own mask."""
        query, key, value = (
            self.unpacked(x.transpose(1, 2)).transpose(1, 2) for x in (query, key, value)
        )
        found = F.scaled_dot_product_attention(query, key, value, *args, **how)
        return self.packed(found.transpose(1, 2)).transpose(1, 2)

    def _dropout(
        self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        """Drops what it would drop of the padded batch."""
        if not training or p == 0 or x.shape[:2] != (1, len(self.at)):
            return F.dropout(x, p, training, inplace)
        rows, length = self.shape
        where, factor = kept((rows * length, *x.shape[2:]), p)
        return scaled(x, where.index_select(0, self.at)[None], factor)


class _Taken(torch.autograd.Function):
    """Rows of a tensor; ``index_select``, whose own backward pass adds row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Tensor) -> Tensor:
        ctx.save_for_backward(at)
        ctx.rows = x.shape[0]
        return x.index_select(0, at)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (at,) = grads, ctx.saved_tensors
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, at, grad), None


class _Put(torch.autograd.Function):
    """Rows among zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(at)
        return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, at, x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (at,) = grads, ctx.saved_tensors
        return grad.index_select(0, at), None, None
