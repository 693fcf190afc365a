"""Bottleneck adapters, two a block (Houlsby et al., https://arxiv.org/abs/1902.00751)."""

from dataclasses import dataclass

from torch import nn

from fedpeft.methods.base import Method
from fedpeft.models.linear import check_bottleneck, output_width, replace
from fedpeft.models.sites import (
    ATTENTION_OUTPUT,
    MLP_OUTPUT,
    freeze_all_but_head,
    named_sites,
    train_layernorms,
)
from fedpeft.nn.adapters import ACTIVATIONS, BottleneckAdapter
from fedpeft.nn.tensor_train import AdaptedOutput


@dataclass(frozen=True)
class Adapter(Method):
    """An adapter on the output of each block's attention and MLP; adapters and head are shared.

    The adapters stand before dropout, residual and LayerNorm. HF PEFT has no bottleneck adapter.

    Args:
        bottleneck: inner width, >= 1; the paper tries 8 to 256.
        activation: ``gelu`` or ``relu``; open in the paper.
        train_layernorm: train and share the LayerNorms, as the paper does.
    """

    bottleneck: int = 64
    activation: str = "gelu"
    train_layernorm: bool = True

    def __post_init__(self) -> None:
        if self.bottleneck < 1:
            raise ValueError(f"bottleneck must be >= 1, got {self.bottleneck}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be gelu or relu, got {self.activation}")

    def inject(self, model: nn.Module) -> nn.Module:
        freeze_all_but_head(model)
        sites = named_sites(model, ATTENTION_OUTPUT, "attention output projection")
        sites += named_sites(model, MLP_OUTPUT, "MLP output projection")
        check_bottleneck(model, sites, self.bottleneck)
        for name in sites:
            projection = model.get_submodule(name)
            replace(model, name, AdaptedOutput(projection, self._adapter(projection)))
        if self.train_layernorm:
            train_layernorms(model)
        return model

    def _adapter(self, projection: nn.Module) -> BottleneckAdapter:
        device = next(projection.parameters()).device
        return BottleneckAdapter(output_width(projection), self.bottleneck, self.activation, device)
