"""FedRot-LoRA: the clients' factors are rotated into line (https://arxiv.org/abs/2602.23638)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.methods.base import Round
from fedpeft.methods.parts.products import A, B, PairedLoRA, factors
from fedpeft.state import State, weighted_mean


@dataclass(frozen=True)
class FedRotLoRA(PairedLoRA):
    """LoRA that averages B_c R_c and R_c^T A_c, R_c orthogonal: B_c A_c stays as it is.

    R_c brings client c's factors next to those that the round began with: it is the orthogonal
    Procrustes solution of |B_c R - B|^2 + |R^T A_c - A|^2 (``align=both``) or of one of the two.
    The mean comes nearer to avg(B A), and is not exact. It is open which factors the paper aligns
    in which round, and how strongly; here the alignment is full. The server rotates, so clients
    train and send what LoRA's do.

    Args:
        align: factors that the rotation brings into line: ``both``, ``A`` or ``B``.
    """

    align: str = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.align not in ("both", "A", "B"):
            raise ValueError(f"align must be both, A or B, got {self.align}")

    def aggregate(self, round: Round) -> State:
        turned: list[State] = []
        references = factors(round.before)
        for state in round.states:
            new = dict(state)
            for site, (b, a) in factors(state).items():
                r = self._rotation(b, a, *references[site])
                new[site + B] = (b @ r).to(state[site + B].dtype)
                new[site + A] = (r.T @ a).to(state[site + A].dtype)
            turned.append(new)
        return weighted_mean(turned, round.weights)

    def _rotation(self, b: Tensor, a: Tensor, b_before: Tensor, a_before: Tensor) -> Tensor:
        """Return R = U V^T of the SVD of B_c^T B + A_c A^T; the identity if that sum is zero."""
        match = torch.zeros(self.rank, self.rank, dtype=b.dtype)
        if self.align != "A":
            match = match + b.T @ b_before
        if self.align != "B":
            match = match + a @ a_before.T
        if not match.any():
            return torch.eye(self.rank, dtype=b.dtype)
        u, _, v = torch.linalg.svd(match)
        return u @ v
