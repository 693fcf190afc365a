"""FeDeRA: LoRA that starts from the weight's SVD (https://arxiv.org/abs/2404.18848)."""

from dataclasses import dataclass

from torch import nn

from fedpeft.methods.lora import LoRA
from fedpeft.models.sites import add_by_peft, attention_projections, linear_weight


@dataclass(frozen=True)
class FeDeRA(LoRA):
    """LoRA whose (alpha/r) B A starts as the weight's r largest components; W0 is the frozen rest.

    HF PEFT's ``init_lora_weights="pissa"`` computes the start. Every process computes the frozen
    rest for itself, because the product of U and V is equal up to rounding on every processor, also
    where one flips the signs of a pair of singular vectors. A base in bfloat16 rounds the rest.
    """

    def inject(self, model: nn.Module) -> nn.Module:
        """Add LoRA and decompose every target's weight.

        Raises:
            ValueError: a weight is quantised, so it cannot be decomposed.
        """
        targets = attention_projections(model, self.targets)
        weights = [linear_weight(model.get_submodule(name))[0] for name in targets]
        on_meta = any(weight.is_meta for weight in weights)  # to count parameters; has no SVD
        add_by_peft(model, default=self.config(model, init_lora_weights=on_meta or "pissa"))
        return model
