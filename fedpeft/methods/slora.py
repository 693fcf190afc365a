"""SLoRA: sparse rounds first, then LoRA from their SVD (https://arxiv.org/abs/2308.06522)."""

import re
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedpeft.methods.base import At, Round
from fedpeft.methods.lora import LoRA
from fedpeft.methods.parts.products import A, B
from fedpeft.models.linear import linear_weight
from fedpeft.nn.sparse import SparseDelta, scattered
from fedpeft.seeding import generator
from fedpeft.state import Role, State, weighted_mean

VALUES = ".base_layer.values"
FACTOR = re.compile(r"\.lora_[AB]\.")


@dataclass(frozen=True)
class SLoRA(LoRA):
    """Rounds 1 to ``sparse_rounds`` train weights at random places, later rounds LoRA's A and B.

    After the last sparse round the server sets (alpha/r) B A to the best rank-r approximation of
    the accumulated change, B = U S^.5 and A = S^.5 V^T up to the scale, and the change itself to
    zero: the base weight is the pretrained one again. The head trains in all rounds.

    The mean of sparse rounds is exact, but for the cut to rank r at their end; that of later
    rounds is LoRA's. Later rounds still send the zeros down, ``density`` x in x out numbers a
    module. The paper leaves open the places, here drawn uniformly for each module of ``targets``,
    and the split of S.

    Args:
        sparse_rounds: >= 1, and fewer than the run's rounds. Open in the paper.
        density: share of a weight's numbers that train, in (0, 1].
        mask_seed: seeds the places.
    """

    sparse_rounds: int = 3
    density: float = 0.0012
    mask_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparse_rounds < 1:
            raise ValueError(f"sparse_rounds must be >= 1, got {self.sparse_rounds}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")

    def check(self, num_rounds: int) -> None:
        if self.sparse_rounds >= num_rounds:
            raise ValueError(
                f"sparse_rounds must be < num_rounds={num_rounds}, as LoRA trains in the rounds "
                f"after them, got {self.sparse_rounds}"
            )

    def inject(self, model: nn.Module) -> nn.Module:
        super().inject(model)
        for site, module in model.named_modules():
            if isinstance(module, LoraLayer):
                weight, _, transposed = linear_weight(module.get_base_layer())
                rows, columns = reversed(weight.shape) if transposed else weight.shape
                index = self.places(site, (rows, columns))
                module.base_layer = SparseDelta(module.base_layer, index, (rows, columns))
        return model

    def places(self, site: str, shape: tuple[int, int]) -> Tensor:
        """Return rows and columns, (2, n), of a module's numbers that train.

        Args:
            site: the module's name, which seeds its places with ``mask_seed``.
            shape: (out, in) of its weight.
        """
        size = shape[0] * shape[1]
        draws = generator(self.mask_seed, f"mask {site}")
        count = max(1, round(self.density * size))
        flat = torch.from_numpy(draws.choice(size, count, replace=False, shuffle=False))
        return torch.stack([flat // shape[1], flat % shape[1]])

    def role(self, name: str, at: At) -> Role:
        sparse = at.round <= self.sparse_rounds
        if name.endswith(VALUES):
            return Role.SHARED if sparse else Role.FROZEN
        return Role.FROZEN if sparse and FACTOR.search(name) else Role.SHARED

    def aggregate(self, round: Round) -> State:
        after = weighted_mean(round.states, round.weights)
        if round.number == self.sparse_rounds:
            for name in [name for name in after if name.endswith(VALUES)]:
                after |= self._dense_start(name.removesuffix(VALUES), after[name], round.before)
        return after

    def _dense_start(self, site: str, values: Tensor, before: State) -> State:
        """Return A and B that stand for a module's sparse change, and zeros for the change."""
        a, b = before[site + A], before[site + B]
        shape = (b.shape[0], a.shape[1])
        change = scattered(values.double(), self.places(site, shape), shape)
        u, s, v = torch.linalg.svd(change * self.rank / self.alpha, full_matrices=False)
        rank = min(self.rank, len(s))
        new_a, new_b = torch.zeros_like(a), torch.zeros_like(b)
        new_b[:, :rank] = (u[:, :rank] * s[:rank].sqrt()).to(b.dtype)
        new_a[:rank] = (s[:rank].sqrt()[:, None] * v[:rank]).to(a.dtype)
        return {site + A: new_a, site + B: new_b, site + VALUES: torch.zeros_like(values)}

    def effective(self, module: nn.Module) -> Tensor | None:
        change = super().effective(module)
        if change is None:
            return None
        assert isinstance(module, LoraLayer)
        sparse = module.base_layer
        return change + sparse.dense() if isinstance(sparse, SparseDelta) else change
