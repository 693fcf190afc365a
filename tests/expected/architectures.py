"""Tiny models of every family that the methods know: random weights, and names by hand."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from fedpeft.models.pretrained import MeanPooledClassifier

HIDDEN, WIDTH, HEADS, LAYERS, LABELS = 48, 96, 4, 2, 3
_TEXT: dict[str, Any] = {"vocab_size": 40, "max_position_embeddings": 40, "num_labels": LABELS}
_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BLOCKS: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": WIDTH,
}
_IMAGE: dict[str, Any] = {"image_size": 16, "patch_size": 8}
_CLASSES: dict[str, Any] = {"num_labels": LABELS}


@dataclass(frozen=True)
class Architecture:
    """A tiny classifier and the names of its parts, written down by hand.

    Args:
        build: makes the model; its weights are torch's next draws.
        block: name of block number {i}.
        query, value: attention's projections in a block; equal where they are one matrix.
        attention: attention's output projection in a block.
        mlp: the MLP's second projection in a block.
        head: parameters of the task head.
        dense: the classifier's hidden layer, or "" if it has none.
    """

    build: Callable[[], nn.Module]
    block: str
    query: str
    value: str
    attention: str
    mlp: str
    head: tuple[str, ...]
    dense: str = ""

    def sites(self, *inside: str) -> list[str]:
        """Return the full names of modules in every block, each once."""
        names = [f"{self.block.format(i=i)}.{part}" for i in range(LAYERS) for part in inside]
        return list(dict.fromkeys(names))


def _bert() -> hf.BertConfig:
    return hf.BertConfig(**_BLOCKS, **_TEXT)


def _vision_tower(config: type[Any]) -> Any:
    text = {**_BLOCKS, "num_hidden_layers": 1, "vocab_size": 40, **_SPECIAL}
    return config(vision_config={**_BLOCKS, **_IMAGE}, text_config=text, num_labels=LABELS)


def _dinov2() -> hf.Dinov2Config:
    sizes: dict[str, Any] = {key: _BLOCKS[key] for key in list(_BLOCKS)[:3]}
    ratio = WIDTH // HIDDEN
    return hf.Dinov2Config(**sizes, mlp_ratio=ratio, image_size=32, patch_size=8, **_CLASSES)


def _llama() -> hf.LlamaConfig:
    return hf.LlamaConfig(**_BLOCKS, **_TEXT, **_SPECIAL, num_key_value_heads=2)


def _gpt2() -> hf.GPT2Config:
    sizes = {"n_embd": HIDDEN, "n_inner": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
    return hf.GPT2Config(**sizes, vocab_size=40, n_positions=40, **_CLASSES, **_SPECIAL)


def _distilbert() -> hf.DistilBertConfig:
    sizes: dict[str, Any] = {
        "dim": HIDDEN,
        "hidden_dim": WIDTH,
        "n_layers": LAYERS,
        "n_heads": HEADS,
    }
    return hf.DistilBertConfig(**sizes, **_TEXT)


_OUTPUT = ("classifier.weight", "classifier.bias")
_BERT_BLOCK = {
    "query": "attention.self.query",
    "value": "attention.self.value",
    "attention": "attention.output.dense",
    "mlp": "output.dense",
}
_TOWER = {
    "block": "vision_model.encoder.layers.{i}",
    "query": "self_attn.q_proj",
    "value": "self_attn.v_proj",
    "attention": "self_attn.out_proj",
    "mlp": "mlp.fc2",
}
_LLAMA = {
    "block": "model.layers.{i}",
    "query": "self_attn.q_proj",
    "value": "self_attn.v_proj",
    "attention": "self_attn.o_proj",
    "mlp": "mlp.down_proj",
}

ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(
        lambda: hf.BertForSequenceClassification(_bert()),
        block="bert.encoder.layer.{i}",
        **_BERT_BLOCK,
        head=_OUTPUT,
        dense="bert.pooler.dense",
    ),
    "mean_pooled": Architecture(
        lambda: MeanPooledClassifier(hf.BertModel(_bert())),
        block="backbone.encoder.layer.{i}",
        **_BERT_BLOCK,
        head=_OUTPUT,
    ),
    "roberta": Architecture(
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**_BLOCKS, **_TEXT)),
        block="roberta.encoder.layer.{i}",
        **_BERT_BLOCK,
        head=(
            "classifier.dense.weight",
            "classifier.dense.bias",
            "classifier.out_proj.weight",
            "classifier.out_proj.bias",
        ),
        dense="classifier.dense",
    ),
    "distilbert": Architecture(
        lambda: hf.DistilBertForSequenceClassification(_distilbert()),
        block="distilbert.transformer.layer.{i}",
        query="attention.q_lin",
        value="attention.v_lin",
        attention="attention.out_lin",
        mlp="ffn.lin2",
        head=("pre_classifier.weight", "pre_classifier.bias", *_OUTPUT),
        dense="pre_classifier",
    ),
    "deberta": Architecture(
        lambda: hf.DebertaForSequenceClassification(hf.DebertaConfig(**_BLOCKS, **_TEXT)),
        block="deberta.encoder.layer.{i}",
        **{**_BERT_BLOCK, "query": "attention.self.in_proj", "value": "attention.self.in_proj"},
        head=("pooler.dense.weight", "pooler.dense.bias", *_OUTPUT),
        dense="pooler.dense",
    ),
    "vit": Architecture(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**_BLOCKS, **_IMAGE, **_CLASSES)),
        block="vit.layers.{i}",
        query="attention.q_proj",
        value="attention.v_proj",
        attention="attention.o_proj",
        mlp="mlp.fc2",
        head=_OUTPUT,
    ),
    "dinov2": Architecture(  # its positions are for 32 pixels, and ``inputs`` has 16
        lambda: hf.Dinov2ForImageClassification(_dinov2()),
        block="dinov2.encoder.layer.{i}",
        query="attention.q_proj",
        value="attention.v_proj",
        attention="attention.o_proj",
        mlp="mlp.fc2",
        head=_OUTPUT,
    ),
    "siglip": Architecture(
        lambda: hf.SiglipForImageClassification(_vision_tower(hf.SiglipConfig)),
        **_TOWER,
        head=_OUTPUT,
    ),
    "clip": Architecture(
        lambda: hf.CLIPForImageClassification(_vision_tower(hf.CLIPConfig)),
        **_TOWER,
        head=_OUTPUT,
    ),
    "llama": Architecture(
        lambda: hf.LlamaForSequenceClassification(_llama()), **_LLAMA, head=("score.weight",)
    ),
    "llama_lm": Architecture(lambda: hf.LlamaForCausalLM(_llama()), **_LLAMA, head=()),
    "gpt2": Architecture(
        lambda: hf.GPT2ForSequenceClassification(_gpt2()),
        block="transformer.h.{i}",
        query="attn.c_attn",
        value="attn.c_attn",
        attention="attn.c_proj",
        mlp="mlp.c_proj",
        head=("score.weight",),
    ),
}


def tiny(name: str, seed: int = 0) -> nn.Module:
    """Build a model in eval mode, equal for equal seeds."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return ARCHITECTURES[name].build().eval()


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """Return a batch of two: images for a vision model, else six token ids each."""
    generator = torch.Generator().manual_seed(1)
    if getattr(model, "main_input_name", "") == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, 40, (2, 6), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model: nn.Module) -> Tensor:
    """Compute the model's logits of ``inputs``."""
    return model(**inputs(model)).logits


def trainable(model: nn.Module) -> set[str]:
    """Return the names of the parameters that require a gradient."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# Decoders like Llama: Gemma's heads are wider than its hidden size shared out, Qwen has biases on
# q, k and v, Mistral looks back through a window.
_FAMILIES = {"gemma": "llama_lm", "qwen2": "llama_lm", "mistral": "llama_lm"}
_FEWER: dict[str, int] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), LAYERS),
    **dict.fromkeys(("hidden_size", "n_embd", "dim", "pooler_hidden_size"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "n_inner"), WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), HEADS),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 66),
    "head_dim": 16,
    "sliding_window": 8,
    "vocab_size": 100,
    "image_size": 16,
    "patch_size": 8,
    "mlp_ratio": WIDTH // HIDDEN,
    "projection_dim": 16,
}


def table_of(model_type: str, causal: bool = False, pooled: bool = False) -> Architecture:
    """Return the names of the parts of a published architecture.

    Args:
        model_type: the ``model_type`` of its configuration.
        causal: build a language model, which has no task head.
        pooled: classify the mean of the tokens in place of the model's own classifier.
    """
    name = "mean_pooled" if pooled else _FAMILIES.get(model_type, model_type)
    table = ARCHITECTURES["llama" if name == "llama_lm" and not causal else name]
    return replace(table, head=()) if causal else table


def shrunk(architecture: dict[str, Any]) -> dict[str, Any]:
    """Shrink a published configuration to two blocks of width 48; its other fields stay."""
    heads = architecture.get("num_attention_heads", HEADS)
    small: dict[str, Any] = {}
    for key, value in architecture.items():
        if isinstance(value, dict):
            small[key] = shrunk(value)
        elif key == "num_key_value_heads":  # as many queries share a key as before, at most HEADS
            small[key] = max(1, HEADS * value // heads)
        elif key.endswith("_token_id") and value is not None:
            small[key] = min(value, 2)
        else:
            small[key] = _FEWER.get(key, value)
    return small
