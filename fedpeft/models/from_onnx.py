"""Reads the weights of a vision transformer out of an ONNX file.

An exporter keeps the names of the parameters, except the names of matrices and of parameters that
it has cut: a linear layer's matrix is a nameless operand of ``MatMul``, transposed, and the ``Add``
behind it has the layer's bias, whose name tells the layer. The position of the first token and
the positions of the patches are two nameless tensors.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpeft.models.processors import plain_image_processor

PREFIX, NAMELESS = "backbone.", "onnx::"  # prefixes of named and of nameless tensors
BIAS = ".bias"
POSITIONS = "embeddings.position_embeddings"
MASK = "embeddings.mask_token"  # only pretraining reads it, so the file lacks it
AT_MOST = 5  # names in an error


def from_onnx(file: Path, folder: Path, lacking: Mapping[str, Any]) -> None:
    """Write an ONNX file's weights, and the configuration and image processor that it lacks.

    Args:
        file: an ONNX file of a DINOv2, whose initialisers are named as the parameters of
            transformers, with ``backbone.`` before them.
        folder: an empty folder, which transformers reads then.
        lacking: ``architecture``, the ``model_type`` and fields of the configuration, and
            ``images``, the image processor's fields.

    Raises:
        ValueError: a tensor is missing, too many, or of another shape than the architecture's.
    """
    from transformers import AutoConfig, AutoModel  # here, because it takes seconds

    fields = dict(lacking["architecture"])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        kind = type(AutoModel.from_config(config))
    weights, unread = read(file)
    weights[MASK] = torch.zeros(1, config.hidden_size)
    model, report = kind.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    _check(file, report, unread)
    model.save_pretrained(folder)
    plain_image_processor(config, lacking["images"]).save_pretrained(folder)


def _check(file: Path, report: Mapping[str, Any], unread: Iterable[str]) -> None:
    """Refuse a file whose tensors are not the model's, in one sentence that names them.

    Args:
        file: named in the error.
        report: transformers' report on the weights that were read.
        unread: tensors that are no weights.

    Raises:
        ValueError: a tensor is missing, in excess, or of another shape.
    """
    faults = {
        "lacks": report["missing_keys"],
        "has in excess": [*report["unexpected_keys"], *unread],
        "has in another shape": [name for name, *_ in report["mismatched_keys"]],
    }
    said = [f"{fault} {_some(names)}" for fault, names in faults.items() if names]
    if said:
        raise ValueError(
            f"{file} {' and '.join(said)}: its tensors must be those of model.architecture"
        )


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - AT_MOST} more" if len(names) > AT_MOST else ""
    return ", ".join(names[:AT_MOST]) + more


def read(file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return an ONNX file's weights by the names of the parameters, and nameless tensors left over.

    Other parts that the file names, such as a decoder, are left out, and constants of no or one
    dimension, such as the shapes that the graph computes with.
    """
    import onnx  # here, because only a model in such a file needs it

    graph = onnx.load(str(file)).graph
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    weights = {n.removeprefix(PREFIX): a for n, a in arrays.items() if n.startswith(PREFIX)}
    nameless = {n: a for n, a in arrays.items() if n.startswith(NAMELESS) and a.ndim > 1}
    for operand, layer in _matrices(graph.node):
        if operand in nameless:
            weights[f"{layer}.weight"] = nameless.pop(operand).T
    weights |= _positions(nameless)
    unread = [f"{name} ({' x '.join(map(str, a.shape))})" for name, a in nameless.items()]
    return {n: torch.from_numpy(np.array(a, np.float32)) for n, a in weights.items()}, unread


def _matrices(nodes: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Yield the second operand of each MatMul with a bias behind it, and the layer's name."""
    summed: dict[str, str] = {}  # maps each operand of an Add to the other
    for node in nodes:
        if node.op_type == "Add":
            one, other = node.input
            summed |= {one: other, other: one}
    for node in nodes:
        bias = summed.get(node.output[0], "") if node.op_type == "MatMul" else ""
        if bias.startswith(PREFIX) and bias.endswith(BIAS):
            yield node.input[1], bias.removeprefix(PREFIX).removesuffix(BIAS)


def _positions(nameless: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Take the first token's position and the patches' out of the nameless tensors."""
    names = [name for name, array in nameless.items() if array.ndim == 3 and len(array) == 1]
    if len(names) != 2:
        return {}
    parts = sorted((nameless.pop(name) for name in names), key=lambda array: array.shape[1])
    return {POSITIONS: np.concatenate(parts, axis=1)}
