"""Names of the parameters that methods train, written down by hand for any architecture."""

from collections.abc import Iterable
from dataclasses import dataclass

from tests.expected.architectures import Architecture

PROMPTS = ("prompt", "p_tuning", "fedprompt")
# Axes of the tensor trains of FedTT's adapters (48x64 and 64x48) and of the classifier (48x48).
ADAPTER_AXES, CLASSIFIER_AXES = 4, 4
_BERT = ("attention.self.query", "attention.self.key", "attention.self.value")
_DENSE = ("attention.output.dense", "intermediate.dense", "output.dense")
_TOWER = tuple(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")) + ("mlp.fc1", "mlp.fc2")
_WITH_BIAS = {  # modules of a block, by family, that have a bias
    "vit": tuple(f"attention.{p}_proj" for p in ("q", "k", "v", "o")) + ("mlp.fc1", "mlp.fc2"),
    "dinov2": tuple(f"attention.{p}_proj" for p in ("q", "k", "v", "o")) + ("mlp.fc1", "mlp.fc2"),
    "distilbert": tuple(f"attention.{p}_lin" for p in ("q", "k", "v", "out"))
    + ("ffn.lin1", "ffn.lin2"),
    "deberta": ("attention.self.q_", "attention.self.v_", *_DENSE),
    "transformer": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "qwen2": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
}
_NORMS = {  # names in a block, and outside
    "vit": (("layernorm_before", "layernorm_after"), ("vit.layernorm",)),
    "dinov2": (("norm1", "norm2"), ("dinov2.layernorm",)),
    "siglip": (("layer_norm1", "layer_norm2"), ("vision_model.post_layernorm",)),
    "clip": (("layer_norm1", "layer_norm2"), ("vision_model.pre_layrnorm",)),
    "distilbert": (("sa_layer_norm", "output_layer_norm"), ("distilbert.embeddings.LayerNorm",)),
    "model": (("input_layernorm", "post_attention_layernorm"), ("model.norm",)),
    "transformer": (("ln_1", "ln_2"), ("transformer.ln_f",)),
}
_MLP_INPUTS = {  # by the end of the name of an MLP's second projection: the ends of the first ones
    "output.dense": ["intermediate.dense"],
    "fc2": ["fc1"],
    "lin2": ["lin1"],
    "down_proj": ["gate_proj", "up_proj"],
    "c_proj": ["c_fc"],
}


@dataclass(frozen=True)
class Case:
    """A model with a method's parameters, and the round for which they are named.

    Attributes:
        kind: the architecture, as in ``ARCHITECTURES`` or by its ``model_type``.
        parts: names of the model's parts.
        everything: names of all parameters.
        round: number of the round.
    """

    kind: str
    parts: Architecture
    everything: set[str]
    round: int

    @property
    def head(self) -> set[str]:
        """Parameters of the task head."""
        return set(self.parts.head)


# --- LoRA and its relatives ----------------------------------------------------------------------


def lora_names(a: Architecture, factors: str = "AB", adapter: str = "default") -> set[str]:
    """Return the names of LoRA's A, of its B, or of both, on queries and values.

    Args:
        a: names of the model's parts.
        factors: ``A``, ``B`` or ``AB``.
        adapter: PEFT's name of the adapter.
    """
    sites = a.sites(a.query, a.value)
    return {f"{site}.lora_{factor}.{adapter}.weight" for site in sites for factor in factors}


def magnitude_names(a: Architecture) -> set[str]:
    """Return the names of DoRA's magnitudes, one vector a module."""
    sites = a.sites(a.query, a.value)
    return {f"{site}.lora_magnitude_vector.default.weight" for site in sites}


def core_names(a: Architecture, *parts: str) -> set[str]:
    """Return the names of Fed-SB's or RAVAN's ``core`` and ``scales``."""
    return {f"{site}.{part}" for site in a.sites(a.query, a.value) for part in parts}


def value_names(a: Architecture) -> set[str]:
    """Return the names of SLoRA's sparse values."""
    return {f"{site}.base_layer.values" for site in a.sites(a.query, a.value)}


def base_names(a: Architecture) -> set[str]:
    """Return the names of the weights below LoRA's factors."""
    return {f"{site}.base_layer.weight" for site in a.sites(a.query, a.value)}


# --- MLPs and tensor trains ----------------------------------------------------------------------


def mlp_names(a: Architecture) -> set[str]:
    """Return the names of the weights of all matrices of the MLPs."""
    end = next(end for end in _MLP_INPUTS if a.mlp.endswith(end))
    names = [a.mlp, *(a.mlp.removesuffix(end) + name for name in _MLP_INPUTS[end])]
    return {f"{site}.weight" for site in a.sites(*names)}


def scl_names(a: Architecture) -> set[str]:
    """Return the names of SCL's C and W2'."""
    return {f"{site}.{part}" for site in a.sites(a.mlp) for part in ("compress", "project")}


def trains(a: Architecture) -> dict[str, int]:
    """Return the names of all tensor trains and their numbers of axes."""
    sites = a.sites(a.attention, a.mlp)
    adapters = {f"{s}.adapter.{way}": ADAPTER_AXES for s in sites for way in ("down", "up")}
    return adapters | ({a.dense: CLASSIFIER_AXES} if a.dense else {})


def factor_names(a: Architecture, numbers: Iterable[int] = range(1, 9)) -> set[str]:
    """Return the names of the factors with these numbers, of every tensor train."""
    wanted = set(numbers)
    return {
        f"{train}.factor_{j}_of_{count}"
        for train, count in trains(a).items()
        for j in range(1, count + 1)
        if j in wanted
    }


def train_bias_names(a: Architecture) -> set[str]:
    """Return the names of the biases of all tensor trains."""
    return {f"{train}.bias" for train in trains(a)}


def output_head(a: Architecture) -> set[str]:
    """Return the names of the head without the hidden layer that FedTT makes a tensor train."""
    return {n for n in a.head if not (a.dense and n.startswith(a.dense + "."))}


# --- the baselines of the papers -----------------------------------------------------------------


def family(kind: str, a: Architecture) -> str:
    """Return the backbone's name, or the kind where two families' parts are named alike.

    SigLIP's parts are named as CLIP's, and Qwen's as Llama's.
    """
    return kind if kind in ("siglip", "clip", "qwen2") else a.block.split(".")[0]


def norm_modules(kind: str, a: Architecture) -> list[str]:
    """Return the names of the LayerNorms that the logits pass."""
    name = "model" if kind == "qwen2" else family(kind, a)
    if name in _NORMS:
        inside, outside = _NORMS[name]
        return a.sites(*inside) + list(outside)
    inside = ("attention.output.LayerNorm", "output.LayerNorm")
    return [*a.sites(*inside), f"{name}.embeddings.LayerNorm"]


def norm_names(case: Case) -> set[str]:
    """Return the names of the LayerNorms' parameters."""
    modules = norm_modules(case.kind, case.parts)
    return {n for n in case.everything if n.rpartition(".")[0] in modules}


def bias_names(kind: str, a: Architecture) -> set[str]:
    """Return the names of the backbone's biases; Llama, Gemma and Mistral have none."""
    name = family(kind, a)
    if name == "model":
        return set()
    outside = {
        "vit": ["vit.embeddings.patch_embeddings.projection"],
        "dinov2": ["dinov2.embeddings.patch_embeddings.projection"],
        "siglip": ["vision_model.embeddings.patch_embedding"],
    }.get(name, ["bert.pooler.dense"] if name == "bert" else [])
    inside = _WITH_BIAS.get(name, _TOWER if name in ("siglip", "clip") else (*_BERT, *_DENSE))
    norms = [] if name == "qwen2" else norm_modules(kind, a)
    biases = {f"{module}.bias" for module in [*a.sites(*inside), *norms, *outside]}
    return {n.replace("self.q_.bias", "self.q_bias").replace("v_.bias", "v_bias") for n in biases}


def position_bias_names(case: Case) -> set[str]:
    """Return the names of the biases of DeBERTa-base's relative positions."""
    return {n for n in case.everything if n.endswith(".pos_q_proj.bias")}


def used_names(case: Case) -> set[str]:
    """Return the names of all parameters on which the logits depend."""
    unused = {
        "siglip": "vision_model.head.",
        "clip": "vision_model.post_layernorm.",
        "dinov2": "dinov2.embeddings.mask_token",
    }
    return {n for n in case.everything if not n.startswith(unused.get(case.kind, "-"))}


def adapter_names(a: Architecture) -> set[str]:
    """Return the names of the weights and biases of two adapters a block."""
    sites = a.sites(a.attention, a.mlp)
    ends = [f"adapter.{way}.{kind}" for way in ("down", "up") for kind in ("weight", "bias")]
    return {f"{site}.{end}" for site in sites for end in ends}


def ia3_names(a: Architecture) -> set[str]:
    """Return the names of the scales at keys, values and the MLP's second projection."""
    key = a.query.replace("query", "key").replace("q_proj", "k_proj").replace("q_lin", "k_lin")
    return {f"{site}.ia3_l.default" for site in a.sites(key, a.value, a.mlp)}


def virtual_names(method: str, a: Architecture) -> set[str]:
    """Return the names of the network that computes the virtual tokens, and of the head.

    Both stand inside the model around the model, so the head's names begin with ``inner``.
    """
    prompt = f"inner.{word_embeddings(a)}.prompt"
    layers = [f"{prompt}.mlp_head.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
    network = {
        "prompt": [f"{prompt}.embedding.weight"],
        "p_tuning": [f"{prompt}.embedding.weight", *layers],
        "prefix": ["prefix.embedding.weight"],
    }[method]
    return {*network, *(f"inner.{n}" for n in a.head)}


def word_embeddings(a: Architecture) -> str:
    """Return the name of the embedding of tokens."""
    backbone = a.block.split(".")[0]
    inside = {"model": "embed_tokens", "transformer": "wte"}
    return f"{backbone}.{inside.get(backbone, 'embeddings.word_embeddings')}"


def refusal(method: str, kind: str, a: Architecture) -> str | None:
    """Return the reason why a method does not work on an architecture; null where it does."""
    if method == "bitfit" and not bias_names(kind, a):
        return "has no biases in its blocks"
    if method not in (*PROMPTS, "prefix"):
        return None
    if kind in ("vit", "dinov2", "siglip", "clip"):
        return "reads images"
    if method == "prefix" and kind in ("distilbert", "deberta"):
        return "takes no keys and values from outside"
    return None
