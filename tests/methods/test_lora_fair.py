"""LoRA-FAIR's residual against a solver, against numbers by hand, and against plain LoRA."""

import pytest
import torch
from torch import Tensor

from fedpeft.methods.lora import LoRA
from fedpeft.methods.lora_fair import LoRAFair
from fedpeft.state import State
from tests.methods.rounds import aggregated

A, B = "x.lora_A.default.weight", "x.lora_B.default.weight"
WEIGHTS = [0.25, 0.75]


def states(rank: int = 3, out: int = 5, inner: int = 7) -> list[State]:
    torch.manual_seed(0)
    return [
        {B: torch.randn(out, rank), A: torch.randn(rank, inner), "head": torch.randn(2)}
        for _ in WEIGHTS
    ]


def mean_product(clients: list[State]) -> Tensor:
    return sum((w * s[B] @ s[A] for w, s in zip(WEIGHTS, clients, strict=True)), torch.tensor(0.0))


def test_the_residual_by_hand() -> None:
    """A and B are numbers: lambda = 4, B_c = 4 and 0, A_c = 5 and 1, weights 1/4 and 3/4.

    Mean A is 2, mean B is 1, the mean product 5, so dB = (5 - 1 x 2) x 2 / (4 + 4) = .75.
    """
    clients: list[State] = [
        {B: torch.tensor([[4.0]]), A: torch.tensor([[5.0]])},
        {B: torch.tensor([[0.0]]), A: torch.tensor([[1.0]])},
    ]
    after = aggregated(LoRAFair(rank=1, penalty=4.0), clients, WEIGHTS)
    torch.testing.assert_close(after[A], torch.tensor([[2.0]]))
    torch.testing.assert_close(after[B], torch.tensor([[1.75]]))
    free = aggregated(LoRAFair(rank=1, penalty=0.0), clients, WEIGHTS)
    torch.testing.assert_close(free[B] @ free[A], torch.tensor([[5.0]]))


def test_without_penalty_it_is_least_squares() -> None:
    clients = states()
    after = aggregated(LoRAFair(rank=3, penalty=0.0), clients, WEIGHTS)
    plain = aggregated(LoRA(rank=3), clients, WEIGHTS)
    best = torch.linalg.lstsq(plain[A].T.double(), mean_product(clients).T.double()).solution.T
    torch.testing.assert_close(after[B].double(), best, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("penalty", [0.01, 2.0])
def test_the_residual_is_where_the_objective_has_no_slope(penalty: float) -> None:
    clients = states()
    after = aggregated(LoRAFair(rank=3, penalty=penalty), clients, WEIGHTS)
    plain = aggregated(LoRA(rank=3), clients, WEIGHTS)
    residual = (after[B] - plain[B]).double().requires_grad_()
    a, b = plain[A].double(), plain[B].double()
    off = (mean_product(clients).double() - (b + residual) @ a).square().sum()
    (off + penalty * residual.square().sum()).backward()
    assert residual.grad is not None and residual.detach().norm() > 0.1
    assert residual.grad.abs().max() < 1e-4


def test_the_product_is_nearer_to_the_mean_product_than_lora_s() -> None:
    clients = states()
    off = []
    for method in (LoRA(rank=3), LoRAFair(rank=3, penalty=1.0), LoRAFair(rank=3)):
        after = aggregated(method, clients, WEIGHTS)
        off.append(float((after[B] @ after[A] - mean_product(clients)).norm()))
    assert off[0] > off[1] > off[2] > 0


def test_only_b_differs_from_lora_and_a_large_penalty_is_lora() -> None:
    clients = states()
    fair, plain = (aggregated(m, clients, WEIGHTS) for m in (LoRAFair(rank=3), LoRA(rank=3)))
    assert torch.equal(fair[A], plain[A]) and torch.equal(fair["head"], plain["head"])
    assert fair[B].dtype == plain[B].dtype
    stiff = aggregated(LoRAFair(rank=3, penalty=1e9), clients, WEIGHTS)
    torch.testing.assert_close(stiff[B], plain[B], rtol=1e-6, atol=1e-6)


def test_factors_of_less_than_full_rank_have_a_finite_residual() -> None:
    """Rank 4 on 2 inputs: A A^T is singular; equal clients need no correction."""
    clients = [states(rank=4, inner=2)[0]] * 2
    after = aggregated(LoRAFair(rank=4, penalty=0.0), clients, WEIGHTS)
    torch.testing.assert_close(after[B], clients[0][B], rtol=1e-5, atol=1e-5)


def test_the_penalty_is_checked() -> None:
    with pytest.raises(ValueError, match="penalty must be >= 0, got -1.0"):
        LoRAFair(penalty=-1.0)
