"""Products B A of low rank on the server: read, truncated, added to the base weight."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedpeft.methods.base import At, Round
from fedpeft.methods.lora import LoRA
from fedpeft.models.linear import linear_weight
from fedpeft.state import Role, State

A, B, BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer.weight"


def factors(state: State) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (B, A) of every adapted module whose A is there, by its name, in float64."""
    return {site: (state[site + B].double(), state[site + A].double()) for site in sites_of(state)}


def sites_of(names: Iterable[str]) -> list[str]:
    """Return the adapted modules whose A is among the names."""
    return [name.removesuffix(A) for name in names if name.endswith(A)]


def stacked(states: Sequence[State], weights: Sequence[float]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return factors of avg(B A) by module, for K clients with weights w_i.

    The left one is [w_1 B_1, w_2 B_2, ...], (out, K r), the right one [A_1; A_2; ...], (K r, in).
    """
    clients = [factors(state) for state in states]
    return {
        site: (
            torch.cat([w * c[site][0] for w, c in zip(weights, clients, strict=True)], dim=1),
            torch.cat([c[site][1] for c in clients]),
        )
        for site in clients[0]
    }


def truncated(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors of the best approximation of ``b @ a``, which is never built.

    Args:
        b: (out, k).
        a: (k, in).
        rank: r, the rank of the approximation.

    Returns:
        U S (out, r) and V^T (r, in) of the SVD. Leading blocks are the best approximations of lower
        rank. Components that the SVD lacks are zero.
    """
    left, lower = torch.linalg.qr(b)
    right, upper = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(lower @ upper.T, full_matrices=False)
    b_new, a_new = b.new_zeros(b.shape[0], rank), a.new_zeros(rank, a.shape[1])
    count = min(rank, len(s))
    b_new[:, :count] = (left @ u * s)[:, :count]
    a_new[:count] = (v @ right.T)[:count]
    return b_new, a_new


@dataclass(frozen=True)
class PairedLoRA(LoRA):
    """LoRA whose server multiplies the factors B and A that a client sends."""

    def check_roles(self, roles: Mapping[str, Role]) -> None:
        """See ``Method.check_roles``; A alone cannot be multiplied."""
        for site in sites_of(roles):
            if roles[site + A] is Role.SHARED and roles[site + B] is not Role.SHARED:
                raise ValueError(
                    f"{type(self).__name__} multiplies B and A on the server, but of {site} only A "
                    "is shared: personal and frozen must match both or neither"
                )


@dataclass(frozen=True)
class BaseChangingLoRA(PairedLoRA):
    """LoRA whose server changes the adapted modules' base weights.

    After round 1 every client gets them whole, out x in numbers a module: for RoBERTa-base's q and
    v 14.2 M numbers or 57 MB a client and round, against 1.2 MB of A and B at rank 8. A client that
    kept them between rounds would need only the factors of the change.
    """

    def inject(self, model: nn.Module) -> nn.Module:
        super().inject(model)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                weight, _, _ = linear_weight(module.get_base_layer())
                weight.requires_grad_(True)
        return model

    def check_roles(self, roles: Mapping[str, Role]) -> None:
        """See ``Method.check_roles``; clients would not get a frozen base weight that changed."""
        super().check_roles(roles)
        for site in sites_of(roles):
            if roles[site + A] is Role.SHARED and roles[site + BASE] is not Role.RECEIVED:
                raise ValueError(
                    f"{type(self).__name__} changes {site}{BASE} on the server: frozen must not "
                    "match it, or match A and B of this module too"
                )

    def role(self, name: str, at: At) -> Role:
        return Role.RECEIVED if name.endswith(BASE) else super().role(name, at)

    def grown(self, round: Round, site: str, product: Tensor) -> Tensor:
        """Return a base weight plus alpha/r times a product.

        The server's model says if the weight is transposed, because its shape may not tell.

        Args:
            round: has the weight before the round, and the server's model.
            site: name of the adapted module.
            product: (out, in).
        """
        assert round.server is not None
        layer: Any = round.server.model.get_submodule(site)
        transposed = linear_weight(layer.get_base_layer())[2]
        weight = round.before[site + BASE]
        change = self.alpha / self.rank * product
        change = change.T if transposed else change
        return (weight.double() + change).to(weight.dtype)

    def effective(self, module: nn.Module) -> Tensor | None:
        change = super().effective(module)
        if change is None:
            return None
        assert isinstance(module, LoraLayer)
        weight, _, transposed = linear_weight(module.get_base_layer())
        return (weight.T if transposed else weight).double() + change
