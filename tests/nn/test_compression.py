"""SCL's layer: its three ways to start, against linear algebra computed here."""

import math

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor

from fedpeft.nn.scl import INITS, CompressedProjection


def weights(width: int = 24, hidden: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(width, hidden, generator=generator),
        torch.randn(width, generator=generator),
    )


def built(weight: Tensor, bias: Tensor | None, rank: int, init: str) -> CompressedProjection:
    torch.manual_seed(5)
    return CompressedProjection(weight, bias, rank, init)


def relative_error(output: Tensor, expected: Tensor) -> float:
    return float((output - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("init", INITS)
def test_forward_is_two_thin_products(init: str) -> None:
    weight, bias = weights()
    layer = built(weight, bias, 7, init)
    with torch.no_grad():
        layer.project.add_(torch.randn_like(layer.project))
    x = torch.randn(2, 5, 60)
    expected = torch.einsum("bnf,rf,dr->bnd", x, layer.compress, layer.project) + bias
    if init == "residual":
        expected = expected + torch.einsum("bnf,df->bnd", x, weight)
    assert layer.compress.shape == (7, 60) and layer.project.shape == (24, 7)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 7, 24])
def test_random_pinv_is_exact_on_the_row_space_of_c(rank: int) -> None:
    weight, bias = weights()
    layer = built(weight, bias, rank, "random_pinv")
    inside = torch.randn(9, rank) @ layer.compress.detach()
    assert relative_error(layer(inside), inside @ weight.T + bias) < 1e-5


@pytest.mark.parametrize("rank", [8, 128, 384])
def test_random_pinv_loses_sqrt_one_minus_r_over_f_of_white_noise(rank: int) -> None:
    """W2' C first projects onto C's row space, which has a share r/f of white noise."""
    torch.manual_seed(0)
    weight = torch.randn(400, 512)
    x = torch.randn(2000, 512)
    layer = CompressedProjection(weight, None, rank, "random_pinv")
    error = relative_error(layer(x), x @ weight.T)
    assert error == pytest.approx(math.sqrt(1 - rank / 512), rel=0.02)


def test_random_pinv_compresses_at_the_scale_of_its_input() -> None:
    torch.manual_seed(0)
    layer = CompressedProjection(torch.randn(300, 512), None, 300, "random_pinv")
    x = 3 * torch.randn(500, 512)
    assert float((x @ layer.compress.detach().T).std()) == pytest.approx(3, rel=0.02)
    assert float(layer.compress.detach().mean()) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("rank", [1, 8, 23, 24])
def test_svd_is_the_best_approximation_of_its_rank(rank: int) -> None:
    """By Eckart and Young, the error's Frobenius norm is that of the singular values left out."""
    weight, _ = weights()
    layer = built(weight, None, rank, "svd")
    values = torch.linalg.svdvals(weight.double())
    folded = (layer.project @ layer.compress).detach()
    assert float((folded - weight).norm()) == pytest.approx(
        float(values[rank:].norm()), rel=1e-4, abs=1e-4
    )
    assert torch.linalg.matrix_rank(folded, rtol=1e-4) == rank


def test_svd_splits_the_singular_values_evenly() -> None:
    weight, _ = weights()
    layer = built(weight, None, 8, "svd")
    root = torch.linalg.svdvals(weight)[:8].sqrt()
    torch.testing.assert_close(layer.compress.norm(dim=1), root)
    torch.testing.assert_close(layer.project.norm(dim=0), root)


def test_residual_starts_as_w2_bit_for_bit_and_can_learn() -> None:
    weight, bias = weights()
    layer = built(weight, bias, 4, "residual")
    x = torch.randn(6, 60)
    assert torch.equal(layer(x), x @ weight.T + bias)
    layer(x).square().sum().backward()
    assert layer.project.grad is not None and layer.project.grad.abs().max() > 0


def test_residual_is_lora_whose_alpha_is_its_rank_but_for_the_size_of_the_start() -> None:
    weight, bias = weights(24, 600)
    layer = built(weight, bias, 8, "residual")
    torch.nn.init.normal_(layer.project)
    linear = torch.nn.Linear(600, 24)
    linear.load_state_dict({"weight": weight, "bias": bias})
    lora = LoraLinear(linear, "default", LoraConfig(r=8, lora_alpha=8), r=8, lora_alpha=8)
    parts = dict(lora.named_parameters())
    a, b = (parts[f"lora_{name}.default.weight"] for name in "AB")
    # A is uniform of variance 1 / (3 f), C normal of variance 1 / f; 4,800 entries tell 4 % apart.
    times = float(layer.compress.detach().std() / a.detach().std())
    assert times == pytest.approx(3**0.5, rel=0.04)
    with torch.no_grad():
        a.copy_(layer.compress)
        b.copy_(layer.project)
    x = torch.randn(6, 600)
    torch.testing.assert_close(layer(x), lora(x))


@pytest.mark.parametrize("init", INITS)
def test_only_c_and_w2_prime_train(init: str) -> None:
    weight, bias = weights()
    layer = built(weight.requires_grad_(), bias.requires_grad_(), 4, init)
    training = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert training == {"compress", "project"}
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 4 * (60 + 24)
    parameters = dict(layer.named_parameters())
    assert torch.equal(parameters["bias"], bias)
    assert ("weight" in parameters) == (init == "residual")


def test_without_a_bias() -> None:
    weight, _ = weights()
    layer = built(weight, None, 24, "svd")
    assert layer.bias is None
    assert relative_error(layer(torch.zeros(2, 60)), torch.ones(2, 24)) == 1.0
    assert torch.equal(layer(torch.zeros(2, 60)), torch.zeros(2, 24))


@pytest.mark.parametrize("init", INITS)
def test_bfloat16_weights_give_bfloat16_factors(init: str) -> None:
    weight, bias = weights()
    layer = built(weight.bfloat16(), bias.bfloat16(), 24, init)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    x = torch.randn(50, 60).bfloat16()
    if init == "random_pinv":  # exact in C's row space, up to bfloat16's three digits
        x = (torch.randn(50, 24) @ layer.compress.float()).bfloat16()
    assert (
        relative_error(layer(x).float(), (x @ weight.bfloat16().T + bias.bfloat16()).float()) < 0.05
    )


@pytest.mark.parametrize("rank", [0, -1, 25, 60])
def test_a_rank_outside_the_matrix_is_refused(rank: int) -> None:
    weight, bias = weights()
    with pytest.raises(ValueError, match=f"rank must be from 1 to 24 here, got {rank}"):
        built(weight, bias, rank, "svd")


def test_an_unknown_start_is_refused() -> None:
    weight, bias = weights()
    with pytest.raises(ValueError, match="init must be one of random_pinv, svd, .* got zeros"):
        built(weight, bias, 4, "zeros")
