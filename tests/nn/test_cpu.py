from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpeft.engine.cpu import SHORT, OnCPU, kept
from fedpeft.engine.passes import autocast

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
    return _attend([part.float() for part in heads], **_in_float32(given)).bfloat16()


def _in_float32(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments whose mask, if it is added, has the dtype of the heads."""
    mask = given.get("attn_mask")
    if mask is None or mask.dtype == torch.bool:
        return given
    return given | {"attn_mask": mask.float()}


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


def test_what_is_kept_is_drawn_from_torchs_generator() -> None:
    torch.manual_seed(3)
    first, factor = kept((5, 7), 0.3)
    second, _ = kept((5, 7), 0.3)
    torch.manual_seed(3)
    again, _ = kept((5, 7), 0.3)
    assert first.shape == (5, 7)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert factor == pytest.approx(1 / 0.7, abs=1e-4)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_each_entry_is_kept_with_its_probability(p: float) -> None:
    torch.manual_seed(0)
    count = 2**18
    where, factor = kept((count // 4, 4), p)  # four of a draw
    error = 4 * (p * (1 - p) / (count // 4)) ** 0.5  # four standard deviations
    assert where.float().mean(0).tolist() == pytest.approx([1 - p] * 4, abs=error)
    together = (where[:, 0] & where[:, 1]).float().mean()
    assert float(together) == pytest.approx((1 - p) ** 2, abs=error)
    assert float(where.float().mean()) * factor == pytest.approx(1, abs=error / (1 - p))


def test_nearly_everything_may_be_dropped() -> None:
    where, factor = kept((1000,), 1 - 1e-9)
    assert factor == 2**16
    assert where.sum() < 3


def test_dropout_multiplies_what_is_kept_and_its_gradient() -> None:
    x = torch.ones(40, 50, requires_grad=True)
    torch.manual_seed(1)
    where, factor = kept(x.shape, 0.2)
    torch.manual_seed(1)
    with OnCPU():
        y = nn.Dropout(0.2)(x)
    assert torch.equal(y, where * torch.tensor(factor))
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, y)


def test_dropout_that_does_not_draw_is_pytorchs() -> None:
    x = torch.ones(4)
    before = torch.get_rng_state()
    with OnCPU():
        assert torch.equal(F.dropout(x, 0.5, training=False), x)
        assert torch.equal(F.dropout(x, 0.0), x)
        assert torch.equal(F.dropout(x, 1.0), torch.zeros(4))
        assert F.dropout(x, 0.0, inplace=True) is x
        with pytest.raises(ValueError, match="probability has to be between 0 and 1"):
            F.dropout(x, 1.5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN.keys())
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_drops_weights(given: dict[str, Any], precision: str) -> None:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    heads, alone = _heads(12, dtype), _heads(12, dtype)
    if precision == "fp32":
        given = _in_float32(given)
    torch.manual_seed(2)
    with autocast(CPU, precision):
        found = _attend(heads, dropout_p=0.3, **given)
    assert found.dtype == dtype
    torch.manual_seed(2)
    where, factor = kept((2, 3, 12, 12), 0.3)
    query, key, value = (part.float() for part in alone)
    identity = torch.eye(12).expand(2, 3, 12, 12)
    weights = F.scaled_dot_product_attention(query, key, identity, **_in_float32(given))
    expected = ((weights * where * factor) @ value).to(dtype)
    error = 1e-6 if precision == "fp32" else 1e-2
    torch.testing.assert_close(found, expected, rtol=10 * error, atol=error)
    found.float().square().sum().backward()
    expected.float().square().sum().backward()
    for own, other in zip(heads, alone, strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-2, atol=5 * error)


@pytest.mark.parametrize("masked", [False, -torch.inf, torch.finfo(torch.float32).min])
def test_a_query_that_sees_nothing_gives_numbers(masked: float) -> None:
    heads = _heads(12, torch.float32)
    mask = torch.ones(12, 12, dtype=torch.bool) if masked is False else torch.zeros(12, 12)
    mask[3] = masked
    mask[:, 9:] = masked
    with OnCPU():
        found = _attend(heads, attn_mask=mask, dropout_p=0.3)
    found.sum().backward()
    assert found.isfinite().all()
    assert all(part.grad is not None and part.grad.isfinite().all() for part in heads)
    assert heads[2].grad is not None
    assert (heads[2].grad.abs().sum((0, 1, 3))[:9] > 0).all()


def test_grouped_heads_are_left_to_pytorch() -> None:
    query = torch.randn(1, 4, 6, 8, requires_grad=True)
    key, value = torch.randn(2, 1, 2, 6, 8)
    before = torch.get_rng_state()
    with OnCPU():
        found = F.scaled_dot_product_attention(query, key, value, dropout_p=0.5, enable_gqa=True)
    torch.set_rng_state(before)
    expected = F.scaled_dot_product_attention(query, key, value, dropout_p=0.5, enable_gqa=True)
    assert torch.equal(found, expected)


def test_attention_that_only_answers_draws_nothing_of_its_own() -> None:
    heads = _heads(12, torch.float32, trains=False)
    before = torch.get_rng_state()
    with OnCPU():
        found = _attend(heads)
    assert torch.equal(found, _attend(heads))
    assert torch.equal(torch.get_rng_state(), before)
