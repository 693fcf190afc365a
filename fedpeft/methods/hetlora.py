"""HetLoRA: zero-padded factors, weighted by their products' norms.

https://research.google/pubs/heterogeneous-lora-for-federated-fine-tuning-of-on-device-foundation-models/
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpeft.methods.base import At, Memory, Round, Term
from fedpeft.methods.parts.products import A, B, PairedLoRA, factors
from fedpeft.methods.parts.ranks import RankedLoRA, rank_of
from fedpeft.state import Role, State, weighted_mean


@dataclass(frozen=True)
class HetLoRA(RankedLoRA, PairedLoRA):
    """LoRA of a rank per client: the server pads factors with zeros and cuts them for a client.

    Self-pruning lets a client's rank r_c shrink. ``penalty`` times the sum over modules of
    |B_c[:, k:]| |A_c[k:]|, with k = floor(prune r_c) and Frobenius norms, is added to the client's
    loss. If that sum is smaller after a client's round than before it, r_c becomes k for the rounds
    to come. The server decides, because it has both states, and tells the client its rank. The
    paper leaves open how modules are combined; here they are summed.

    Args:
        weighting: ``norm`` (the paper's) weighs A and B of a module by |B_c A_c|_F; ``examples``
            weighs by training rows. The paper leaves open whether numbers of examples enter the
            norm's weights (here they do not), and whether norms are a module's (as here) or the
            model's. The head, and a module whose products are all zero, are weighed by examples.
        prune: gamma in (0, 1]; the paper's is 0.99. 1 keeps every rank.
        penalty: lambda >= 0; the paper's is 5e-3. It is used only if ``prune`` is below 1.
    """

    weighting: str = "norm"
    prune: float = 1.0
    penalty: float = 5e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.prune <= 1:
            raise ValueError(f"prune must be in (0, 1], got {self.prune}")
        if self.penalty < 0:
            raise ValueError(f"penalty must be >= 0, got {self.penalty}")
        if self.weighting not in ("norm", "examples"):
            raise ValueError(f"weighting must be norm or examples, got {self.weighting}")

    def check_roles(self, roles: Mapping[str, Role]) -> None:
        if self.prune < 1 or self.weighting == "norm":
            super().check_roles(roles)

    def down(self, memory: Memory, at: At) -> State:
        """Return the client's rank if ranks can shrink, else nothing."""
        if self.prune == 1 or at.client is None:
            return {}
        start = torch.tensor(rank_of(self.ranks, at, self.rank))
        return {"rank": memory.get("ranks", {}).get(str(at.client), start)}

    def client_rank(self, at: At) -> int:
        return int(at.memory["rank"]) if "rank" in at.memory else super().client_rank(at)

    def trains_blocks(self, num_clients: int) -> bool:
        """See ``Method.trains_blocks``; pruning may shrink any client's rank after a round."""
        return self.prune < 1 or super().trains_blocks(num_clients)

    def pruned(self, rank: int) -> int:
        """Return the rank that pruning leaves, >= 1."""
        return max(1, math.floor(self.prune * rank))

    def term(self, at: At, start: State, kept: State) -> Term:
        """See ``Method.term``."""
        rank = self.client_rank(at)
        if self.prune == 1 or self.pruned(rank) == rank:
            return Term()
        return TailPenalty(self.penalty, self.pruned(rank), rank)

    def _prune(self, round: Round) -> None:
        """Shrink the ranks of clients whose last components lost weight in this round."""
        assert round.memory is not None
        ranks = round.memory.setdefault("ranks", {})
        for at, state in zip(round.ats, round.states, strict=True):
            rank = self.client_rank(at)
            first = self.pruned(rank)
            tails = [_tail(factors(s), first, rank) for s in (round.before, state)]
            if tails[1] < tails[0]:
                ranks[str(at.client)] = torch.tensor(first)

    def aggregate(self, round: Round) -> State:
        if self.prune < 1:
            self._prune(round)
        after = weighted_mean(round.states, round.weights)
        if self.weighting == "examples":
            return after
        clients = [factors(state) for state in round.states]
        for site in clients[0]:
            norms = [_norm(*client[site]) for client in clients]
            if (total := sum(norms)) > 0:
                pairs = [{end: state[site + end] for end in (A, B)} for state in round.states]
                mean = weighted_mean(pairs, [norm / total for norm in norms])
                after |= {site + end: value for end, value in mean.items()}
        return after


class TailPenalty(Term):
    """Adds the gradient of penalty x sum |B[:, k:r]| |A[k:r]|.

    Args:
        penalty: lambda.
        first: k.
        rank: r.
    """

    def __init__(self, penalty: float, first: int, rank: int) -> None:
        self.penalty, self.first, self.rank = penalty, first, rank

    def correct(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, a in parameters.items():
            b = parameters.get(name.removesuffix(A) + B) if name.endswith(A) else None
            if b is None or a.grad is None or b.grad is None:
                continue
            tail = slice(self.first, self.rank)
            a_tail, b_tail = a.detach()[tail], b.detach()[:, tail]
            a_norm, b_norm = a_tail.norm(), b_tail.norm()
            if a_norm > 0 and b_norm > 0:  # the norm has no gradient at zero
                a.grad[tail].add_(a_tail * (self.penalty * b_norm / a_norm))
                b.grad[:, tail].add_(b_tail * (self.penalty * a_norm / b_norm))


def _tail(pairs: Mapping[str, tuple[Tensor, Tensor]], first: int, rank: int) -> float:
    """Return the sum over modules of |B[:, k:r]| |A[k:r]|, where k is ``first``."""
    return sum(float(b[:, first:rank].norm() * a[first:rank].norm()) for b, a in pairs.values())


def _norm(b: Tensor, a: Tensor) -> float:
    """Return |B A|_F, the root of trace((B^T B) (A A^T)), because r x r matrices suffice for it."""
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())
