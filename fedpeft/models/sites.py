"""The modules of a transformers model where methods put their parameters."""

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig, inject_adapter_in_model
from torch import nn

from fedpeft.models.architectures import writes_text
from fedpeft.models.linear import is_linear

# Module names end alike within a family: BERT/RoBERTa/DeBERTa/older ViT, SigLIP/CLIP/DINOv2/newer
# ViT, DistilBERT, Llama/Gemma/Qwen/Mistral, GPT-2; then ALBERT, GPT-NeoX/Falcon/BLOOM,
# GPT-J/CodeGen, OPT, ModernBERT, MPT, and MPNet's attention. SigLIP's pooling head has such names
# but is no block.
MLP_OUTPUT = re.compile(
    r"(?:(?<!attention)\.output\.dense|(?<!\.head)\.mlp\.fc2|"
    r"\.ffn\.lin2|\.mlp\.down_proj|\.mlp\.c_proj|"
    r"\.ffn_output|\.mlp\.dense_4h_to_h|\.mlp\.fc_out|layers\.\d+\.fc2|\.mlp\.Wo|"
    r"\.ffn\.down_proj)$"
)
MLP_INPUT = re.compile(
    r"(?:\.intermediate\.dense|(?<!\.head)\.mlp\.fc1|"
    r"\.ffn\.lin1|\.mlp\.(?:gate|up)_proj|\.mlp\.c_fc|"
    r"layers\.\d+\.ffn|\.mlp\.dense_h_to_4h|\.mlp\.fc_in|layers\.\d+\.fc1|\.mlp\.Wi|"
    r"\.ffn\.up_proj|\.mlp\.gate_up_proj)$"
)
ATTENTION_OUTPUT = re.compile(
    r"(?:attention\.output\.dense|(?<!\.head)\.(?:self_attn|self_attention|attn|attention)\."
    r"(?:out_proj|o_proj|out_lin|c_proj|dense|Wo|o))$"
)
PROJECTIONS = {
    "q": ("query", "q_proj", "q_lin", "query_proj", "attn.q", "SelfAttention.q"),
    "k": ("key", "k_proj", "k_lin", "key_proj", "attn.k", "SelfAttention.k"),
    "v": ("value", "v_proj", "v_lin", "value_proj", "attn.v", "SelfAttention.v"),
}
# One matrix for q, k and v: GPT-2, DeBERTa, GPT-NeoX/Falcon/BLOOM, Phi-3/CodeGen, ModernBERT/MPT.
FUSED_PROJECTIONS = ("c_attn", "in_proj", "query_key_value", "qkv_proj", "Wqkv")
ADD_IN_PLACE = {"falcon"}  # model types whose blocks add to their layers' outputs in place
# Name prefixes of parts of image classifiers that transformers builds but logits do not depend on.
UNUSED = {
    "SiglipForImageClassification": "vision_model.head.",
    "CLIPForImageClassification": "vision_model.post_layernorm.",
    "Dinov2ForImageClassification": "dinov2.embeddings.mask_token",
}


def head_names(model: nn.Module) -> list[str]:
    """Return the names of a model's children outside its backbone, which are the task head.

    A model with output embeddings has none, because a language model's head is pretrained.
    """
    prefix = getattr(model, "base_model_prefix", "")
    if getattr(model, "get_output_embeddings", lambda: None)() is not None:
        return []
    return [
        name
        for name, child in model.named_children()
        if name != prefix
        and not hasattr(child, "base_model_prefix")  # SigLIP's and CLIP's vision_model
        and any(True for _ in child.parameters())
    ]


def head_parameters(model: nn.Module) -> set[str]:
    """Return the task head's parameter names, also inside a wrapper such as ``Prompted``."""
    inner = getattr(model, "inner", None)
    prefix, owner = ("inner.", inner) if isinstance(inner, nn.Module) else ("", model)
    return {
        f"{prefix}{head}.{name}"
        for head in head_names(owner)
        for name, _ in owner.get_submodule(head).named_parameters()
    }


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return by name the outermost lists of modules with attention in every entry."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not _inside(name, lists):
            names = [
                [f"{i}.{n}" for n, _ in block.named_modules()] for i, block in enumerate(module)
            ]
            if all(any(ATTENTION_OUTPUT.search(n) for n in part) for part in names):
                lists[name] = module
    return lists


def _inside(name: str, outer: Iterable[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in outer)


def chosen_blocks(layers: str | Sequence[int], count: int) -> list[int]:
    """Return the numbers, from 0, of the blocks that ``layers`` chooses.

    Args:
        layers: ``all``, ``first:N``, ``last:N``, or a list of numbers, where -1 is the last block.
        count: number of the model's blocks.

    Raises:
        ValueError: the model has no such block, or ``layers`` is another text.
    """
    if layers == "all":
        return list(range(count))
    if isinstance(layers, str):
        way, _, number = layers.partition(":")
        if way not in ("first", "last") or not number.isdigit() or not 1 <= int(number) <= count:
            raise ValueError(
                f"layers must be all, first:N, last:N with N from 1 to {count}, or a list of "
                f"numbers, got {layers}"
            )
        wanted = range(int(number)) if way == "first" else range(count - int(number), count)
        return list(wanted)
    for layer in layers:
        if not -count <= layer < count:
            raise ValueError(f"layers must be from {-count} to {count - 1} here, got {layer}")
    return sorted({layer % count for layer in layers})


@contextmanager
def hidden_blocks(model: nn.Module, layers: str | Sequence[int]) -> Iterator[list[str]]:
    """Hide the blocks that ``layers`` does not choose, so that a method cannot touch them.

    Inside the context, identities stand in their places. Afterwards they are back and frozen.

    Args:
        model: changed in place.
        layers: see ``chosen_blocks``.

    Yields:
        Names of the chosen blocks.

    Raises:
        ValueError: the architecture's blocks are not known here, or the model has no such block.
    """
    lists = block_lists(model)
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no blocks that are known here: set layers=all"
        )
    hidden: list[tuple[nn.ModuleList, int, nn.Module]] = []
    chosen: list[str] = []
    for name, blocks in lists.items():
        wanted = chosen_blocks(layers, len(blocks))
        chosen += [f"{name}.{i}" for i in wanted]
        hidden += [(blocks, i, blocks[i]) for i in range(len(blocks)) if i not in wanted]
    for blocks, i, _ in hidden:
        blocks[i] = nn.Identity()
    try:
        yield chosen
    finally:
        for blocks, i, block in hidden:
            block.requires_grad_(False)
            blocks[i] = block


def freeze_all_but_head(model: nn.Module) -> None:
    """Set ``requires_grad`` on the task head alone."""
    model.requires_grad_(False)
    for name in head_names(model):
        model.get_submodule(name).requires_grad_(True)


def unused(model: nn.Module) -> set[str]:
    """Return the names of parameters that the model's logits do not depend on."""
    prefix = UNUSED.get(type(model).__name__)
    names = [name for name, _ in model.named_parameters()]
    return set() if prefix is None else {name for name in names if name.startswith(prefix)}


def train_layernorms(model: nn.Module) -> None:
    """Set ``requires_grad`` on every LayerNorm and RMSNorm that the logits depend on."""
    skip = unused(model)
    for path, module in model.named_modules():
        if "norm" in type(module).__name__.lower():
            for name, parameter in module.named_parameters(path):
                parameter.requires_grad_(name not in skip)


def add_by_peft(model: nn.Module, **adapters: PeftConfig) -> None:
    """Add HF PEFT's layers to the model; they and the task head train.

    Args:
        model: changed in place.
        adapters: PEFT's configurations by adapter name.
    """
    freeze_all_but_head(model)
    head = [p for p in model.parameters() if p.requires_grad]
    with warnings.catch_warnings():  # PEFT warns of a second adapter, which is meant
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        for name, config in adapters.items():
            inject_adapter_in_model(config, model, name)
    for parameter in head:  # PEFT froze all but its adapters
        parameter.requires_grad_(True)


def named_sites(model: nn.Module, pattern: re.Pattern[str], kind: str) -> list[str]:
    """Return the names of modules that match a pattern and have a weight.

    Args:
        model: a transformers model.
        pattern: searched in the modules' full names.
        kind: says in the error what is searched.

    Raises:
        ValueError: no module matches.
    """
    names = [
        name
        for name, module in model.named_modules()
        if pattern.search(name) and getattr(module, "weight", None) is not None
    ]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no {kind} that is known here, {linear_names(model)}: "
            "choose a method with targets, such as method=lora, and name some of them"
        )
    return names


def linear_names(model: nn.Module) -> str:
    """Say in the middle of a sentence how a model's linear modules are named, without the head's.

    Only the last part of a name counts, because it is the same in every block.
    """
    heads = head_names(model)
    ends = {
        name.rpartition(".")[2]: None
        for name, module in model.named_modules()
        if is_linear(module) and name.partition(".")[0] not in (*heads, "lm_head")
    }
    return f"its linear modules are named {', '.join(ends)}" if ends else "it has no linear modules"


def attention_projections(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """Return the full names of the modules that ``targets`` mean.

    Args:
        model: a transformers model.
        targets: ``q``, ``k``, ``v``, ``o``, or ends of module names. Where one matrix computes q, k
            and v together, each of the three means that matrix.

    Raises:
        ValueError: a target matches no module.
    """
    weighted = [n for n, m in model.named_modules() if getattr(m, "weight", None) is not None]
    sites: list[str] = []
    for target in targets:
        endings = PROJECTIONS.get(target, (target,))
        matches = [n for n in weighted if any(n.endswith("." + e) or n == e for e in endings)]
        if target == "o":
            matches = [n for n in weighted if ATTENTION_OUTPUT.search(n)]
        elif not matches and target in PROJECTIONS:
            matches = [n for n in weighted if n.endswith(FUSED_PROJECTIONS)]
        if not matches:
            raise ValueError(
                f"target {target} matches no module of {type(model).__name__}, "
                f"{linear_names(model)}"
            )
        sites += [name for name in matches if name not in sites]
    return sites


def reads_text(model: nn.Module) -> nn.Module:
    """Return the model if it reads text.

    Raises:
        ValueError: the model reads images.
    """
    if getattr(model, "main_input_name", "") == "pixel_values":
        raise ValueError(
            f"{type(model).__name__} reads images, and this method puts virtual tokens before a "
            "text: choose another method, such as method=lora"
        )
    return model


def reads_last_token(model: nn.Module) -> bool:
    """Tell whether a text model's head reads each row's last token, as a decoder's does.

    Such a model looks for that token among the ids, so it needs them and not only their vectors.
    """
    return bool(head_names(model)) and writes_text(model.config)


def word_embedding(model: nn.Module) -> nn.Embedding:
    """Return the embedding of a text model's tokens."""
    owner: Any = getattr(model, "backbone", model)
    return owner.get_input_embeddings()
