"""What the baselines of the papers train, written down by hand: names of parameters."""

from tests.architectures import Architecture

BASELINES = (
    *("rolora", "full", "bitfit", "adapter", "ia3", "prompt", "p_tuning", "prefix", "fedprompt"),
    *("feddpa", "federa"),
)
PROMPTS = ("prompt", "p_tuning", "fedprompt")
_BERT = ("attention.self.query", "attention.self.key", "attention.self.value")
_DENSE = ("attention.output.dense", "intermediate.dense", "output.dense")
_TOWER = tuple(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")) + ("mlp.fc1", "mlp.fc2")
_OTHERS = {
    "vit": tuple(f"attention.{p}_proj" for p in ("q", "k", "v", "o")) + ("mlp.fc1", "mlp.fc2"),
    "distilbert": tuple(f"attention.{p}_lin" for p in ("q", "k", "v", "out"))
    + ("ffn.lin1", "ffn.lin2"),
    "deberta": ("attention.self.q_", "attention.self.v_", *_DENSE),
    "transformer": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "qwen2": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
}
_NORMS = {  # in a block, and outside
    "vit": (("layernorm_before", "layernorm_after"), ("vit.layernorm",)),
    "siglip": (("layer_norm1", "layer_norm2"), ("vision_model.post_layernorm",)),
    "clip": (("layer_norm1", "layer_norm2"), ("vision_model.pre_layrnorm",)),
    "distilbert": (("sa_layer_norm", "output_layer_norm"), ("distilbert.embeddings.LayerNorm",)),
    "model": (("input_layernorm", "post_attention_layernorm"), ("model.norm",)),
    "transformer": (("ln_1", "ln_2"), ("transformer.ln_f",)),
}


def family(name: str, a: Architecture) -> str:
    """SigLIP's and CLIP's parts are named alike, and Qwen's as Llama's; others go by backbone."""
    return name if name in ("siglip", "clip", "qwen2") else a.block.split(".")[0]


def norm_names(name: str, a: Architecture) -> list[str]:
    """Modules of the LayerNorms that the logits pass."""
    kind = "model" if name == "qwen2" else family(name, a)
    if kind in _NORMS:
        inside, outside = _NORMS[kind]
        return a.sites(*inside) + list(outside)
    inside = ("attention.output.LayerNorm", "output.LayerNorm")
    return [*a.sites(*inside), f"{kind}.embeddings.LayerNorm"]


def bias_names(name: str, a: Architecture) -> set[str]:
    """Biases of the backbone; none in Llama, Gemma, Mistral."""
    kind = family(name, a)
    if kind == "model":
        return set()
    outside = {
        "vit": ["vit.embeddings.patch_embeddings.projection"],
        "siglip": ["vision_model.embeddings.patch_embedding"],
    }.get(kind, ["bert.pooler.dense"] if kind == "bert" else [])
    parts = _OTHERS.get(kind, _TOWER if kind in ("siglip", "clip") else (*_BERT, *_DENSE))
    norms = [] if kind == "qwen2" else norm_names(name, a)
    biases = {f"{module}.bias" for module in [*a.sites(*parts), *norms, *outside]}
    return {n.replace("self.q_.bias", "self.q_bias").replace("v_.bias", "v_bias") for n in biases}


def adapter_names(a: Architecture) -> set[str]:
    """Weights and biases of two adapters a block."""
    sites = a.sites(a.attention, a.mlp)
    parts = [f"adapter.{way}.{kind}" for way in ("down", "up") for kind in ("weight", "bias")]
    return {f"{site}.{part}" for site in sites for part in parts}


def ia3_names(a: Architecture) -> set[str]:
    """Scales at k, v and the MLP's second projection."""
    key = a.query.replace("query", "key").replace("q_proj", "k_proj").replace("q_lin", "k_lin")
    return {f"{site}.ia3_l.default" for site in a.sites(key, a.value, a.mlp)}


def dual_names(a: Architecture, adapter: str) -> set[str]:
    """A and B of one of FedDPA's two adapters."""
    sites = a.sites(a.query, a.value)
    return {f"{site}.lora_{part}.{adapter}.weight" for site in sites for part in "AB"}


def lora_of(a: Architecture, parts: str) -> set[str]:
    """Names of A, of B, or of both."""
    sites = a.sites(a.query, a.value)
    return {f"{site}.lora_{part}.default.weight" for site in sites for part in parts}


def virtual_names(method: str, a: Architecture, words: str) -> set[str]:
    """What computes the virtual tokens, and the head, inside the model around the model.

    Args:
        words: name of the embedding of tokens.
    """
    prompt = f"inner.{words}.prompt"
    layers = [f"{prompt}.mlp_head.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
    own = {
        "prompt": [f"{prompt}.embedding.weight"],
        "p_tuning": [f"{prompt}.embedding.weight", *layers],
        "prefix": ["prefix.embedding.weight"],
    }["prompt" if method == "fedprompt" else method]
    return {*own, *(f"inner.{n}" for n in a.head)}


def word_embeddings(a: Architecture) -> str:
    """Name of the embedding of tokens."""
    backbone = a.block.split(".")[0]
    inside = {"model": "embed_tokens", "transformer": "wte"}
    return f"{backbone}.{inside.get(backbone, 'embeddings.word_embeddings')}"


def refusal(method: str, name: str, a: Architecture) -> str | None:
    """Why a method does not work on an architecture, or None where it does."""
    if method == "bitfit" and not bias_names(name, a):
        return "has no biases in its blocks"
    if method not in (*PROMPTS, "prefix"):
        return None
    if name in ("vit", "siglip", "clip"):
        return "reads images"
    if method == "prefix" and name in ("distilbert", "deberta"):
        return "takes no keys and values from outside"
    return None


def names_by_hand(
    method: str, name: str, a: Architecture, everything: set[str], round: int
) -> tuple[set[str], set[str]]:
    """What trains and is sent in a round, and what trains and stays.

    Args:
        name: the architecture's, as in ``ARCHITECTURES`` or its ``model_type``.
        everything: all names of the model's parameters, which ``full`` trains.
    """
    if method in (*PROMPTS, "prefix"):
        return virtual_names(method, a, word_embeddings(a)), set()
    norms = {n for n in everything if n.rpartition(".")[0] in norm_names(name, a)}
    unused = {"siglip": "vision_model.head.", "clip": "vision_model.post_layernorm."}.get(name, "-")
    head = set(a.head)
    relative = {n for n in everything if n.endswith(".pos_q_proj.bias")}  # DeBERTa-base's
    return {
        "rolora": (lora_of(a, "B" if round % 2 else "A") | head, set()),
        "full": ({n for n in everything if not n.startswith(unused)}, set()),
        "bitfit": (bias_names(name, a) | relative | head, set()),
        "adapter": (adapter_names(a) | norms | head, set()),
        "ia3": (ia3_names(a) | head, set()),
        "feddpa": (dual_names(a, "shared") | head, dual_names(a, "own")),
        "federa": (lora_of(a, "AB") | head, set()),
    }[method]
