"""FeDeRA: LoRA that starts from the weight's SVD (https://arxiv.org/abs/2404.18848)."""

from dataclasses import dataclass

from torch import nn

from fedpeft.methods.lora import LoRA
from fedpeft.models.sites import add_by_peft, attention_projections, linear_weight


@dataclass(frozen=True)
class FeDeRA(LoRA):
    """(alpha/r) B A are the weight's r largest components, W0 keeps the rest, which is frozen.

    HF PEFT's ``init_lora_weights="pissa"``. What is frozen is computed by every process for
    itself: the product of U and V is equal up to rounding wherever it is computed, also where
    another processor turns a pair of singular vectors round. A base in bfloat16 rounds the rest.
    """

    def inject(self, model: nn.Module) -> nn.Module:
        """Decomposes every target.

        Raises:
            ValueError: a weight is quantised, so it cannot be decomposed.
        """
        targets = attention_projections(model, self.targets)
        weights = [linear_weight(model.get_submodule(name))[0] for name in targets]
        without = any(weight.is_meta for weight in weights)  # when parameters are counted
        add_by_peft(model, default=self.config(model, init_lora_weights=without or "pissa"))
        return model
