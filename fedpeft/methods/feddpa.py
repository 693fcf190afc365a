"""FedDPA: a global and a local LoRA on every target (https://arxiv.org/abs/2403.19211)."""

from dataclasses import dataclass

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedpeft.methods.base import At
from fedpeft.methods.lora import LoRA
from fedpeft.models.sites import add_by_peft
from fedpeft.state import Role


@dataclass(frozen=True)
class FedDPA(LoRA):
    """W0 + (alpha/r) ((1 - w) B_g A_g + w B_l A_l): g and the head are shared, l is personal.

    Both train together here; the paper's clients train one after the other, the local after the
    global one's last round or in turn within each round. The paper weighs them anew for each test
    instance, by its likeness to the client's rows; w is fixed here. Whose the head is, is open.

    Args:
        local_weight: w in (0, 1); the official code's start is 0.5.
    """

    local_weight: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.local_weight < 1:
            raise ValueError(f"local_weight must be in (0, 1), got {self.local_weight}")

    def inject(self, model: nn.Module) -> nn.Module:
        shares = {"shared": 1 - self.local_weight, "own": self.local_weight}
        configs = {n: self.config(model, lora_alpha=self.alpha * w) for n, w in shares.items()}
        add_by_peft(model, **configs)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.set_adapter(list(shares))
        return model

    def role(self, name: str, at: At) -> Role:
        return Role.PERSONAL if ".own." in name else Role.SHARED

    def effective(self, module: nn.Module) -> Tensor | None:
        """Of the shared factors: the personal ones are not averaged."""
        return self.product(module, "shared")
