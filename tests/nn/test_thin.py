"""Thin products against PyTorch's own, in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from fedpeft.nn.thin import ThinAdapter, ThinLinear, without_autocast

TOKENS, WIDTH, MIDDLE, RANK = 7, 12, 6, 2


def plain(x: Tensor, left: Tensor, right: Tensor, bias: Tensor) -> Tensor:
    """x L as q rows of m a token, times R."""
    rows = (x @ left).reshape(-1, right.shape[0]) @ right
    return rows.reshape(len(x), -1) + bias


def plain_adapter(x: Tensor, *parts: Tensor) -> Tensor:
    hidden = torch.relu(plain(x, *parts[:3]))
    return x + plain(hidden, *parts[3:])


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def linear_parts(q: int = 1) -> list[Tensor]:
    return drawn((TOKENS, WIDTH), (WIDTH, q * RANK), (RANK, MIDDLE // q), (1, MIDDLE))


def adapter_parts(q: int = 1) -> list[Tensor]:
    down = [(WIDTH, q * RANK), (RANK, MIDDLE // q), (1, MIDDLE)]
    up = [(MIDDLE, q * RANK), (RANK, WIDTH // q), (1, WIDTH)]
    return drawn((TOKENS, WIDTH), *down, *up)


def thin_linear(*given: Tensor) -> Tensor:
    return ThinLinear.apply(*given)[0]


def thin_adapter(*given: Tensor) -> Tensor:
    return ThinAdapter.apply(*given)[0]


PAIRS = [(thin_linear, plain, linear_parts), (thin_adapter, plain_adapter, adapter_parts)]


@pytest.mark.parametrize("q", [1, 3])
@pytest.mark.parametrize(("thin", "whole", "parts"), PAIRS)
def test_values_and_gradients(thin: Callable, whole: Callable, parts: Callable, q: int) -> None:
    given = parts(q)
    torch.testing.assert_close(thin(*given), whole(*given))
    up = torch.randn(whole(*given).shape, dtype=torch.float64)
    found = torch.autograd.grad(thin(*given), given, up)
    torch.testing.assert_close(found, torch.autograd.grad(whole(*given), given, up))


@pytest.mark.parametrize(("thin", "whole", "parts"), PAIRS)
def test_copies_by_vmap_are_the_products_one_by_one(
    thin: Callable, whole: Callable, parts: Callable
) -> None:
    """Factors differ by copy, along any axis; rows and the last bias are the same for all."""
    x, *others, bias = (p.detach() for p in parts())
    copies = [torch.stack([part, 2 * part - 1, -part]) for part in others]
    given = [copies[0].movedim(0, 1), *copies[1:]]

    def loss(function: Callable) -> Callable:
        return lambda *own: function(x, *own, bias).sin().sum()

    numbers = tuple(range(len(others)))
    found = vmap(grad(loss(thin), argnums=numbers), in_dims=(1, *[0] * (len(given) - 1)))(*given)
    for k in range(3):
        own = [copy[k] for copy in copies]
        expected = grad(loss(whole), argnums=numbers)(*own)
        torch.testing.assert_close([part[k] for part in found], list(expected))


@pytest.mark.parametrize("frozen", range(4))
def test_a_part_that_is_frozen_gets_no_gradient(frozen: int) -> None:
    given = linear_parts()
    given[frozen] = given[frozen].detach()
    thin_linear(*given).sum().backward()
    assert [part.grad is None for part in given] == [i == frozen for i in range(4)]


def test_rows_that_are_given_stay_as_they_are() -> None:
    given = adapter_parts()
    before = [part.detach().clone() for part in given]
    thin_adapter(*given).sum().backward()
    torch.testing.assert_close([part.detach() for part in given], before, rtol=0, atol=0)


def test_products_keep_their_dtype_without_autocast() -> None:
    x = torch.randn(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with without_autocast(x.device):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
