"""LoRA-FAIR: the server corrects the mean B (https://arxiv.org/abs/2411.14961)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.methods.base import Round
from fedpeft.methods.parts.products import B, PairedLoRA, factors, stacked
from fedpeft.state import State, weighted_mean


@dataclass(frozen=True)
class LoRAFair(PairedLoRA):
    """LoRA that averages A and B, and adds to B what brings B A nearer to avg(B_c A_c).

    The residual dB minimises |avg(B_c A_c) - (B + dB) A|_F^2 + penalty |dB|_F^2, so that
    dB = (avg(B_c A_c) - B A) A^T (A A^T + penalty I)^-1. Clients go on from A and B + dB, and send
    what LoRA's do. The mean is not exact, because A has rank r and avg(B_c A_c) may have more.

    The paper compares products by a similarity (the cosine), whose optimum has no closed form; here
    the Frobenius norm takes its place. Products are compared without alpha/r, so ``penalty`` does
    not depend on it.

    Args:
        penalty: lambda >= 0; 0 takes the smallest of the dB that minimise the first term.
    """

    penalty: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.penalty < 0:
            raise ValueError(f"penalty must be >= 0, got {self.penalty}")

    def aggregate(self, round: Round) -> State:
        after = weighted_mean(round.states, round.weights)
        stacks = stacked(round.states, round.weights)
        for site, (b, a) in factors(after).items():
            corrected = b + self.residual(b, a, *stacks[site])
            after[site + B] = corrected.to(after[site + B].dtype)
        return after

    def residual(self, b: Tensor, a: Tensor, wide: Tensor, tall: Tensor) -> Tensor:
        """Return dB (out, r); no matrix (out, in) is built.

        Args:
            b: mean B (out, r).
            a: mean A (r, in).
            wide: left factor of avg(B_c A_c), (out, K r).
            tall: right factor, (K r, in).
        """
        gram = a @ a.T
        ridge = gram + self.penalty * torch.eye(len(gram), dtype=gram.dtype)
        return (wide @ (tall @ a.T) - b @ gram) @ torch.linalg.pinv(ridge, hermitian=True)
