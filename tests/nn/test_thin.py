"""Thin products against PyTorch's own, in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from fedpeft.nn.thin import ThinAdapter, ThinLinear, without_autocast

TOKENS, WIDTH, MIDDLE, RANK = 7, 12, 6, 2


def plain(x: Tensor, left: Tensor, right: Tensor, bias: Tensor) -> Tensor:
    """Compute x L R + bias, where x L is ``q`` rows a token."""
    rows = (x @ left).reshape(-1, right.shape[0]) @ right
    return rows.reshape(len(x), -1) + bias


def plain_adapter(x: Tensor, *parts: Tensor) -> Tensor:
    """Compute x + up(relu(down(x))), where each product has a left and right factor and a bias."""
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


def thin_linear(*parts: Tensor) -> Tensor:
    return ThinLinear.apply(*parts)[0]


def thin_adapter(*parts: Tensor) -> Tensor:
    return ThinAdapter.apply(*parts)[0]


# The product under test, PyTorch's, and a function that draws the tensors of both.
PAIRS = [(thin_linear, plain, linear_parts), (thin_adapter, plain_adapter, adapter_parts)]


@pytest.mark.parametrize("q", [1, 3])
@pytest.mark.parametrize(("thin", "whole", "draw_parts"), PAIRS)
def test_values_and_gradients(
    thin: Callable, whole: Callable, draw_parts: Callable, q: int
) -> None:
    parts = draw_parts(q)
    torch.testing.assert_close(thin(*parts), whole(*parts))
    upstream = torch.randn(whole(*parts).shape, dtype=torch.float64)
    gradients = torch.autograd.grad(thin(*parts), parts, upstream)
    torch.testing.assert_close(gradients, torch.autograd.grad(whole(*parts), parts, upstream))


@pytest.mark.parametrize(("thin", "whole", "draw_parts"), PAIRS)
def test_copies_by_vmap_are_the_products_one_by_one(
    thin: Callable, whole: Callable, draw_parts: Callable
) -> None:
    """Factors differ by copy, along any axis; rows and the last bias are the same for all."""
    x, *factors, bias = (part.detach() for part in draw_parts())
    stacks = [torch.stack([factor, 2 * factor - 1, -factor]) for factor in factors]

    def loss(function: Callable) -> Callable:
        return lambda *factors: function(x, *factors, bias).sin().sum()

    numbers = tuple(range(len(factors)))
    in_dims = (1, *[0] * (len(factors) - 1))
    batched = vmap(grad(loss(thin), argnums=numbers), in_dims=in_dims)
    gradients = batched(stacks[0].movedim(0, 1), *stacks[1:])
    for copy in range(3):
        expected = grad(loss(whole), argnums=numbers)(*(stack[copy] for stack in stacks))
        torch.testing.assert_close([part[copy] for part in gradients], list(expected))


@pytest.mark.parametrize("frozen", range(4))
def test_a_part_that_is_frozen_gets_no_gradient(frozen: int) -> None:
    parts = linear_parts()
    parts[frozen] = parts[frozen].detach()
    thin_linear(*parts).sum().backward()
    assert [part.grad is None for part in parts] == [i == frozen for i in range(4)]


def test_arguments_are_not_changed_in_place() -> None:
    parts = adapter_parts()
    before = [part.detach().clone() for part in parts]
    thin_adapter(*parts).sum().backward()
    torch.testing.assert_close([part.detach() for part in parts], before, rtol=0, atol=0)


def test_products_keep_their_dtype_without_autocast() -> None:
    x = torch.randn(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with without_autocast(x.device):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
