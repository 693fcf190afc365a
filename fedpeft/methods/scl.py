"""SCL: sequential compression layers in every block's MLP (https://arxiv.org/abs/2412.07021)."""

from dataclasses import dataclass

from torch import Tensor, nn

from fedpeft.methods.base import Method
from fedpeft.methods.parts.exported import PeftForm, as_lora
from fedpeft.models.linear import check_rank, linear_weight, replace
from fedpeft.models.sites import MLP_OUTPUT, freeze_all_but_head, named_sites
from fedpeft.nn.scl import INITS, CompressedProjection
from fedpeft.state import State


@dataclass(frozen=True)
class SCL(Method):
    """Each MLP's second projection W2 becomes W2' C; C, W2' and the head train and are shared.

    Args:
        rank: r, rows of C, which makes r (f + d) parameters a block. Open in the paper; 64 here.
        init: ``random_pinv`` (the paper's), ``svd`` or ``residual``; see ``CompressedProjection``.
    """

    rank: int = 64
    init: str = "random_pinv"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be >= 1, got {self.rank}")
        if self.init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {self.init}")

    def inject(self, model: nn.Module) -> nn.Module:
        freeze_all_but_head(model)
        names = named_sites(model, MLP_OUTPUT, "MLP output projection")
        check_rank(model, names, self.rank)
        for name in names:
            weight, bias, transposed = linear_weight(model.get_submodule(name))
            weight = weight.T if transposed else weight
            layer = CompressedProjection(weight, bias, self.rank, self.init, transposed)
            replace(model, name, layer)
        return model

    def effective(self, module: nn.Module) -> Tensor | None:
        if not isinstance(module, CompressedProjection):
            return None
        return module.project @ module.compress

    def peft_form(self, model: nn.Module, start: State) -> PeftForm | None:
        """See ``Method.peft_form``; only where W2 stays is W2' C a LoRA."""
        layers = {n: m for n, m in model.named_modules() if isinstance(m, CompressedProjection)}
        if any(layer.weight is None for layer in layers.values()):
            return None
        return as_lora(model, {n: (layer.project, layer.compress) for n, layer in layers.items()})
