"""DoRA's dense matrix is the one that its layer applies; its magnitude moves and is sent."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedpeft.methods.base import At
from fedpeft.methods.dora import DoRA
from fedpeft.state import Role
from tests.expected.architectures import tiny

OUT, IN, RANK = 5, 7, 3


class Tiny(nn.Module):
    """One projection with the name that ``targets=[query]`` means."""

    base_model_prefix = "backbone"

    def __init__(self, layer: nn.Module, model_type: str) -> None:
        super().__init__()
        self.query = layer
        self.config = SimpleNamespace(model_type=model_type)

    def forward(self, x: Tensor) -> Tensor:
        return self.query(x)


def moved(method: DoRA, layer: nn.Module, model_type: str = "bert") -> Any:
    """Put DoRA on a layer and move its A, B and magnitude away from their start."""
    module = method.inject(Tiny(layer, model_type)).query
    assert isinstance(module, nn.Module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter))
    return module


@pytest.mark.parametrize(
    ("kind", "model_type"),
    [(lambda: nn.Linear(IN, OUT), "bert"), (lambda: Conv1D(OUT, IN), "gpt2")],
    ids=["Linear", "Conv1D"],
)
def test_the_dense_matrix_is_the_one_that_the_layer_applies(
    kind: Callable[[], nn.Module], model_type: str
) -> None:
    torch.manual_seed(0)
    method = DoRA(rank=RANK, alpha=4.0, targets=["query"])
    module = moved(method, kind(), model_type)
    dense = method.effective(module)
    assert dense is not None and dense.shape == (OUT, IN)
    bias = module.get_base_layer().bias
    columns = (module(torch.eye(IN)) - bias).T
    torch.testing.assert_close(dense.float(), columns, rtol=1e-5, atol=1e-5)
    # every row has the length that the magnitude says, and LoRA's product is not all of it
    magnitude = module.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(dense.float().norm(dim=1), magnitude.abs())


def by_hand(method: DoRA) -> Any:
    """Return a layer with W0 + 2 B A = [[3, 4]], of length 5; m = 10 doubles it."""
    layer = nn.Linear(2, 1, bias=False)
    module: Any = method.inject(Tiny(layer, "bert")).query
    values = {
        "base_layer.weight": [[1.0, 4.0]],
        "lora_A.default.weight": [[1.0, 0.0]],
        "lora_B.default.weight": [[1.0]],
        "lora_magnitude_vector.default.weight": [10.0],
    }
    with torch.no_grad():
        for name, value in values.items():
            module.get_parameter(name).copy_(torch.tensor(value))
    return module


def test_the_dense_matrix_by_hand() -> None:
    method = DoRA(rank=1, alpha=2.0, targets=["query"])
    dense = method.effective(by_hand(method))
    assert dense is not None and dense.tolist() == [[6.0, 8.0]]


def test_dropout_by_hand() -> None:
    """W0 sees all of x = (1, 1), which gives 5; the rest, 5 x1 + 4 x2, sees entries 0 or 2."""
    module = by_hand(DoRA(rank=1, alpha=2.0, targets=["query"], dropout=0.5)).train()
    torch.manual_seed(0)
    assert {*module(torch.ones(200, 2)).flatten().tolist()} == {5.0, 13.0, 15.0, 23.0}
    assert {*module.eval()(torch.ones(200, 2)).flatten().tolist()} == {14.0}


def test_dora_starts_as_the_base_model() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(IN, OUT)
    x = torch.randn(4, IN)
    before = layer(x)
    model = DoRA(rank=RANK, targets=["query"]).inject(Tiny(layer, "bert"))
    torch.testing.assert_close(model(x), before)


def test_a_b_magnitude_and_head_are_shared() -> None:
    model = DoRA(rank=2).inject(tiny("bert"))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    roles = {DoRA(rank=2).role(name, At(1, 0)) for name in names}
    assert roles == {Role.SHARED}
    ends = {name.split(".")[-3] for name in names if "lora_" in name}
    assert ends == {"lora_A", "lora_B", "lora_magnitude_vector"}
    assert [p for n, p in model.named_parameters() if "magnitude" in n][0].shape == (48,)
    assert {n for n in names if "lora_" not in n} == {"classifier.weight", "classifier.bias"}


def test_other_modules_have_no_dense_matrix() -> None:
    assert DoRA().effective(nn.Linear(2, 2)) is None
