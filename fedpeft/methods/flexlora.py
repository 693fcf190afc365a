"""FlexLoRA: the mean product, cut to each client's rank (https://arxiv.org/abs/2402.11505)."""

from dataclasses import dataclass

from fedpeft.methods.base import Round
from fedpeft.methods.parts.products import A, B, PairedLoRA, stacked, truncated
from fedpeft.methods.parts.ranks import RankedLoRA
from fedpeft.state import State, weighted_mean


@dataclass(frozen=True)
class FlexLoRA(RankedLoRA, PairedLoRA):
    """LoRA whose server factorises avg(B A) by its SVD: B = U S, A = V^T, cut to ``rank``.

    The first r columns of B and rows of A, which a client of rank r gets, are the best
    approximation of that rank. The aggregation is exact only where ``rank`` is at least the rank of
    the mean, e.g. min(in, out) or the sum of the clients' ranks.
    """

    def aggregate(self, round: Round) -> State:
        after = weighted_mean(round.states, round.weights)
        for site, (wide, tall) in stacked(round.states, round.weights).items():
            for end, factor in zip((B, A), truncated(wide, tall, self.rank), strict=True):
                after[site + end] = factor.to(after[site + end].dtype)
        return after
