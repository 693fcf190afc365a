"""FeDeRA: LoRA that starts from the weight's SVD (https://arxiv.org/abs/2404.18848)."""

from dataclasses import dataclass

import torch
from torch import nn

from fedpeft.methods.lora import LoRA
from fedpeft.methods.parts.exported import PeftForm, adapter_sum, as_lora, lora_sites
from fedpeft.methods.parts.products import A, B
from fedpeft.models.linear import linear_weight
from fedpeft.models.sites import add_by_peft, attention_projections
from fedpeft.state import State


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

    def peft_form(self, model: nn.Module, start: State) -> PeftForm | None:
        """See ``Method.peft_form``.

        The LoRA has rank 2r and takes the start's B A away again, because whoever loads it has the
        whole base weight and not its rest.
        """
        scale, factors = self.alpha / self.rank, {}
        for name, module in lora_sites(model):
            b, a = adapter_sum(module)
            left = torch.cat([b, -scale * start[name + B].to(b.device)], dim=1)
            factors[name] = left, torch.cat([a, start[name + A].to(a.device)])
        return as_lora(model, factors)
