"""The LoRA family on HF PEFT's LoRA (https://arxiv.org/abs/2106.09685): W0 + (alpha/r) B A.

- ``LoRA``: FedAvg of A, B and the head (FedIT, https://arxiv.org/abs/2305.05644).
- ``FFALoRA``: A stays at its random start, so averaging B is exact
  (https://arxiv.org/abs/2403.12313).
- ``FedSALoRA``: A is shared, B is personal (https://arxiv.org/abs/2410.01463).
"""

from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedpeft.methods.base import At, Method
from fedpeft.methods.parts.exported import PeftForm, adapter_sum, as_lora, lora_sites
from fedpeft.models.linear import check_rank, is_transposed
from fedpeft.models.sites import add_by_peft, attention_projections
from fedpeft.state import Role, State


@dataclass(frozen=True)
class LoRA(Method):
    """B A, with A (r, in) kaiming-uniform and B (out, r) zero, on the attention's ``targets``.

    Args:
        rank: r >= 1.
        alpha: > 0; B A is multiplied by alpha/r.
        targets: q, k, v, o or ends of module names.
        dropout: probability on the input of A, in [0, 1).
    """

    rank: int = 8
    alpha: float = 16.0
    targets: list[str] = field(default_factory=lambda: ["q", "v"])
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be >= 1, got {self.rank}")
        if not self.targets:
            raise ValueError("targets must name at least one projection, got []")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.alpha <= 0:
            raise ValueError(f"alpha must be > 0, got {self.alpha}")

    def inject(self, model: nn.Module) -> nn.Module:
        add_by_peft(model, default=self.config(model))
        return model

    def config(self, model: nn.Module, **more: Any) -> LoraConfig:
        """Return PEFT's configuration for a model; fields in ``more`` win."""
        targets = attention_projections(model, self.targets)
        check_rank(model, targets, self.rank)
        fields: dict[str, Any] = {
            "r": self.rank,
            "lora_alpha": self.alpha,  # PEFT only divides it, so a float will do
            "lora_dropout": self.dropout,
            "target_modules": targets,
            "fan_in_fan_out": is_transposed(model.get_submodule(targets[0])),
        }
        return LoraConfig(**(fields | more))

    def effective(self, module: nn.Module) -> Tensor | None:
        return self.product(module, "default")

    def product(self, module: nn.Module, adapter: str) -> Tensor | None:
        """Return (alpha/r) B A of a module's PEFT adapter, or null if it has no LoRA."""
        if not isinstance(module, LoraLayer) or not isinstance(module, nn.Module):
            return None
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        assert isinstance(a, Tensor) and isinstance(b, Tensor)
        return module.scaling[adapter] * (b.float() @ a.float())

    def peft_form(self, model: nn.Module, start: State) -> PeftForm | None:
        """See ``Method.peft_form``; several adapters on a module become one."""
        sites = dict(lora_sites(model))
        if all(len(module.scaling) == 1 for module in sites.values()):
            return super().peft_form(model, start)
        return as_lora(model, {name: adapter_sum(module) for name, module in sites.items()})


@dataclass(frozen=True)
class FFALoRA(LoRA):
    """LoRA with A frozen at its seeded start, so that avg(B) A = avg(B A)."""

    def inject(self, model: nn.Module) -> nn.Module:
        super().inject(model)
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
        return model


@dataclass(frozen=True)
class FedSALoRA(LoRA):
    """LoRA that shares A and keeps B on the client.

    The official code keeps the head on the client too: ``personal=head``, which the method's YAML
    sets.
    """

    def role(self, name: str, at: At) -> Role:
        return Role.PERSONAL if ".lora_B." in name else Role.SHARED
