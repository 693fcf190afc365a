"""(IA)3 by HF PEFT: scales of keys, values and MLPs (https://arxiv.org/abs/2205.05638)."""

from dataclasses import dataclass

from peft import IA3Config
from torch import nn

from fedpeft.methods.base import Method
from fedpeft.models.linear import is_transposed
from fedpeft.models.sites import MLP_OUTPUT, add_by_peft, attention_projections, named_sites


@dataclass(frozen=True)
class IA3(Method):
    """Vectors, 1 at the start, that scale k, v and the input of each MLP's second projection.

    A layer's output is linear in them, so their mean is exact. Where q, k and v are one matrix
    (GPT-2, DeBERTa) the scales of q train too, as in PEFT; the paper leaves that case open.
    """

    def inject(self, model: nn.Module) -> nn.Module:
        keys = attention_projections(model, ["k", "v"])
        outputs = named_sites(model, MLP_OUTPUT, "MLP output projection")
        config = IA3Config(
            target_modules=keys + outputs,
            feedforward_modules=outputs,
            fan_in_fan_out=is_transposed(model.get_submodule(outputs[0])),
        )
        add_by_peft(model, default=config)
        return model
