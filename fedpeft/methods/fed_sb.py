"""Fed-SB: only an r x r matrix is trained and averaged (https://arxiv.org/abs/2502.15436)."""

from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from fedpeft.methods.base import At, ServerModel
from fedpeft.methods.parts.cores import Cores
from fedpeft.models.linear import linear_weight
from fedpeft.nn.cores import BASES, CoreAdapter
from fedpeft.state import Role, State

GRADIENT = "gradient"


@dataclass(frozen=True)
class FedSB(Cores):
    """W0 + B R A with frozen B and A: R, (r, r), and the head are shared, so the mean is exact.

    As in LoRA-SB (https://arxiv.org/abs/2411.19557), on which the paper builds, B R A starts as the
    best rank-r approximation of the first step of full fine-tuning, -start_lr sign(G), which is
    AdamW's. G is the mean gradient of the weight over ``start_batches`` batches. As in the paper
    there is no alpha. B and A go down in every round, because clients keep nothing between rounds.

    The paper leaves open whose rows give G. Here they are the server's validation rows, so that no
    client sends a whole gradient.

    Args:
        init: ``gradient`` (the paper's), or B and A as leading singular vectors of the weight
            (``svd``) or random (``orthogonal``), both with R = 0 and never sent.
        start_lr: learning rate of that first step, > 0.
        start_batches: number of batches for G, >= 1.
        start_batch_size: rows a batch, >= 1.
    """

    init: str = GRADIENT
    start_lr: float = 1e-3
    start_batches: int = 4
    start_batch_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("start_lr", "start_batches", "start_batch_size"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key} must be > 0, got {getattr(self, key)}")

    @property
    def inits(self) -> tuple[str, ...]:
        return (GRADIENT, *BASES)

    def bases(self) -> str:
        """Return how ``CoreAdapter`` starts its bases; a start by the gradient replaces them."""
        return "orthogonal" if self.starts else self.init

    @property
    def starts(self) -> bool:
        return self.init == GRADIENT

    def inject(self, model: nn.Module) -> nn.Module:
        super().inject(model)
        for module in model.modules():
            if isinstance(module, CoreAdapter) and self.starts:
                module.basis_in.requires_grad_(True)
                module.basis_out.requires_grad_(True)
        return model

    def role(self, name: str, at: At) -> Role:
        if at.round == 0:
            started = name.endswith((".basis_in", ".basis_out", ".core"))
            return Role.RECEIVED if started else Role.FROZEN
        return Role.FROZEN if name.endswith((".basis_in", ".basis_out")) else Role.SHARED

    def start(self, server: ServerModel) -> State:
        sites = [n for n, m in server.model.named_modules() if isinstance(m, CoreAdapter)]
        weights = {f"{site}.base_layer.weight": site for site in sites}
        sums: State = {}
        server.load()
        for batch in islice(server.batches(self.start_batch_size, "start"), self.start_batches):
            _, gradients = server.gradients(list(weights), batch)
            sums = {name: sums.get(name, 0) + value for name, value in gradients.items()}
        started: State = {}
        for name, site in weights.items():
            layer = server.model.get_submodule(f"{site}.base_layer")
            transposed = linear_weight(layer)[2]
            started |= self._started(site, sums[name].T if transposed else sums[name])
        return started

    def _started(self, site: str, gradient: Tensor) -> State:
        """Return B, R and A of one module, from a gradient (out, in)."""
        u, s, v = torch.linalg.svd(-self.start_lr * gradient.double().sign(), full_matrices=False)
        r = self.rank
        return {
            f"{site}.basis_out": u[:, :r].float().contiguous(),
            f"{site}.basis_in": v[:r].float().contiguous(),
            f"{site}.core": torch.diag(s[:r]).float()[None],
        }
