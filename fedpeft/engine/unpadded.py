"""Blocks of a transformer that see the real tokens of a batch alone, in one row.

What a block does to each token by itself (linear layers, norms, adapters), which is nearly all of
its arithmetic, then skips padding; attention and dropout see the tokens where they stood, so that
the result and the random draws are those of the padded batch. Attention computes longer and shorter
rows apart where that spares enough.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedpeft.engine.cpu import attention, kept, scaled
from fedpeft.engine.stacked import Unsupported

SPARED = 1500
"""Pairs of tokens in a head that attention by parts must spare: with steps of sixteen rows of SST-2
MiniLM is then 1.03 times as fast, in bfloat16 1.13; 500 and 3,000 gave no more."""


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
        self.parts = list(_parts(mask))
        self.at = torch.cat([part.at for part in self.parts])
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

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **how: Any,
    ) -> Tensor:
        """Of (1, heads, T, width), as the rows of the batch with the batch's own mask."""
        odd = how.get("enable_gqa") or (attn_mask is not None and attn_mask.dim() != 4)
        if len(self.parts) == 1 or odd:
            query, key, value = (
                self.unpacked(x.transpose(1, 2)).transpose(1, 2) for x in (query, key, value)
            )
            given = (attn_mask, dropout_p, is_causal)
            whole = F.scaled_dot_product_attention(query, key, value, *given, **how)
            return self.packed(whole.transpose(1, 2)).transpose(1, 2)
        drawn = None
        if dropout_p > 0:
            rows, length = self.shape
            drawn = kept((rows, query.size(1), length, length), dropout_p)
        sizes = [len(part.at) for part in self.parts]
        queries, keys, values = (x[0].transpose(0, 1).split(sizes) for x in (query, key, value))
        found: list[Tensor] = []
        for part, q, k, v in zip(self.parts, queries, keys, values, strict=True):
            mask = None if attn_mask is None else part.mask(attn_mask)
            own = None if drawn is None else (part.window(drawn[0]), drawn[1])
            heads = part.put(q), part.put(k), part.put(v)
            found.append(part.taken(attention(*heads, mask, 0.0, is_causal, own, **how)))
        return torch.cat(found).transpose(0, 1)[None]

    def _dropout(
        self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        """Drops what it would drop of the padded batch."""
        if not training or p == 0 or x.shape[:2] != (1, len(self.at)):
            return F.dropout(x, p, training, inplace)
        rows, length = self.shape
        where, factor = kept((rows * length, *x.shape[2:]), p)
        return scaled(x, where.index_select(0, self.at)[None], factor)


@dataclass(frozen=True)
class _Part:
    """Some rows of a batch, of like length, and the columns where they have tokens."""

    rows: Tensor
    columns: slice
    at: Tensor  # where their tokens stand in the flattened batch
    own: Tensor  # in the flattened rows and columns

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), self.columns.stop - self.columns.start

    def put(self, x: Tensor) -> Tensor:
        """(rows, heads, columns, width) of (tokens, heads, width), zeros where there is padding."""
        rows, length = self.shape
        whole: Any = _Put.apply(x, self.own, rows * length)
        return whole.unflatten(0, self.shape).transpose(1, 2)

    def taken(self, x: Tensor) -> Tensor:
        """The reverse."""
        return _Taken.apply(x.transpose(1, 2).flatten(0, 1), self.own)  # type: ignore[return-value]

    def window(self, x: Tensor) -> Tensor:
        """Of (B, heads, L, L)."""
        return x[self.rows, :, self.columns, self.columns]

    def mask(self, x: Tensor) -> Tensor:
        """Of (B or 1, heads or 1, L or 1, L)."""
        x = x[..., self.columns]
        x = x[self.rows] if x.size(0) > 1 else x
        return x[..., self.columns, :] if x.size(-2) > 1 else x


def _parts(mask: Tensor) -> Iterator[_Part]:
    """All rows, or the longer and the shorter where attention takes less of it by parts."""
    lengths, order = mask.sum(1).sort(descending=True, stable=True)
    rows = len(order)
    counts = torch.arange(1, rows)
    areas = counts * lengths[0] ** 2 + (rows - counts) * lengths[1:] ** 2
    whole = rows * int(lengths[0]) ** 2
    found = [order]
    if rows > 1 and whole - int(areas.min()) >= SPARED:
        at = int(areas.argmin()) + 1
        found = [order[:at], order[at:]]
    for own in found:
        here = mask[own].bool()
        seen = here.any(0).nonzero().squeeze(1)
        columns = slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(0, 0)
        row, column = here.nonzero(as_tuple=True)
        length = columns.stop - columns.start
        yield _Part(
            own, columns, own[row] * mask.size(1) + column, row * length + column - columns.start
        )


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
