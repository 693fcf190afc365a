"""Cross-entropy of tokens under a head of a large vocabulary, a few tokens' logits at a time."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # target of a token that is not predicted
# Bytes of the float32 logits that are held at once. On a CPU it is the largest buffer that glibc
# keeps for the next chunk; the number for cuda is not measured.
ROOM = {"cpu": 2**25, "cuda": 2**29}


def token_losses(head: nn.Module, hidden: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """Return each token's loss and the most likely token, in float32 (B, T, 2); 0 where ignored.

    On a CPU, a head that does not train reads only tokens with a target. On a GPU it reads all,
    because a captured graph has fixed shapes. A head that trains reads all, see ``_by_columns``.

    Args:
        head: maps vectors (..., d) to logits (..., V).
        hidden: vectors (B, T, d).
        targets: (B, T), ``IGNORED`` where nothing is predicted.
        vocabulary: V.
    """
    most = max(1, ROOM["cpu" if hidden.device.type == "cpu" else "cuda"] // (4 * vocabulary))
    trains = torch.is_grad_enabled() and any(p.requires_grad for p in head.parameters())
    if trains or _replaced(head):
        return _by_columns(head, hidden, targets, most)
    if hidden.device.type != "cpu":
        losses, tokens = _Frozen.apply(hidden.flatten(0, 1), targets.flatten(), head, most)
        return torch.stack([losses, tokens], -1).unflatten(0, targets.shape)
    read = targets != IGNORED
    losses, tokens = _Frozen.apply(hidden[read], targets[read], head, most)
    result = losses.new_zeros(*targets.shape, 2)
    result[read] = torch.stack([losses, tokens], -1)
    return result


def losses_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Return what ``token_losses`` does, from logits (B, T, V)."""
    logits = logits.float()
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    tokens = logits.detach().argmax(-1).masked_fill(targets == IGNORED, 0)
    return torch.stack([losses, tokens.float()], -1)


class _Frozen(torch.autograd.Function):
    """Losses and tokens under a head that does not train.

    The gradient of each loss by its vector is computed with the loss, while the logits are there,
    so that the backward pass only scales it and the head is not applied twice.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Module, most: int
    ) -> tuple[Tensor, Tensor]:
        apply, trains = _once_cast(head), ctx.needs_input_grad[0]
        results = [
            _chunk(apply, *part, trains)
            for part in zip(hidden.split(most), targets.split(most), strict=True)
        ]
        losses, tokens, gradients = (torch.cat(parts) for parts in zip(*results, strict=True))
        ctx.save_for_backward(gradients)
        ctx.mark_non_differentiable(tokens)
        return losses, tokens

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (gradients,) = ctx.saved_tensors
        return (grad.unsqueeze(-1) * gradients).to(gradients.dtype), None, None, None


def _chunk(
    apply: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, trains: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses and tokens (n,), and the losses' gradients (n, d) if ``trains``."""
    hidden = hidden.detach()
    with torch.set_grad_enabled(trains):
        logits = apply(hidden.requires_grad_(trains))
    ignored, places = targets == IGNORED, targets.clamp(min=0).unsqueeze(-1)
    numbers = logits.detach().float()
    most, tokens = numbers.max(-1, keepdim=True)
    right = numbers.gather(-1, places)
    shares = numbers.sub(most).exp_()
    total = shares.sum(-1, keepdim=True)
    losses = (total.log() + most - right).squeeze(-1).masked_fill(ignored, 0)
    tokens = tokens.squeeze(-1).masked_fill(ignored, 0).float()
    if not trains:
        return losses, tokens, hidden[:0]
    by_logits = shares.div_(total).scatter_add_(-1, places, -torch.ones_like(right))
    by_logits = by_logits.masked_fill_(ignored.unsqueeze(-1), 0).to(logits.dtype)
    return losses, tokens, torch.autograd.grad(logits, hidden, by_logits)[0]


def _once_cast(head: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the head's function; autocast would cast a linear head's weight in every chunk."""
    kind = next(head.parameters()).device.type
    if type(head) is not nn.Linear or not torch.is_autocast_enabled(kind):
        return head
    weight, bias = (
        None if p is None else p.detach().to(torch.get_autocast_dtype(kind))
        for p in (head.weight, head.bias)
    )
    assert weight is not None
    return lambda x: F.linear(x, weight, bias)


def _by_columns(head: nn.Module, hidden: Tensor, targets: Tensor, most: int) -> Tensor:
    """Return ``token_losses`` of a head that trains or that needs all rows in their order.

    A chunk has some columns of all rows. Its logits are computed again in the backward pass if the
    head would then give the same ones.
    """
    first = 0
    if hidden.device.type == "cpu" and targets.numel():  # prompts are at the rows' beginnings
        first = int((targets != IGNORED).any(0).int().argmax())
    columns = max(1, most // len(hidden))
    parts = zip(
        hidden[:, first:].split(columns, 1), targets[:, first:].split(columns, 1), strict=True
    )
    again = not _replaced(head) and not _draws(head)
    losses = torch.cat([_applied(head, *part, again) for part in parts], 1)
    return F.pad(losses, (0, 0, first, 0))


def _applied(head: nn.Module, hidden: Tensor, targets: Tensor, again: bool) -> Tensor:
    def losses(hidden: Tensor, targets: Tensor) -> Tensor:
        return losses_of(head(hidden), targets)

    if not again:
        return losses(hidden, targets)
    return checkpoint(  # type: ignore[return-value]
        losses, hidden, targets, use_reentrant=False, preserve_rng_state=False
    )


def _replaced(head: nn.Module) -> bool:
    """Tell whether a module's forward is replaced for this pass: it may treat rows by place."""
    return any("forward" in vars(module) for module in head.modules())


def _draws(head: nn.Module) -> bool:
    return any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in head.modules())
