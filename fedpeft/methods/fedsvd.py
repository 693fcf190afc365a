"""FedSVD: clients train B, the server sets A by an SVD (https://arxiv.org/abs/2505.12805)."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedpeft.methods.base import At, Round
from fedpeft.methods.lora import LoRA
from fedpeft.methods.parts.products import A, B, factors, sites_of, truncated
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

    def check_roles(self, roles: Mapping[str, Role]) -> None:
        """See ``Method.check_roles``; A is turned with the mean B, and clients must get it."""
        for site in sites_of(roles):
            if (roles[site + B] is Role.SHARED) != (roles[site + A] is Role.RECEIVED):
                raise ValueError(
                    f"FedSVD decomposes the mean B and A of {site} on the server: personal and "
                    "frozen must match both or neither"
                )

    def aggregate(self, round: Round) -> State:
        after = weighted_mean(round.states, round.weights)
        if round.number % self.every or not round.states[0]:  # no parameter is shared
            return after
        values = {n: v for n, v in after.items() if n.endswith(B)}
        values |= {n: round.before[n] for n in (b.removesuffix(B) + A for b in values)}
        for site, (b, a) in factors(values).items():
            for end, factor in zip((B, A), truncated(b, a, self.rank), strict=True):
                after[site + end] = factor.to(values[site + end].dtype)
        return after
