"""Base of methods that train small matrices between frozen bases, the same on all clients."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from fedpeft.methods.base import Method
from fedpeft.methods.parts.exported import PeftForm, as_lora
from fedpeft.models.linear import check_rank, linear_weight, replace
from fedpeft.models.sites import attention_projections, freeze_all_but_head
from fedpeft.nn.cores import BASES, CoreAdapter
from fedpeft.state import State


@dataclass(frozen=True)
class Cores(Method):
    """A ``CoreAdapter`` on each of the attention's ``targets``.

    Args:
        rank: r >= 1 of each r x r matrix.
        targets: q, k, v, o or ends of module names.
        init: start of the bases, ``svd`` or ``orthogonal``.
    """

    scaled: ClassVar[bool] = False

    rank: int = 64
    targets: list[str] = field(default_factory=lambda: ["q", "v"])
    init: str = "svd"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be >= 1, got {self.rank}")
        if not self.targets:
            raise ValueError("targets must name at least one projection, got []")
        if self.init not in self.inits:
            raise ValueError(f"init must be one of {', '.join(self.inits)}, got {self.init}")

    @property
    def inits(self) -> tuple[str, ...]:
        """Values that ``init`` may have."""
        return BASES

    def bases(self) -> str:
        """Return how ``CoreAdapter`` starts its bases."""
        return self.init

    def num_heads(self) -> int:
        """Return the number of r x r matrices of a module."""
        return 1

    def inject(self, model: nn.Module) -> nn.Module:
        freeze_all_but_head(model)
        for name in attention_projections(model, self.targets):
            check_rank(model, [name], self.rank)  # the core is r x r at each of them
            layer = model.get_submodule(name)
            weight, _, transposed = linear_weight(layer)
            weight = weight.T if transposed else weight
            adapter = CoreAdapter(
                layer, weight, self.rank, self.num_heads(), self.bases(), self.scaled
            )
            replace(model, name, adapter)
        return model

    def effective(self, module: nn.Module) -> Tensor | None:
        return module.dense() if isinstance(module, CoreAdapter) else None

    def peft_form(self, model: nn.Module, start: State) -> PeftForm | None:
        """See ``Method.peft_form``; the matrices of a module, between their bases, are one LoRA."""
        cores = {n: m for n, m in model.named_modules() if isinstance(m, CoreAdapter)}
        return as_lora(model, {name: module.factors() for name, module in cores.items()})
