"""Ravan: several heads s_i B_i H_i A_i, of which s_i and H_i train (https://arxiv.org/abs/2506.05568)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedpeft.methods.base import Round
from fedpeft.methods.parts.cores import Cores
from fedpeft.state import State, weighted_mean


@dataclass(frozen=True)
class Ravan(Cores):
    """W0 + sum of s_i B_i H_i A_i with frozen B_i, A_i: the server averages s_i H_i, exactly.

    Clients send H_i and s_i apart, which is one number a head more than their product. The server
    sets H_i to the mean product and s_i to 1. The paper's training of some heads only, for weak
    clients, is not offered. H_i = 0 and s_i = 1 at the start (open in the paper).

    Args:
        heads: number of heads, >= 1.
    """

    scaled: ClassVar[bool] = True

    rank: int = 32
    init: str = "orthogonal"
    heads: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1:
            raise ValueError(f"heads must be >= 1, got {self.heads}")

    def num_heads(self) -> int:
        return self.heads

    def aggregate(self, round: Round) -> State:
        sites = [n.removesuffix(".scales") for n in round.states[0] if n.endswith(".scales")]
        products = [dict(state) for state in round.states]
        for product in products:
            for site in sites:
                scales = product[f"{site}.scales"].double()
                product[f"{site}.core"] = scales[:, None, None] * product[f"{site}.core"].double()
                product[f"{site}.scales"] = torch.ones_like(product[f"{site}.scales"])
        mean = weighted_mean(products, round.weights)
        return {name: value.to(round.states[0][name].dtype) for name, value in mean.items()}
