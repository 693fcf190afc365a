"""The two forms in which other libraries read a trained method: HF PEFT's, and a plain model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PromptLearningConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fedpeft.models.linear import is_transposed, linear_weight, replace
from fedpeft.models.sites import head_parameters
from fedpeft.nn.scl import CompressedProjection
from fedpeft.state import State

INNER = "base_model.model."  # PEFT's prefix of an adapted model's parameters
PROMPTS = "prompt_embeddings"  # PEFT's name of the virtual tokens' vectors


@dataclass(frozen=True)
class PeftForm:
    """An adapter as HF PEFT saves it, without the task head.

    Attributes:
        config: PEFT's configuration.
        tensors: the adapter's tensors, by their names in PEFT's file.
    """

    config: PeftConfig
    tensors: State


def of_peft_layers(model: Any, start: Mapping[str, Tensor]) -> PeftForm | None:
    """Return the form of a model with one adapter of HF PEFT.

    Args:
        model: transformers model with PEFT's layers in it.
        start: initial values of all parameters that can change.

    Returns:
        Null if the model has no such adapter, or if anything beside it and the task head is no
        longer as it started, because PEFT's file has no place for it.
    """
    configs = getattr(model, "peft_config", {})
    if len(configs) != 1:
        return None
    (adapter, config), head = *configs.items(), head_parameters(model)
    for name, value in start.items():
        known = f".{adapter}." in name or name.endswith(f".{adapter}") or name in head
        if not known and not torch.equal(model.get_parameter(name).detach().cpu(), value):
            return None
    tensors = get_peft_model_state_dict(model, None, adapter, save_embedding_layers=False)
    return PeftForm(config, {INNER + name: value for name, value in tensors.items()})


def as_lora(model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> PeftForm:
    """Return the LoRA that adds B A to the weights of some modules.

    Args:
        model: transformers model.
        factors: B (out, r) and A (r, in) by module, all of one r.
    """
    rank = len(next(iter(factors.values()))[1])
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(factors),
        fan_in_fan_out=any(map(is_transposed, model.modules())),
    )
    tensors: State = {}
    for site, (b, a) in factors.items():
        tensors[f"{INNER}{site}.lora_A.weight"] = a.detach().float().contiguous()
        tensors[f"{INNER}{site}.lora_B.weight"] = b.detach().float().contiguous()
    return PeftForm(config, tensors)


def adapter_sum(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Return B (out, k) and A (k, in), whose product is what a LoRA layer's adapters add.

    An adapter that is switched off is left out.
    """
    assert isinstance(module, LoraLayer)
    scales = {name: scale for name, scale in module.scaling.items() if scale}
    left = [scale * module.lora_B[name].weight for name, scale in scales.items()]  # type: ignore[operator]
    right = [module.lora_A[name].weight for name in scales]
    return torch.cat(left, dim=1), torch.cat(right)  # type: ignore[arg-type]


def lora_sites(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the names and the modules of PEFT's LoRA layers."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def of_virtual_tokens(config: PromptLearningConfig, vectors: Tensor) -> PeftForm:
    """Return the form of virtual tokens, or of a prefix, whose vectors are computed already."""
    return PeftForm(config, {PROMPTS: vectors.detach().float().contiguous()})


@torch.no_grad()
def folded(model: Any) -> nn.Module:
    """Fold changes of weights into the base layers that they are changes of, and return the model.

    A layer is folded if it is HF PEFT's, if it has a ``base_layer`` and the change ``dense()``, or
    if it is a ``CompressedProjection``. All others stay.

    Args:
        model: transformers model with a method in it; changed in place.

    Raises:
        ValueError: a base layer's weight is quantised.
    """
    for name, module in reversed(list(model.named_modules())):  # inner layers first
        if isinstance(module, BaseTunerLayer):
            module.merge()
            replace(model, name, module.get_base_layer())
        elif isinstance(module, CompressedProjection):
            replace(model, name, module.folded())
        elif hasattr(module, "base_layer") and hasattr(module, "dense"):
            weight, _, transposed = linear_weight(module.base_layer)
            change: Tensor = module.dense().to(weight.device)
            weight.add_((change.T if transposed else change).to(weight.dtype))
            replace(model, name, module.base_layer)
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model
