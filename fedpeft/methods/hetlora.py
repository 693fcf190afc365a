"""HetLoRA: zero-padded factors, weighted by their products' norms.

https://research.google/pubs/heterogeneous-lora-for-federated-fine-tuning-of-on-device-foundation-models/
"""

from dataclasses import dataclass

from torch import Tensor

from fedpeft.methods.base import Round
from fedpeft.methods.parts.products import A, B, factors
from fedpeft.methods.parts.ranks import RankedLoRA
from fedpeft.state import State, weighted_mean


@dataclass(frozen=True)
class HetLoRA(RankedLoRA):
    """LoRA of a rank per client: padded with zeros on the way up, cut off on the way down.

    Self-pruning, an option of the paper, is not offered: a client's rank stays.

    Args:
        weighting: ``norm`` (the paper's): A and B of a module by |B_c A_c|_F; or ``examples``. The
            paper leaves open whether numbers of examples enter too, and whether norms are a
            module's or the model's: here they do not, and they are a module's. The head, and a
            module whose products are all zero, go by examples.
    """

    weighting: str = "norm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weighting not in ("norm", "examples"):
            raise ValueError(f"weighting must be norm or examples, got {self.weighting}")

    def aggregate(self, round: Round) -> State:
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


def _norm(b: Tensor, a: Tensor) -> float:
    """|B A|_F^2 = trace of (B^T B) (A A^T): r x r matrices do."""
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())
