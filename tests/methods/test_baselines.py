"""The baselines of the papers: the parameters that they train, and their arithmetic."""

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import GenerationConfig

from fedpeft.config.load import load_config
from fedpeft.engine.cpu import checkpoint_blocks
from fedpeft.methods.adapter import Adapter
from fedpeft.methods.base import At, Method
from fedpeft.methods.bitfit import BitFit
from fedpeft.methods.feddpa import FedDPA
from fedpeft.methods.federa import FeDeRA
from fedpeft.methods.full import Full
from fedpeft.methods.ia3 import IA3
from fedpeft.methods.p_tuning import PTuning
from fedpeft.methods.prefix import Prefix
from fedpeft.methods.prompt import Prompt
from fedpeft.methods.rolora import RoLoRA
from fedpeft.models.precision import train_in_float32
from fedpeft.nn.adapters import BottleneckAdapter
from fedpeft.nn.virtual import Prefixed, Prompted
from fedpeft.seeding import torch_seed
from fedpeft.state import Role
from tests.conftest import Runner
from tests.expected.architectures import (
    ARCHITECTURES,
    HIDDEN,
    LAYERS,
    inputs,
    logits,
    tiny,
    trainable,
)
from tests.expected.methods import EXPECTED
from tests.expected.names import PROMPTS, Case, refusal

BASELINES = (
    *("rolora", "full", "bitfit", "adapter", "ia3", "prompt", "p_tuning", "prefix", "fedprompt"),
    *("feddpa", "federa"),
)
every_architecture = pytest.mark.parametrize("name", list(ARCHITECTURES))
TEXTS = [n for n in ARCHITECTURES if n not in ("vit", "dinov2", "siglip", "clip")]
DECODERS = ["llama", "llama_lm", "gpt2"]
PADDED = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 0, 0]])


def method_of(name: str) -> Method:
    return load_config([f"method={name}"]).method


def injected(method: Method, name: str, seed: int = 0) -> Any:
    with torch_seed(seed, "method"):
        return method.inject(tiny(name)).eval()


@pytest.mark.matrix
@every_architecture
@pytest.mark.parametrize("method", BASELINES)
def test_roles(method: str, name: str) -> None:
    """The names by hand are those that the loss reaches and that the roles send or keep."""
    a, chosen = ARCHITECTURES[name], method_of(method)
    reason = refusal(method, name, a)
    if reason is not None:
        with pytest.raises(ValueError, match=f"^{type(tiny(name)).__name__} .*{reason}"):
            injected(chosen, name)
        return
    model = injected(chosen, name)
    names = trainable(model)
    model(**inputs(tiny(name))).logits.square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == names
    everything = {n for n, _ in model.named_parameters()}
    ever: set[str] = set()
    for round in range(1, 5):
        shared, personal = EXPECTED[method].names(Case(name, a, everything, round))
        assert {n for n in names if chosen.role(n, At(round)) is Role.SHARED} == shared
        assert {n for n in names if chosen.role(n, At(round)) is Role.PERSONAL} == personal
        ever |= shared | personal
    assert names == ever


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("method", BASELINES)
def test_a_seeded_injection_is_the_same_everywhere(method: str, name: str) -> None:
    first = dict(injected(method_of(method), name).named_parameters())
    torch.manual_seed(1234)  # another client's state must not matter
    second = dict(injected(method_of(method), name).named_parameters())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)
    other = dict(injected(method_of(method), name, seed=1).named_parameters())
    drawn = [n for n in first if n.endswith((".down.weight", "embedding.weight"))]
    drawn = [n for n in drawn if ".prompt." in n or "prefix." in n or "adapter." in n]
    assert not any(torch.equal(first[n], other[n]) for n in drawn)
    assert bool(drawn) == (method in ("adapter", "prefix", *PROMPTS))


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["roberta", "deberta", "gpt2", "siglip", "llama"])
@pytest.mark.parametrize(
    "method", ["rolora", "full", "bitfit", "adapter", "ia3", "feddpa", "federa"]
)
def test_methods_that_start_as_the_pretrained_model(method: str, name: str) -> None:
    if refusal(method, name, ARCHITECTURES[name]) is not None:
        return
    expected = logits(tiny(name)).detach()
    start = logits(injected(method_of(method), name)).detach()
    torch.testing.assert_close(start, expected, rtol=1e-4, atol=1e-5)


HYPERPARAMETERS: list[tuple[type[Method], dict[str, Any], str]] = [
    (RoLoRA, {"rank": 0}, "rank must be >= 1, got 0"),
    (Adapter, {"bottleneck": 0}, "bottleneck must be >= 1, got 0"),
    (Adapter, {"activation": "tanh"}, "activation must be gelu or relu, got tanh"),
    (Prompt, {"num_tokens": 0}, "num_tokens must be >= 1, got 0"),
    (Prompt, {"init": "text"}, "init must be vocabulary or normal, got text"),
    (PTuning, {"num_tokens": 0}, "num_tokens must be >= 1, got 0"),
    (PTuning, {"encoder": "gru"}, "encoder must be mlp or lstm, got gru"),
    (PTuning, {"hidden": 0}, "hidden must be >= 1, got 0"),
    (Prefix, {"num_tokens": -1}, "num_tokens must be >= 1, got -1"),
    (Prefix, {"hidden": 0}, "hidden must be >= 1, got 0"),
    (FedDPA, {"rank": 0}, "rank must be >= 1, got 0"),
    (FedDPA, {"local_weight": 1.0}, r"local_weight must be in \(0, 1\), got 1.0"),
    (FedDPA, {"local_weight": 0.0}, r"local_weight must be in \(0, 1\), got 0.0"),
    (FeDeRA, {"alpha": 0.0}, "alpha must be > 0, got 0.0"),
]


@pytest.mark.parametrize(("cls", "fields", "message"), HYPERPARAMETERS)
def test_hyperparameters_are_checked(
    cls: type[Method], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**fields)


# --- one by one --------------------------------------------------------------------------------


def test_rolora_alternates() -> None:
    a, b = "x.lora_A.default.weight", "x.lora_B.default.weight"
    assert [RoLoRA().role(a, At(t)) for t in (1, 2, 3)] == [Role.FROZEN, Role.SHARED, Role.FROZEN]
    assert [RoLoRA().role(b, At(t)) for t in (1, 2, 3)] == [Role.SHARED, Role.FROZEN, Role.SHARED]
    assert (
        RoLoRA().role("classifier.weight", At(1))
        is RoLoRA().role("score.weight", At(2))
        is Role.SHARED
    )


def test_full_trains_float32_on_a_bfloat16_base() -> None:
    model = train_in_float32(Full().inject(tiny("llama_lm").to(torch.bfloat16)))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(model).isfinite().all()


def test_full_refuses_quantised_weights() -> None:
    model = tiny("llama")
    layer: Any = model.get_submodule("model.layers.1.mlp.up_proj")
    layer.weight = nn.Parameter(torch.ones(96, 48, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight of LlamaForSeq.* quantised"):
        Full().inject(model)


def test_bitfit_of_qwen_trains_its_q_k_and_v_biases() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 40}
    heads: dict[str, Any] = {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    names = trainable(BitFit().inject(Qwen2ForCausalLM(Qwen2Config(**sizes, **heads))))
    assert names == {f"model.layers.0.self_attn.{p}_proj.bias" for p in "qkv"}


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_an_adapter_by_hand(activation: str) -> None:
    """x = (1, -2), down (1, 1): -1; up (2, 3) adds 2 and 3 times its activation."""
    adapter = BottleneckAdapter(2, 1, activation)
    assert adapter.down.weight.abs().max() <= 0.02 and not adapter.up.weight.any()
    x = torch.tensor([[1.0, -2.0]])
    assert torch.equal(adapter(x), x)
    with torch.no_grad():
        adapter.down.weight.copy_(torch.tensor([[1.0, 1.0]]))
        adapter.up.weight.copy_(torch.tensor([[2.0], [3.0]]))
        adapter.up.bias.copy_(torch.tensor([0.5, 0.0]))
    inner = 0.0 if activation == "relu" else -0.5 * (1 + math.erf(-1 / 2**0.5))
    expected = torch.tensor([[1 + 2 * inner + 0.5, -2 + 3 * inner]])
    torch.testing.assert_close(adapter(x), expected)


def test_the_adapters_activation_is_a_choice() -> None:
    outputs = []
    for activation in ("gelu", "relu"):
        model = injected(Adapter(activation=activation), "bert")
        torch.manual_seed(0)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, BottleneckAdapter):
                    module.up.weight.normal_()
                    module.down.weight.mul_(50)
        outputs.append(logits(model))
    assert not torch.allclose(outputs[0], outputs[1])


def test_adapters_without_layernorms() -> None:
    less = trainable(injected(Adapter(train_layernorm=False), "bert"))
    more = trainable(injected(Adapter(), "bert"))
    assert len(more - less) == 2 * (1 + 2 * LAYERS) and less < more
    assert all("LayerNorm" in n for n in more - less)


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_ia3_scales_keys_values_and_the_mlp_s_inside(name: str) -> None:
    """Equal to scaling the rows of W_k and W_v with their biases, and the columns of W_2."""
    a, plain, model = ARCHITECTURES[name], tiny(name), injected(IA3(), name)
    torch.manual_seed(1)
    with torch.no_grad():
        for path, scale in model.named_parameters():
            if ".ia3_l." not in path:
                continue
            assert torch.equal(scale, torch.ones_like(scale))
            scale.add_(0.5 * torch.randn_like(scale))
            site: Any = plain.get_submodule(path.split(".ia3_l.")[0])
            factor = scale.flatten()
            inside = path.split(".ia3_l.")[0] in a.sites(a.mlp)
            columns = name == "gpt2"  # Conv1D holds W transposed
            if inside == columns:
                site.weight.mul_(factor.unsqueeze(1))
            else:
                site.weight.mul_(factor)
            if not inside:
                site.bias.mul_(factor)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)


def moved(method: Method, name: str) -> Any:
    """Return a model with the method's parameters and every factor of a LoRA away from zero."""
    model = injected(method, name)
    torch.manual_seed(2)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if ".lora_" in path:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", ["roberta", "llama", "gpt2"])
def test_feddpa_adds_both_by_their_weights(name: str) -> None:
    method = FedDPA(rank=4, alpha=24.0, local_weight=0.25)
    layers = [m for m in moved(method, name).modules() if isinstance(m, LoraLayer)]
    assert len(layers) == LAYERS * (1 if name == "gpt2" else 2)
    for layer in layers:
        assert isinstance(layer, nn.Module)
        x = torch.randn(3, HIDDEN)
        parts = {
            n: layer.lora_B[n].weight @ layer.lora_A[n].weight  # type: ignore[operator]
            for n in ("shared", "own")
        }
        expected = x @ (6 * 0.75 * parts["shared"] + 6 * 0.25 * parts["own"]).T
        torch.testing.assert_close(layer(x) - layer.get_base_layer()(x), expected)
        effective = method.effective(layer)
        assert effective is not None
        torch.testing.assert_close(effective, 6 * 0.75 * parts["shared"])
    assert method.effective(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("name", ["roberta", "llama", "gpt2"])
def test_federa_holds_the_largest_components(name: str) -> None:
    """(alpha/r) B A is the best approximation of W of rank r; W0 has no more of them."""
    method, a, plain = FeDeRA(rank=4, alpha=24.0), ARCHITECTURES[name], tiny(name)
    model = injected(method, name)
    for site in a.sites(a.query, a.value):
        weight: Any = plain.get_submodule(site).weight
        weight = weight.T if name == "gpt2" else weight
        u, s, v = torch.linalg.svd(weight.detach())
        layer: Any = model.get_submodule(site)
        product = method.effective(layer)
        assert product is not None
        best = u[:, :4] @ torch.diag(s[:4]) @ v[:4]
        torch.testing.assert_close(product.detach(), best, rtol=1e-4, atol=1e-6)
        rest = layer.base_layer.weight.detach()
        assert torch.linalg.matrix_norm(rest, 2) == pytest.approx(float(s[4]), rel=1e-3)


PRINT = """
import torch
torch.set_num_threads(1)
from fedpeft.methods.federa import FeDeRA
from fedpeft.seeding import torch_seed
from fedpeft.state import sha256
from tests.expected.architectures import tiny
torch.manual_seed({seed})
with torch_seed(0, "method"):
    model = FeDeRA().inject(tiny("{name}"))
print(sha256(model.state_dict()))
"""


@pytest.mark.slow
def test_federa_is_the_same_bit_for_bit_in_every_process() -> None:
    """Each process computes the frozen weights for itself, because nothing sends them."""
    command = [sys.executable, "-W", "ignore", "-c"]
    hashes = {
        subprocess.run(
            [*command, PRINT.format(seed=seed, name="gpt2")],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in (1, 2)
    }
    assert len(hashes) == 1 and len(hashes.pop().strip()) == 64


def test_federa_refuses_quantised_weights() -> None:
    model = tiny("llama")
    layer: Any = model.get_submodule("model.layers.0.self_attn.q_proj")
    layer.weight = nn.Parameter(torch.ones(48, 48, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="holds quantised weights"):
        FeDeRA().inject(model)


# --- virtual tokens ----------------------------------------------------------------------------

FIRST = torch.tensor([21, 22, 23])  # stand in for virtual tokens


def prompted(name: str) -> tuple[Prompted, nn.Module]:
    """Return a model whose virtual tokens are FIRST's embeddings, and the model without them."""
    plain: Any = tiny(name)
    words = getattr(plain, "backbone", plain).get_input_embeddings().weight.detach().clone()
    model = injected(Prompt(num_tokens=3), name)
    with torch.no_grad():
        model.inner_embedding.prompt.embedding.weight.copy_(words[FIRST])
    plain.config.pad_token_id = model.config.pad_token_id = 0
    return model, plain


@pytest.mark.parametrize("name", TEXTS)
def test_a_prompt_is_as_if_its_tokens_stood_before_the_text(name: str) -> None:
    """Padding stays where it was, because a decoder classifies by the text's last token."""
    model, plain = prompted(name)
    mask = (PADDED != 0).long()
    ids = torch.cat([FIRST.expand(2, -1), PADDED], 1)
    expected = plain(input_ids=ids, attention_mask=(ids != 0).long()).logits
    answer = model(input_ids=PADDED, attention_mask=mask).logits
    if answer.dim() == 3:
        assert answer.shape[1] == PADDED.shape[1]
        expected = expected[:, 3:]
    torch.testing.assert_close(answer, expected)
    alone = model(input_ids=PADDED[1:, :4], attention_mask=mask[1:, :4]).logits
    short = answer[1:, :4] if answer.dim() == 3 else answer[1:]
    torch.testing.assert_close(alone, short, rtol=1e-4, atol=1e-5)


def prefixed(name: str) -> tuple[Prefixed, nn.Module]:
    """Return a decoder whose prefix is FIRST's keys and values, and the decoder without it."""
    plain: Any = tiny(name)
    plain.config.pad_token_id = 0
    model = injected(Prefix(num_tokens=3), name)
    model.config.pad_token_id = 0
    backbone = getattr(plain, plain.base_model_prefix)
    cache = backbone(input_ids=FIRST.unsqueeze(0), use_cache=True).past_key_values
    layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
    filled = torch.stack(layers).permute(3, 0, 1, 2, 4).flatten(1)  # (n, layers, 2, heads, dim)
    with torch.no_grad():
        model.prefix.embedding.weight.copy_(filled)
    return model, plain


@pytest.mark.parametrize("name", DECODERS)
def test_a_prefix_is_as_if_its_tokens_had_been_read(name: str) -> None:
    model, plain = prefixed(name)
    ids = torch.cat([FIRST.expand(2, -1), PADDED], 1)
    expected = plain(input_ids=ids, attention_mask=(ids != 0).long()).logits
    answer = model(input_ids=PADDED, attention_mask=(PADDED != 0).long()).logits
    real = PADDED != 0 if answer.dim() == 3 else slice(None)
    expected = expected[:, 3:] if answer.dim() == 3 else expected
    torch.testing.assert_close(answer[real], expected[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "mean_pooled", "roberta"])
def test_an_encoder_s_one_layer_attends_to_its_prefix(name: str) -> None:
    """With FIRST's keys and values, a one-layer encoder gives the vectors as if it read FIRST.

    The text's positions begin at 3 then, in RoBERTa as in BERT.
    """
    whole: Any = tiny(name)
    backbone = getattr(whole, whole.base_model_prefix)
    backbone.encoder.layer = backbone.encoder.layer[:1]
    whole.config.num_hidden_layers = 1
    ids = torch.cat([FIRST.expand(2, -1), PADDED], 1)
    mask = (ids != 0).long()
    layer = backbone.encoder.layer[0].attention.self
    before = backbone.embeddings(input_ids=ids)[0, :3]
    heads = [f(before).view(3, 4, -1) for f in (layer.key, layer.value)]
    expected = backbone(input_ids=ids, attention_mask=mask)[0][:, 3:]
    hidden: list[Tensor] = []
    backbone.register_forward_hook(lambda _m, _i, output: hidden.append(output[0]))
    model: Any = Prefix(num_tokens=3).inject(whole).eval()
    with torch.no_grad():
        model.prefix.embedding.weight.copy_(torch.stack(heads, 1).flatten(1))
    answer = model(input_ids=PADDED, attention_mask=mask[:, 3:]).logits
    real = PADDED != 0
    if name == "roberta":  # its position of padding moves with the offset
        real = real & real.all(1, keepdim=True)
    torch.testing.assert_close(hidden[0][real], expected[real], rtol=1e-4, atol=1e-5)
    if name == "mean_pooled":  # the mean is over the text
        mean = (hidden[0] * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True)
        torch.testing.assert_close(answer, whole.classifier(mean))


def greedy(model: nn.Module, ids: Tensor, steps: int) -> list[int]:
    """Return the likeliest next tokens of one text, each from a pass over all before."""
    tokens: list[int] = []
    for _ in range(steps):
        row = torch.cat([ids, torch.tensor(tokens, dtype=torch.long)]).unsqueeze(0)
        tokens.append(int(model(input_ids=row).logits[0, -1].argmax()))
    return tokens


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with `inputs_embeds`")
@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 2, "num_return_sequences": 2}, {"repetition_penalty": 1.5}]
)
@pytest.mark.parametrize("around", [prompted, prefixed])
def test_generation_goes_on_from_the_virtual_tokens(around: Any, settings: dict[str, Any]) -> None:
    """The prompts are padded on the left, as when answers are generated."""
    model, plain = around("llama_lm")
    ids, mask = PADDED.clone(), torch.ones_like(PADDED)
    ids[1], mask[1, :2] = torch.tensor([0, 0, 11, 12, 13, 14]), 0
    fields = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0} | settings
    model.generation_config = GenerationConfig()
    assert model.inner.generation_config is model.generation_config
    config = GenerationConfig(**fields)  # type: ignore[arg-type]
    with torch.no_grad():
        texts = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    times = settings.get("num_return_sequences", 1)
    assert texts.shape == (2 * times, 11)
    assert torch.equal(texts[:, :6], ids.repeat_interleave(times, 0))
    if settings:
        return
    for row in (0, 1):
        text = torch.cat([FIRST, ids[row][mask[row] == 1]])
        assert texts[row, 6:].tolist() == greedy(plain, text, 5)


def test_what_is_around_a_model_answers_for_it() -> None:
    for model in (injected(Prompt(), "llama_lm"), injected(Prefix(), "llama_lm")):
        assert model.config is model.inner.config
        assert model.device == torch.device("cpu")


@pytest.mark.parametrize(("method", "name"), [(Prompt(30), "bert"), (Prefix(30), "gpt2")])
def test_too_few_positions_are_named(method: Method, name: str) -> None:
    model = injected(method, name)
    ids = torch.full((1, 11), 3)
    message = "has 40 positions, too few for 30 virtual tokens and 11 of a text.* at most 10"
    with pytest.raises(ValueError, match=message):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    model(input_ids=ids[:, 1:], attention_mask=torch.ones_like(ids[:, 1:]))


def test_roberta_has_fewer_positions_than_embeddings() -> None:
    """The first two embeddings, padding's and the one before it, are no token's."""
    model = injected(Prompt(30), "roberta")
    assert model.limit == 40 - 1 - model.config.pad_token_id


@pytest.mark.parametrize("init", ["vocabulary", "normal"])
def test_a_prompt_s_start(init: str) -> None:
    model = injected(Prompt(num_tokens=5, init=init), "bert")
    words, start = model.inner_embedding.embedding.weight, model.inner_embedding.prompt
    same = (start.embedding.weight.unsqueeze(1) == words).all(-1).any(-1)
    assert same.all() if init == "vocabulary" else not same.any()


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_p_tuning_sends_all_that_computes_the_prompt(encoder: str) -> None:
    """The network is sent too, because the next round trains it on; PEFT saves its output only."""
    method = PTuning(num_tokens=3, encoder=encoder, hidden=8)
    model = injected(method, "llama_lm")
    names = trainable(model)
    network = {n for n, _ in model.inner_embedding.prompt.named_parameters()}
    assert names == {f"inner.model.embed_tokens.prompt.{n}" for n in network}
    assert ("lstm_head.weight_hh_l0_reverse" in network) == (encoder == "lstm")
    assert all(method.role(n, At(1)) is Role.SHARED for n in names)


def test_prefix_with_its_network_sends_all_of_it() -> None:
    model = injected(Prefix(num_tokens=3, projection=True, hidden=8), "gpt2")
    layers = {f"transform.{i}.{k}" for i in (0, 2) for k in ("weight", "bias")}
    network = {f"prefix.{n}" for n in {"embedding.weight", *layers}}
    assert trainable(model) == network | {"inner.score.weight"}
    assert logits_of(model).shape == (2, 3)


def logits_of(model: Any) -> Tensor:
    return model(input_ids=PADDED, attention_mask=torch.ones_like(PADDED)).logits


def test_prefix_and_gradient_checkpointing_exclude_each_other() -> None:
    model: Any = tiny("llama_lm")
    checkpoint_blocks(model)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM drops keys .* set model\.gradient"):
        Prefix().inject(model)


@pytest.mark.parametrize("method", [Prompt(3), PTuning(3), Prefix(3)], ids=lambda m: str(m)[:6])
def test_virtual_tokens_on_a_bfloat16_base(method: Method) -> None:
    with torch_seed(0, "method"):
        model = train_in_float32(method.inject(tiny("llama_lm").to(torch.bfloat16)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = logits_of(model).float().square().mean()
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert grads and all(g is not None and g.dtype == torch.float32 and g.any() for g in grads)


# --- runs --------------------------------------------------------------------------------------


@pytest.mark.matrix
@pytest.mark.parametrize("method", [m for m in BASELINES if m not in ("bitfit", "fedprompt")])
def test_two_rounds_of_a_language_model(method: str, run: Runner, checkpoint: Any) -> None:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 100,
    }
    summary = run(
        "model=tinyllama",
        "model.path=null",
        "model.random=true",
        f"model.tokenizer_path={checkpoint}",
        *(f"model.architecture.{key}={value}" for key, value in sizes.items()),
        "data._target_=fedpeft.data.tasks.language.LanguageModelling",
        "num_clients=2",
        f"method={method}",
    )
    assert summary["refused"] == {}
    measure = "client_validation_loss" if method == "feddpa" else "validation_loss"
    assert summary["final"][measure] != summary["initial"][measure]
