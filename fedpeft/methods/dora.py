"""DoRA: LoRA for a weight's direction, a vector for its magnitude (https://arxiv.org/abs/2402.09353)."""

from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from fedpeft.methods.lora import LoRA


@dataclass(frozen=True)
class DoRA(LoRA):
    """m (W0 + (alpha/r) B A) / |W0 + (alpha/r) B A|, whose A, B, m and the head are shared.

    HF PEFT's ``use_dora`` computes it: m and the norm have one number for each output, m starts as
    the norm of W0, and the norm counts as a constant in the gradient. The matrix is not linear in
    A, B and m together, so their mean is not exact.

    Clients train one by one, because PEFT also calls A on the identity matrix, which holds no row
    of the batch.

    The paper is not federated, so it leaves open how the clients' m are aggregated. Here it is by
    the weighted mean. ``personal=*lora_magnitude*`` keeps m on the client.
    """

    def config(self, model: nn.Module, **more: Any) -> LoraConfig:
        return super().config(model, use_dora=True, **more)

    def effective(self, module: nn.Module) -> Tensor | None:
        """Return the whole matrix (out, in), W0 in it, because m scales W0 too."""
        change = super().effective(module)
        if change is None:
            return None
        assert isinstance(module, LoraLayer)
        weight = dequantize_module_weight(module.get_base_layer()).detach()
        weight = weight.T if getattr(module, "fan_in_fan_out", False) else weight
        magnitude = module.lora_magnitude_vector["default"].weight
        assert isinstance(magnitude, Tensor)
        direction = weight.double() + change
        return magnitude.double()[:, None] * direction / direction.norm(dim=1, keepdim=True)
