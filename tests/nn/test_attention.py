from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedpeft.nn.attention import SHORT
from fedpeft.training import autocast

CPU = torch.device("cpu")
HOW = {
    "keywords": lambda q, k, v, mask, **more: F.scaled_dot_product_attention(
        query=q, key=k, value=v, attn_mask=mask, **more
    ),
    "in order": lambda q, k, v, mask, is_causal=False, **more: F.scaled_dot_product_attention(
        q, k, v, mask, 0.0, is_causal, **more
    ),
}
GIVEN: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.5},
    "kept": {"attn_mask": (torch.arange(12) < 9)[None]},
    "added": {"attn_mask": torch.linspace(-2, 2, 12).bfloat16()[None]},
}


def _heads(length: int, dtype: torch.dtype = torch.bfloat16, trains: bool = True) -> list[Tensor]:
    torch.manual_seed(0)
    parts = [torch.randn(2, 3, length, 8, dtype=torch.bfloat16).to(dtype) for _ in range(3)]
    return [part.requires_grad_(trains) for part in parts]


def _attend(heads: list[Tensor], attn_mask: Tensor | None = None, **given: Any) -> Tensor:
    query, key, value = heads
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **given)


def _expected(heads: list[Tensor], **given: Any) -> Tensor:
    if given.get("attn_mask") is not None and given["attn_mask"].dtype == torch.bfloat16:
        given["attn_mask"] = given["attn_mask"].float()
    return _attend([part.float() for part in heads], **given).bfloat16()


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_short_attention_that_trains_is_computed_in_float32(
    given: dict[str, Any], dtype: torch.dtype
) -> None:
    heads, alone = _heads(12, dtype), _heads(12, dtype)
    with autocast(CPU, "bf16"):
        found = _attend(heads, **given)
    expected = _expected(alone, **given)
    assert torch.equal(found, expected)
    assert found.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(found, _attend(heads, **given))
    found.square().sum().backward()
    expected.square().sum().backward()
    for own, other in zip(heads, alone, strict=True):
        assert own.grad is not None and own.grad.dtype == dtype
        assert other.grad is not None and torch.equal(own.grad, other.grad)


@pytest.mark.parametrize(
    ("length", "trains"), [(SHORT, False), (SHORT + 1, True)], ids=["evaluated", "long"]
)
def test_other_attention_is_left_to_autocast(length: int, trains: bool) -> None:
    heads = _heads(length, trains=trains)
    with autocast(CPU, "bf16"):
        found = _attend(heads)
    assert torch.equal(found, _attend(heads))
    assert not torch.equal(found, _expected(heads))


@pytest.mark.parametrize("attend", HOW.values(), ids=HOW.keys())
def test_however_it_is_called(attend: Callable[..., Tensor]) -> None:
    heads = _heads(12)
    with autocast(CPU, "bf16"):
        found = attend(*heads, None, is_causal=True)
    assert torch.equal(found, _expected(heads, is_causal=True))


def test_float32_is_left_alone() -> None:
    heads = _heads(12, torch.float32)
    with autocast(CPU, "fp32"):
        found = _attend(heads)
    assert found.dtype == torch.float32
