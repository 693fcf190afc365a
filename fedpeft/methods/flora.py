"""FLoRA: the clients' stacked LoRAs go into the base weight (https://arxiv.org/abs/2409.05976)."""

import math
from dataclasses import dataclass

import torch

from fedpeft.methods.base import Round
from fedpeft.methods.parts.products import BASE, A, B, BaseChangingLoRA, stacked
from fedpeft.methods.parts.ranks import RankedLoRA
from fedpeft.seeding import derive
from fedpeft.state import State, weighted_mean


@dataclass(frozen=True)
class FLoRA(RankedLoRA, BaseChangingLoRA):
    """LoRA whose server adds alpha/r avg(B A) to the base weight; rounds start with new factors.

    The stack [w_1 B_1, w_2 B_2, ...] [A_1; A_2; ...] is that mean whatever the clients' ranks, so
    the aggregation is exact. The server draws the next A, kaiming-uniform, by the round's number;
    the next B is zero. The paper's server sends the stack, (sum of ranks) x (in + out) numbers a
    module; here it sends the whole base weight, see ``BaseChangingLoRA``.

    Args:
        fresh_seed: seeds the new A.
    """

    fresh_seed: int = 0

    def aggregate(self, round: Round) -> State:
        after = weighted_mean(round.states, round.weights)
        draws = torch.Generator().manual_seed(derive(self.fresh_seed, "fresh", round.number))
        for site, (wide, tall) in stacked(round.states, round.weights).items():
            after[site + BASE] = self.grown(round, site, wide @ tall)
            a = after[site + A]
            fresh = torch.rand(a.shape, generator=draws) * 2 - 1
            after[site + A] = (fresh / math.sqrt(a.shape[1])).to(a.dtype)
            after[site + B] = torch.zeros_like(after[site + B])
        return after
