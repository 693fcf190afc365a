"""FedFTG: MLP weights train by gradients of low rank (https://arxiv.org/abs/2410.23111)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpeft.methods.base import At, Method, Term
from fedpeft.models.linear import linear_weight
from fedpeft.models.sites import MLP_INPUT, MLP_OUTPUT, freeze_all_but_head, named_sites
from fedpeft.state import State

MLP_SITE = re.compile(f"{MLP_INPUT.pattern}|{MLP_OUTPUT.pattern}")


@dataclass(frozen=True)
class FedFTG(Method):
    """The whole weights of every MLP and the head train and are averaged, which is exact.

    The weights' gradients are projected to rank r in every step, as GaLore's are; biases stay
    frozen. GaLore keeps one projection for many steps, and the optimizer's moments inside it. Here
    every step computes its projection, so that a client carries nothing over. The moments are then
    as large as the weights: the rank limits each gradient and saves no memory. The weights are sent
    whole, which for RoBERTa-base is 56.6 M numbers or 226 MB each way.

    Args:
        rank: r >= 1. The gradient of a weight whose smaller side is at most r stays whole.
    """

    rank: int = 8

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be >= 1, got {self.rank}")

    def inject(self, model: nn.Module) -> nn.Module:
        freeze_all_but_head(model)
        names = named_sites(model, MLP_INPUT, "MLP input projection")
        for name in names + named_sites(model, MLP_OUTPUT, "MLP output projection"):
            weight, _, _ = linear_weight(model.get_submodule(name))
            weight.requires_grad_(True)
        return model

    def term(self, at: At, start: State, kept: State) -> Term:
        """See ``Method.term``."""
        return Projection(self)

    def project(self, gradient: Tensor) -> Tensor:
        """Return about the best approximation of rank r of a gradient G.

        It is Q Q^T G, where Q spans about the leading r left singular vectors of G, or of G^T if G
        is tall. Two power iterations find Q from a random start of r + 8 columns, without a
        decomposition of G. The start is fixed, so every call draws the same one.
        """
        if min(gradient.shape) <= self.rank:
            return gradient
        tall = gradient.shape[0] > gradient.shape[1]
        wide = gradient.float().T if tall else gradient.float()
        draws = torch.Generator().manual_seed(0)
        start = torch.randn(wide.shape[1], self.rank + 8, generator=draws).to(wide.device)
        basis = torch.linalg.qr(wide @ start).Q
        for _ in range(2):
            basis = torch.linalg.qr(wide @ (wide.T @ basis)).Q
        u, s, v = torch.linalg.svd(basis.T @ wide, full_matrices=False)
        low = basis @ (u[:, : self.rank] * s[: self.rank]) @ v[: self.rank]
        return (low.T if tall else low).to(gradient.dtype)


class Projection(Term):
    """Projects every MLP weight's gradient to low rank; the head's stay as they are."""

    def __init__(self, method: FedFTG) -> None:
        self.method = method

    def correct(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            is_site = MLP_SITE.search(name.removesuffix(".weight")) is not None
            if is_site and parameter.grad is not None:
                parameter.grad.copy_(self.method.project(parameter.grad))
