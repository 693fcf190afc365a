"""FedEx-LoRA: the mean's error goes into the base weight (https://arxiv.org/abs/2410.09432)."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedpeft.methods.base import State, weighted_mean
from fedpeft.methods.parts.products import BASE, BaseChangingLoRA, factors, stacked


@dataclass(frozen=True)
class FedExLoRA(BaseChangingLoRA):
    """LoRA that averages A and B, and adds alpha/r (avg(B A) - avg(B) avg(A)) to the base weight.

    The aggregation is exact. The paper sends the residual as factors, of a rank that grows with
    the number of clients; here the base weight goes down whole, see ``BaseChangingLoRA``.
    """

    def aggregate(
        self, states: Sequence[State], weights: Sequence[float], before: State, round: int
    ) -> State:
        after = weighted_mean(states, weights)
        stacks = stacked(states, weights)
        for site, (b, a) in factors(after).items():
            wide, tall = stacks[site]
            after[site + BASE] = self.grown(before, site, wide @ tall - b @ a)
        return after
