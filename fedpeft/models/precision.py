"""Precision of weights: few bits for frozen ones, float32 for trained ones."""

from collections import Counter
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from fedpeft.models.sites import head_names

# Functions import transformers, because it takes seconds.


def has_gpu() -> bool:
    """Tell whether torch sees a GPU in this process."""
    return torch.cuda.is_available()


def quantisation(load_in: str, model: nn.Module) -> Any:
    """Return the ``BitsAndBytesConfig`` for a model; its task head is not quantised.

    Args:
        load_in: ``8bit``, or ``4bit`` for NF4 (QLoRA, https://arxiv.org/abs/2305.14314).
        model: says which modules are the head; it may be on the meta device.

    Raises:
        ValueError: no GPU, or bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    if not has_gpu():
        raise ValueError(
            f"model.load_in={load_in} needs a GPU, and torch sees none in this process: "
            "set model.load_in=null, or model.dtype=bfloat16 for half the memory"
        )
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"model.load_in={load_in} needs the package bitsandbytes, which is not installed: "
            "install fedpeft with its extra [quantised]"
        )
    skip = head_names(model) or None  # with None, transformers spares a language model's head
    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skip,
    )


def halve_frozen(model: nn.Module) -> nn.Module:
    """Store frozen linear layers in bfloat16, for a model that computes under autocast.

    Results stay the same, because autocast would cast these weights to the same bits in every pass.
    A layer that shares a parameter with another module, such as a language model's head tied to
    the embedding, stays as it is.
    """
    holders = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )
    for module in model.modules():
        if type(module) is nn.Linear:
            parameters = [p for p in module.parameters() if p.dtype == torch.float32]
            if all(not p.requires_grad and holders[id(p)] == 1 for p in parameters):
                for parameter in parameters:
                    parameter.data = parameter.data.bfloat16()
    return model


def train_in_float32(model: nn.Module) -> nn.Module:
    """Make parameters that train float32, because small steps are lost in bfloat16's 8 bits."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model
