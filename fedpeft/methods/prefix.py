"""Prefix tuning: trained keys and values in every layer (https://arxiv.org/abs/2101.00190)."""

from dataclasses import dataclass
from inspect import signature
from typing import Any

from peft import PrefixTuningConfig
from peft.tuners import PrefixEncoder
from torch import nn

from fedpeft.methods.base import Method
from fedpeft.methods.parts.exported import PeftForm, of_virtual_tokens
from fedpeft.models.sites import freeze_all_but_head, reads_text
from fedpeft.nn.virtual import Prefixed
from fedpeft.state import State


@dataclass(frozen=True)
class Prefix(Method):
    """``num_tokens`` keys and values a layer, their network if any, and the head are shared.

    They are HF PEFT's ``PrefixEncoder``. PEFT's wrapper around the model is not used, because it
    knows no mean-pooled classifier and copies the head. Where a model attends within a window
    (Mistral), a token sees the prefix only within it.

    Args:
        num_tokens: number of keys and values, >= 1.
        projection: compute them by the paper's network (two layers, tanh); if false, they are
            parameters themselves.
        hidden: the network's inner width, >= 1.
    """

    num_tokens: int = 20
    projection: bool = False
    hidden: int = 128

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens must be >= 1, got {self.num_tokens}")
        if self.hidden < 1:
            raise ValueError(f"hidden must be >= 1, got {self.hidden}")

    def inject(self, model: nn.Module) -> nn.Module:
        """Return a ``Prefixed`` around the model.

        Raises:
            ValueError: the model reads images, takes no keys and values from outside, or
                recomputes its blocks for the gradient.
        """
        check_takes_cache(reads_text(model))
        freeze_all_but_head(model)
        config: Any = model.config
        heads = key_value_heads(config)
        width = getattr(config, "head_dim", None)
        width = width or config.hidden_size // config.num_attention_heads
        encoder = PrefixEncoder(
            PrefixTuningConfig(
                num_virtual_tokens=self.num_tokens,
                token_dim=heads * width,
                num_layers=config.num_hidden_layers,
                prefix_projection=self.projection,
                encoder_hidden_size=self.hidden,
            )
        )
        return Prefixed(model, encoder, self.num_tokens, heads, width)

    def peft_form(self, model: nn.Module, start: State) -> PeftForm | None:
        """See ``Method.peft_form``; a network's keys and values are saved as it computes them."""
        assert isinstance(model, Prefixed)
        config = PrefixTuningConfig(
            num_virtual_tokens=self.num_tokens,
            token_dim=model.heads * model.head_dim,
            num_layers=model.config.num_hidden_layers,
            num_attention_heads=model.heads,
        )
        return of_virtual_tokens(config, model.vectors)


def key_value_heads(config: Any) -> int:
    """Return how many heads of keys and values a model caches."""
    if getattr(config, "num_key_value_heads", None):
        return config.num_key_value_heads
    one = getattr(config, "multi_query", False)  # the older Falcon's
    if one and not getattr(config, "new_decoder_architecture", False):
        return 1
    return config.num_attention_heads


def check_takes_cache(model: Any) -> None:
    """Raise ValueError if a model does not take keys and values from outside, or drops them."""
    name, backbone = type(model).__name__, getattr(model, model.base_model_prefix)
    takes = "past_key_values" in signature(backbone.forward).parameters
    if not takes or model.config.is_encoder_decoder:
        raise ValueError(
            f"{name} takes no keys and values from outside, so it can have no prefix: choose "
            "another method, such as method=prompt, or a model such as roberta_base"
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            f"{name} drops keys and values from outside while it recomputes its blocks: set "
            "model.gradient_checkpointing=false, or choose another method"
        )
