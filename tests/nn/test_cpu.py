"""Attention and dropout on the CPU: against PyTorch's in float32, and left alone elsewhere."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpeft.engine.cpu import SHORT, OnCPU, dropout_mask
from fedpeft.engine.passes import autocast

CPU = torch.device("cpu")
CALLS = {
    "keywords": lambda q, k, v, mask, **more: F.scaled_dot_product_attention(
        query=q, key=k, value=v, attn_mask=mask, **more
    ),
    "in order": lambda q, k, v, mask, is_causal=False, **more: F.scaled_dot_product_attention(
        q, k, v, mask, 0.0, is_causal, **more
    ),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.5},
    "masked": {"attn_mask": (torch.arange(12) < 9)[None]},
    "added": {"attn_mask": torch.linspace(-2, 2, 12).bfloat16()[None]},
}


def heads_of(length: int, dtype: torch.dtype = torch.bfloat16, trains: bool = True) -> list[Tensor]:
    """Return queries, keys and values of 2 rows with 3 heads of 8 dimensions, (2, 3, length, 8).

    Args:
        length: number of tokens.
        dtype: holds the same values, which bfloat16 can represent.
        trains: true if the tensors need gradients.
    """
    torch.manual_seed(0)
    parts = [torch.randn(2, 3, length, 8, dtype=torch.bfloat16).to(dtype) for _ in range(3)]
    return [part.requires_grad_(trains) for part in parts]


def attend(heads: list[Tensor], attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    query, key, value = heads
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **options)


def attend_in_float32(heads: list[Tensor], **options: Any) -> Tensor:
    """Compute attention in float32 and round the result to bfloat16."""
    return attend([part.float() for part in heads], **with_float32_mask(options)).bfloat16()


def with_float32_mask(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with their mask in float32, unless it is boolean."""
    mask = options.get("attn_mask")
    if mask is None or mask.dtype == torch.bool:
        return options
    return options | {"attn_mask": mask.float()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_short_attention_that_trains_is_computed_in_float32(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    heads, copies = heads_of(12, dtype), heads_of(12, dtype)
    with autocast(CPU, "bf16"):
        output = attend(heads, **options)
    expected = attend_in_float32(copies, **options)
    assert torch.equal(output, expected)
    assert output.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(output, attend(heads, **options))
    output.square().sum().backward()
    expected.square().sum().backward()
    for part, copy in zip(heads, copies, strict=True):
        assert part.grad is not None and part.grad.dtype == dtype
        assert copy.grad is not None and torch.equal(part.grad, copy.grad)


@pytest.mark.parametrize(
    ("length", "trains"), [(SHORT, False), (SHORT + 1, True)], ids=["evaluated", "long"]
)
def test_other_attention_is_left_to_autocast(length: int, trains: bool) -> None:
    heads = heads_of(length, trains=trains)
    with autocast(CPU, "bf16"):
        output = attend(heads)
    assert torch.equal(output, attend(heads))
    assert not torch.equal(output, attend_in_float32(heads))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_however_it_is_called(call: Callable[..., Tensor]) -> None:
    heads = heads_of(12)
    with autocast(CPU, "bf16"):
        output = call(*heads, None, is_causal=True)
    assert torch.equal(output, attend_in_float32(heads, is_causal=True))


def test_float32_is_left_alone() -> None:
    heads = heads_of(12, torch.float32)
    with autocast(CPU, "fp32"):
        output = attend(heads)
    assert output.dtype == torch.float32


def test_kept_entries_are_drawn_from_torchs_generator() -> None:
    torch.manual_seed(3)
    first, factor = dropout_mask((5, 7), 0.3)
    second, _ = dropout_mask((5, 7), 0.3)
    torch.manual_seed(3)
    again, _ = dropout_mask((5, 7), 0.3)
    assert first.shape == (5, 7)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert factor == pytest.approx(1 / 0.7, abs=1e-4)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_each_entry_is_kept_with_its_probability(p: float) -> None:
    torch.manual_seed(0)
    count = 2**18
    where, factor = dropout_mask((count // 4, 4), p)  # one drawn number decides on four entries
    error = 4 * (p * (1 - p) / (count // 4)) ** 0.5  # four standard deviations
    assert where.float().mean(0).tolist() == pytest.approx([1 - p] * 4, abs=error)
    together = (where[:, 0] & where[:, 1]).float().mean()
    assert float(together) == pytest.approx((1 - p) ** 2, abs=error)
    assert float(where.float().mean()) * factor == pytest.approx(1, abs=error / (1 - p))


def test_nearly_everything_may_be_dropped() -> None:
    where, factor = dropout_mask((1000,), 1 - 1e-9)
    assert factor == 2**16
    assert where.sum() < 3


def test_dropout_multiplies_kept_entries_and_their_gradient() -> None:
    x = torch.ones(40, 50, requires_grad=True)
    torch.manual_seed(1)
    where, factor = dropout_mask(x.shape, 0.2)
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


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_drops_weights(options: dict[str, Any], precision: str) -> None:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    heads, copies = heads_of(12, dtype), heads_of(12, dtype)
    if precision == "fp32":
        options = with_float32_mask(options)
    torch.manual_seed(2)
    with autocast(CPU, precision):
        output = attend(heads, dropout_p=0.3, **options)
    assert output.dtype == dtype
    torch.manual_seed(2)
    where, factor = dropout_mask((2, 3, 12, 12), 0.3)
    query, key, value = (part.float() for part in copies)
    identity = torch.eye(12).expand(2, 3, 12, 12)  # as values, it gives the weights
    weights = F.scaled_dot_product_attention(query, key, identity, **with_float32_mask(options))
    expected = ((weights * where * factor) @ value).to(dtype)
    error = 1e-6 if precision == "fp32" else 1e-2
    torch.testing.assert_close(output, expected, rtol=10 * error, atol=error)
    output.float().square().sum().backward()
    expected.float().square().sum().backward()
    for part, copy in zip(heads, copies, strict=True):
        torch.testing.assert_close(part.grad, copy.grad, rtol=1e-2, atol=5 * error)


@pytest.mark.parametrize("masked", [False, -torch.inf, torch.finfo(torch.float32).min])
def test_a_query_that_sees_nothing_gives_numbers(masked: float) -> None:
    heads = heads_of(12, torch.float32)
    mask = torch.ones(12, 12, dtype=torch.bool) if masked is False else torch.zeros(12, 12)
    mask[3] = masked
    mask[:, 9:] = masked
    with OnCPU():
        output = attend(heads, attn_mask=mask, dropout_p=0.3)
    output.sum().backward()
    assert output.isfinite().all()
    assert all(part.grad is not None and part.grad.isfinite().all() for part in heads)
    assert heads[2].grad is not None
    assert (heads[2].grad.abs().sum((0, 1, 3))[:9] > 0).all()


def test_grouped_heads_are_left_to_pytorch() -> None:
    query = torch.randn(1, 4, 6, 8, requires_grad=True)
    key, value = torch.randn(2, 1, 2, 6, 8)
    before = torch.get_rng_state()
    with OnCPU():
        output = F.scaled_dot_product_attention(query, key, value, dropout_p=0.5, enable_gqa=True)
    torch.set_rng_state(before)
    expected = F.scaled_dot_product_attention(query, key, value, dropout_p=0.5, enable_gqa=True)
    assert torch.equal(output, expected)


def test_attention_without_dropout_draws_nothing() -> None:
    heads = heads_of(12, torch.float32, trains=False)
    before = torch.get_rng_state()
    with OnCPU():
        output = attend(heads)
    assert torch.equal(output, attend(heads))
    assert torch.equal(torch.get_rng_state(), before)
