"""Full fine-tuning, averaged: FedAvg of the whole model (https://arxiv.org/abs/1602.05629)."""

from dataclasses import dataclass

from torch import nn

from fedpeft.methods.base import Method
from fedpeft.models.sites import unused


@dataclass(frozen=True)
class Full(Method):
    """Every parameter that the model computes with trains and is shared, in float32."""

    def inject(self, model: nn.Module) -> nn.Module:
        """Let all parameters train that the model computes with.

        Raises:
            ValueError: a weight is quantised, so it cannot train.
        """
        skip = unused(model)
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                raise ValueError(
                    f"{name} of {type(model).__name__} is quantised ({parameter.dtype}) and cannot "
                    "train: set model.load_in=null, or choose a method that only adds to it"
                )
            parameter.requires_grad_(name not in skip)
        return model
