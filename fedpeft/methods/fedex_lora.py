"""FedEx-LoRA: the mean's error goes into the base weight (https://arxiv.org/abs/2410.09432)."""

from dataclasses import dataclass

from fedpeft.methods.base import Round
from fedpeft.methods.parts.products import BASE, BaseChangingLoRA, factors, stacked
from fedpeft.state import State, weighted_mean


@dataclass(frozen=True)
class FedExLoRA(BaseChangingLoRA):
    """LoRA that averages A and B, and adds alpha/r (avg(B A) - avg(B) avg(A)) to the base weight.

    The aggregation is exact. The paper sends the residual as factors, of a rank that grows with
    the number of clients; here the server sends the whole base weight, see ``BaseChangingLoRA``.
    """

    def aggregate(self, round: Round) -> State:
        after = weighted_mean(round.states, round.weights)
        stacks = stacked(round.states, round.weights)
        for site, (b, a) in factors(after).items():
            wide, tall = stacks[site]
            after[site + BASE] = self.grown(round, site, wide @ tall - b @ a)
        return after
