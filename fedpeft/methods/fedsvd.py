"""FedSVD: clients train B, the server sets A by an SVD (https://arxiv.org/abs/2505.12805)."""

from collections.abc import Collection
from dataclasses import dataclass

from fedpeft.methods.base import At, Round
from fedpeft.methods.lora import LoRA
from fedpeft.methods.parts.products import A, B, factors, truncated
from fedpeft.state import Role, State, weighted_mean


@dataclass(frozen=True)
class FedSVD(LoRA):
    """LoRA whose clients train and send B; the server makes A = V^T, B = U S of avg(B) A.

    The product has rank r, so the SVD changes the factors and not their product: the aggregation is
    exact. A is sent to clients with B after round 1. In round 1, A is LoRA's random one; the paper
    may start otherwise (open).

    Args:
        every: decompose in every so many rounds, >= 1.
    """

    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise ValueError(f"every must be >= 1, got {self.every}")

    def role(self, name: str, at: At) -> Role:
        return Role.RECEIVED if ".lora_A." in name else Role.SHARED

    def check_shared(self, names: Collection[str]) -> None:
        """See ``Method.check_shared``; the server cannot turn A without the B of all clients."""
        if names and not any(name.endswith(B) for name in names):
            raise ValueError(
                "FedSVD decomposes the mean B with A on the server, but no B is shared: personal "
                "and frozen must not match it"
            )

    def aggregate(self, round: Round) -> State:
        after = weighted_mean(round.states, round.weights)
        if round.number % self.every or not round.states[0]:  # no parameter is shared
            return after
        values = {n: v for n, v in (round.before | after).items() if n.endswith((A, B))}
        for site, (b, a) in factors(values).items():
            for end, factor in zip((B, A), truncated(b, a, self.rank), strict=True):
                after[site + end] = factor.to(values[site + end].dtype)
        return after
