"""BitFit: only the biases train (https://arxiv.org/abs/2106.10199)."""

from dataclasses import dataclass

from torch import nn

from fedpeft.methods.base import Method
from fedpeft.models.sites import freeze_all_but_head, head_names, unused


@dataclass(frozen=True)
class BitFit(Method):
    """Every bias of the backbone, the LayerNorms' too, and the head train and are shared.

    DeBERTa's ``q_bias`` and ``v_bias`` are such biases. HF PEFT has no BitFit.
    """

    def inject(self, model: nn.Module) -> nn.Module:
        """Let the biases and the head train.

        Raises:
            ValueError: the backbone has no biases, as Llama's, Gemma's and Mistral's.
        """
        heads, skip = head_names(model), unused(model)
        biases = [
            parameter
            for name, parameter in model.named_parameters()
            if name.endswith("bias") and name.split(".")[0] not in heads and name not in skip
        ]
        if not biases:
            raise ValueError(
                f"{type(model).__name__} has no biases in its blocks, and this method trains "
                "only biases and the head: choose another method, or a model with biases, such as "
                "gpt2"
            )
        freeze_all_but_head(model)
        for parameter in biases:
            parameter.requires_grad_(True)
        return model
