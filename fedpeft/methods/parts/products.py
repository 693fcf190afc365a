"""What servers do with products B A of low rank: read, cut off, put into the base weight."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedpeft.methods.base import Role, State
from fedpeft.methods.lora import LoRA
from fedpeft.models.sites import linear_weight

A, B, BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer.weight"


def factors(state: State) -> dict[str, tuple[Tensor, Tensor]]:
    """(B, A) of every adapted module, in float64."""
    sites = [name.removesuffix(A) for name in state if name.endswith(A)]
    return {site: (state[site + B].double(), state[site + A].double()) for site in sites}


def stacked(states: Sequence[State], weights: Sequence[float]) -> dict[str, tuple[Tensor, Tensor]]:
    """[w_1 B_1, w_2 B_2, ...] (out, K r) and [A_1; A_2; ...] (K r, in): factors of avg(B A)."""
    clients = [factors(state) for state in states]
    return {
        site: (
            torch.cat([w * c[site][0] for w, c in zip(weights, clients, strict=True)], dim=1),
            torch.cat([c[site][1] for c in clients]),
        )
        for site in clients[0]
    }


def truncated(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U S (out, r) and V^T (r, in) of the best approximation of ``b @ a``, which is never built.

    Leading blocks are the best approximations of lower rank. Beyond min(out, in) stand zeros.
    """
    left, lower = torch.linalg.qr(b)
    right, upper = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(lower @ upper.T, full_matrices=False)
    b_new, a_new = b.new_zeros(b.shape[0], rank), a.new_zeros(rank, a.shape[1])
    kept = min(rank, len(s))
    b_new[:, :kept] = (left @ u * s)[:, :kept]
    a_new[:kept] = (v @ right.T)[:kept]
    return b_new, a_new


@dataclass(frozen=True)
class BaseChangingLoRA(LoRA):
    """LoRA whose server changes the adapted modules' base weights.

    After round 1 every client gets these whole, out x in numbers a module: for RoBERTa-base's q
    and v 14.2 M numbers or 57 MB a client and round, against 1.2 MB of A and B at rank 8. A client
    that kept what it got would need no more than the factors of the change.
    """

    @cached_property
    def _transposed(self) -> set[str]:
        """Modules whose weight is (in, out), as ``inject`` met them: a state does not tell."""
        return set()

    def inject(self, model: nn.Module) -> nn.Module:
        super().inject(model)
        for site, module in model.named_modules():
            if isinstance(module, LoraLayer):
                weight, _, transposed = linear_weight(module.get_base_layer())
                weight.requires_grad_(True)
                (self._transposed.add if transposed else self._transposed.discard)(site)
        return model

    def role(self, name: str, round: int) -> Role:
        return Role.RECEIVED if name.endswith(BASE) else super().role(name, round)

    def grown(self, before: State, site: str, product: Tensor) -> Tensor:
        """A base weight plus alpha/r times a product (out, in)."""
        weight = before[site + BASE]
        change = self.alpha / self.rank * product
        change = change.T if site in self._transposed else change
        return (weight.double() + change).to(weight.dtype)

    def effective(self, module: nn.Module) -> Tensor | None:
        change = super().effective(module)
        if change is None:
            return None
        assert isinstance(module, LoraLayer)
        weight, _, transposed = linear_weight(module.get_base_layer())
        return (weight.T if transposed else weight).double() + change
