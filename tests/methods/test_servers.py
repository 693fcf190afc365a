"""Aggregation in the LoRA family by hand, with unequal weights and alpha != r."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedpeft.methods.base import Method
from fedpeft.methods.fed_sb import FedSB
from fedpeft.methods.fedex_lora import FedExLoRA
from fedpeft.methods.fedrot_lora import FedRotLoRA
from fedpeft.methods.fedsvd import FedSVD
from fedpeft.methods.flexlora import FlexLoRA
from fedpeft.methods.flora import FLoRA
from fedpeft.methods.hetlora import HetLoRA
from fedpeft.methods.parts.products import truncated
from fedpeft.methods.ravan import Ravan
from fedpeft.methods.slora import SLoRA
from fedpeft.nn.cores import CoreAdapter
from fedpeft.nn.sparse import SparseDelta
from fedpeft.state import State
from tests.expected.architectures import tiny
from tests.methods.rounds import aggregated

A, B, BASE = (f"x.{n}.weight" for n in ("lora_A.default", "lora_B.default", "base_layer"))
WEIGHTS = [0.25, 0.75]
ONE: dict[str, Any] = {"rank": 1, "alpha": 3.0}


def state(b: list[list[float]], a: list[list[float]]) -> State:
    return {A: torch.tensor(a).float(), B: torch.tensor(b).float(), "head": torch.ones(1)}


# B A are [[2, 0], [0, 0], [0, 0]] and [[0, 0], [0, 4], [0, 0]]; the mean's are .5 and 3.
CLIENTS = [state([[2], [0], [0]], [[1, 0]]), state([[0], [2], [0]], [[0, 2]])]
BEFORE = {**state([[0], [0], [0]], [[1, 1]]), BASE: torch.ones(3, 2)}


def close(value: Tensor, expected: list[Any]) -> None:
    torch.testing.assert_close(value, torch.tensor(expected), rtol=1e-6, atol=1e-6)


def random_states(rank: int, out: int = 5, inner: int = 7) -> list[State]:
    torch.manual_seed(0)
    return [{B: torch.randn(out, rank), A: torch.randn(rank, inner)} for _ in WEIGHTS]


def adapted(*names: str, rank: int = 1, out: int = 3, inner: int = 2, kind: Any = None) -> Any:
    """Return linear layers of equal shapes with LoRA on them, as ``inject`` leaves a model.

    Args:
        names: the layers' names.
        rank: LoRA's rank.
        out: width of the layers' outputs.
        inner: width of the layers' inputs.
        kind: the layers' class, which takes (out, inner); ``nn.Linear`` by default.
    """
    layers = {name: kind(out, inner) if kind else nn.Linear(inner, out) for name in names}
    config = LoraConfig(r=rank, target_modules=list(names), fan_in_fan_out=kind is not None)
    return inject_adapter_in_model(config, nn.ModuleDict(layers))


def test_fedex_lora_puts_the_residual_into_the_base_weight() -> None:
    after = aggregated(FedExLoRA(**ONE), CLIENTS, WEIGHTS, BEFORE, model=adapted("x"))
    close(after[B], [[0.5], [1.5], [0.0]])
    close(after[A], [[0.25, 1.5]])
    # 1 + 3 (mean product - [[.125, .75], [.375, 2.25], [0, 0]])
    close(after[BASE], [[2.125, -1.25], [-0.125, 3.25], [1.0, 1.0]])
    assert after.keys() == BEFORE.keys()


def test_flora_puts_the_stack_into_the_base_weight_and_starts_anew() -> None:
    method = FLoRA(**ONE)
    after = aggregated(method, CLIENTS, WEIGHTS, BEFORE, model=adapted("x"))
    close(after[BASE], [[2.5, 1.0], [1.0, 10.0], [1.0, 1.0]])
    assert not after[B].any() and after[A].any()
    again = aggregated(FLoRA(**ONE), CLIENTS[::-1], WEIGHTS[::-1], BEFORE, model=adapted("x"))
    assert torch.equal(after[A], again[A])
    later = aggregated(method, CLIENTS, WEIGHTS, BEFORE, 2, model=adapted("x"))
    seeded = FLoRA(**ONE, fresh_seed=1)
    other = aggregated(seeded, CLIENTS, WEIGHTS, BEFORE, model=adapted("x"))
    assert not torch.equal(after[A], later[A]) and not torch.equal(after[A], other[A])
    wide = {A: torch.zeros(8, 400), B: torch.zeros(3, 8)}
    before = {BASE: torch.zeros(3, 400)}
    fresh = aggregated(FLoRA(), [wide], [1.0], before, model=adapted("x", rank=8, inner=400))[A]
    assert 0.049 < fresh.max() <= 0.05 and -0.05 <= fresh.min() < -0.049  # 1/sqrt(400)


def test_flora_s_modules_draw_apart() -> None:
    twice = {n.replace("x.", f"{m}."): v for m in ("x", "y") for n, v in CLIENTS[0].items()}
    before = {n.replace("x.", f"{m}."): v for m in ("x", "y") for n, v in BEFORE.items()}
    after = aggregated(FLoRA(**ONE), [twice], [1.0], before, model=adapted("x", "y"))
    assert not torch.equal(after[A], after[A.replace("x.", "y.")])


@pytest.mark.parametrize("method", [FedExLoRA(**ONE), FLoRA(**ONE)], ids=lambda m: type(m).__name__)
def test_the_change_of_a_transposed_base_weight_is_transposed(method: Method) -> None:
    """GPT-2's Conv1D holds (in, out); if it is square, only the server's model tells them apart."""
    clients = [state([[2], [0]], [[1, 0]]), state([[0], [2]], [[3, 0]])]
    before = {BASE: torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    plain, turned = (
        aggregated(method, clients, WEIGHTS, before, model=adapted("x", out=2, kind=kind))[BASE]
        for kind in (None, Conv1D)
    )
    change = plain - before[BASE]
    assert not torch.allclose(change, change.T)
    torch.testing.assert_close(turned - before[BASE], change.T)


def test_flexlora_keeps_the_largest_singular_values() -> None:
    after = aggregated(FlexLoRA(**ONE), CLIENTS, WEIGHTS, BEFORE)
    close(after[B] @ after[A], [[0.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    assert after[A].norm() == pytest.approx(1) and after[B].norm() == pytest.approx(3)
    close(after["head"], [1.0])


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 6, 9])
def test_truncated_is_the_svd_s_best(rank: int) -> None:
    """Each leading block is the best of its rank; beyond rank min(5, 7) there are zeros."""
    torch.manual_seed(1)
    b, a = torch.randn(5, 6).double(), torch.randn(6, 7).double()
    u, s, v = torch.linalg.svd(b @ a)
    left, right = truncated(b, a, rank)
    assert left.shape == (5, rank) and right.shape == (rank, 7)
    for r in range(1, min(rank, 5) + 1):
        best = u[:, :r] * s[:r] @ v[:r]
        torch.testing.assert_close(left[:, :r] @ right[:r], best)
    assert not left[:, 5:].any() and not right[5:].any()


def test_hetlora_weighs_by_the_norms_of_the_products() -> None:
    """Norms 2 and 4 give 1/3 and 2/3; the head goes by examples."""
    states = [CLIENTS[0] | {"head": torch.zeros(1)}, CLIENTS[1]]
    after = aggregated(HetLoRA(**ONE), states, WEIGHTS, BEFORE)
    close(after[B], [[2 / 3], [4 / 3], [0.0]])
    close(after[A], [[1 / 3, 4 / 3]])
    close(after["head"], [0.75])
    plain = aggregated(HetLoRA(**ONE, weighting="examples"), states, WEIGHTS, BEFORE)
    close(plain[B], [[0.5], [1.5], [0.0]])
    zero = [{**s, B: torch.zeros(3, 1)} for s in states]  # no product, no norm
    close(aggregated(HetLoRA(**ONE), zero, WEIGHTS, BEFORE)[A], [[0.25, 1.5]])


def test_fedsvd_turns_the_factors_and_keeps_their_product() -> None:
    states = random_states(3)
    before = {A: states[0][A], B: torch.zeros(5, 3)}
    sent = [{B: s[B]} for s in states]
    after = aggregated(FedSVD(rank=3), sent, WEIGHTS, before)
    mean = 0.25 * states[0][B] + 0.75 * states[1][B]
    torch.testing.assert_close(after[B] @ after[A], mean @ before[A])
    torch.testing.assert_close(after[A] @ after[A].T, torch.eye(3))
    assert not torch.allclose(after[A], before[A])
    every = FedSVD(rank=3, every=2)
    assert list(aggregated(every, sent, WEIGHTS, before)) == [B]
    assert set(aggregated(every, sent, WEIGHTS, before, 2)) == {A, B}


def rotated(start: State) -> list[State]:
    """Rotate a pair of factors once a client; the products stay."""
    turns = [torch.linalg.qr(torch.randn(3, 3))[0] for _ in WEIGHTS]
    return [{B: start[B] @ q, A: q.T @ start[A]} for q in turns]


@pytest.mark.parametrize("align", ["both", "A", "B"])
def test_fedrot_lora_undoes_rotations(align: str) -> None:
    """Rotated copies of one pair of factors average to that pair; their plain mean does not."""
    start = random_states(3)[0]
    after = aggregated(FedRotLoRA(rank=3, align=align), rotated(start), WEIGHTS, start)
    torch.testing.assert_close(after[B], start[B], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after[A], start[A], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("b", "a", "sign"), [(1.0, -3.0, -1.0), (3.0, -1.0, 1.0)], ids=["as A says", "as B says"]
)
def test_fedrot_lora_aligns_both_factors_by_the_sum_of_their_matches(
    b: float, a: float, sign: float
) -> None:
    """At rank 1 a rotation is a sign; the server's B and A are 1, so the match is b + a."""
    client, start = state([[b]], [[a]]), state([[1.0]], [[1.0]])
    after = aggregated(FedRotLoRA(rank=1), [client], [1.0], start)
    assert (after[B].item(), after[A].item()) == (sign * b, sign * a)


def test_fedrot_lora_keeps_one_client_s_product() -> None:
    start, other = random_states(3)
    one = aggregated(FedRotLoRA(rank=3), [other], [1.0], start)
    torch.testing.assert_close(one[B] @ one[A], other[B] @ other[A])


def test_fedrot_lora_turns_nothing_towards_a_b_of_zero() -> None:
    start = random_states(3)[0]
    (client, _), zero = rotated(start), {**start, B: torch.zeros(5, 3)}
    after = aggregated(FedRotLoRA(rank=3, align="B"), [client], [1.0], zero)
    torch.testing.assert_close(after[B], client[B])


def test_ravan_averages_what_scales_and_heads_stand_for() -> None:
    def client(scale: float, head: float) -> State:
        return {"x.scales": torch.tensor([scale]), "x.core": torch.tensor([[[head]]])}

    after = aggregated(Ravan(rank=1, heads=1), [client(2.0, 3.0), client(4.0, 5.0)], WEIGHTS)
    close(after["x.core"], [[[0.25 * 6 + 0.75 * 20]]])
    close(after["x.scales"], [1.0])
    assert {v.dtype for v in after.values()} == {torch.float32}


def test_bases_are_the_same_whatever_signs_an_svd_has(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    base, svd = torch.nn.Linear(7, 5), torch.linalg.svd
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0])

    def other(weight: Tensor, full_matrices: bool) -> tuple[Tensor, ...]:
        u, s, v = svd(weight, full_matrices=full_matrices)
        return u * signs, s, v * signs[:, None]

    first = CoreAdapter(base, base.weight, 4, init="svd")
    monkeypatch.setattr("torch.linalg.svd", other)
    again = CoreAdapter(base, base.weight, 4, init="svd")
    assert torch.equal(first.basis_out, again.basis_out)
    assert torch.equal(first.basis_in, again.basis_in)


@pytest.mark.parametrize("init", ["svd", "orthogonal"])
def test_cores_by_hand(init: str) -> None:
    """y = base(x) + sum of s_i B_i H_i A_i x, for a layer that is not square."""
    torch.manual_seed(3)
    base = torch.nn.Linear(7, 5)
    layer = CoreAdapter(base, base.weight, 2, heads=2, init=init, scaled=True)
    x = torch.randn(4, 7)
    torch.testing.assert_close(layer(x), base(x))
    assert layer.scales is not None
    with torch.no_grad():
        layer.core.normal_()
        layer.scales.normal_()
    parts = [
        layer.scales[i]
        * layer.basis_out[:, 2 * i : 2 * i + 2]
        @ h
        @ layer.basis_in[2 * i : 2 * i + 2]
        for i, h in enumerate(layer.core)
    ]
    torch.testing.assert_close(layer.dense(), parts[0] + parts[1])
    torch.testing.assert_close(layer(x), base(x) + x @ (parts[0] + parts[1]).T)
    torch.testing.assert_close(layer.basis_in @ layer.basis_in.T, torch.eye(4))
    torch.testing.assert_close(layer.basis_out.T @ layer.basis_out, torch.eye(4))
    if init == "svd":
        strongest = torch.linalg.matrix_norm(base.weight, 2)
        torch.testing.assert_close((base.weight @ layer.basis_in[0]).norm(), strongest)


@pytest.mark.parametrize("init", ["gradient", "svd", "orthogonal"])
def test_the_rank_of_a_core_is_checked_against_the_model(init: str) -> None:
    said = r"method\.rank must be <= 48, the smaller side of .*query \(48 x 48\), got 49"
    with pytest.raises(ValueError, match=said):
        FedSB(rank=49, init=init).inject(tiny("bert"))
    assert FedSB(rank=48, init=init).inject(tiny("bert"))


def test_sparse_delta_by_hand() -> None:
    base = torch.nn.Linear(3, 2, bias=False)
    layer = SparseDelta(base, torch.tensor([[0, 1, 1], [2, 0, 1]]), (2, 3))
    with torch.no_grad():
        layer.values.copy_(torch.tensor([5.0, 6.0, 7.0]))
    close(layer.dense(), [[0.0, 0.0, 5.0], [6.0, 7.0, 0.0]])
    x = torch.randn(2, 4, 3)
    torch.testing.assert_close(layer(x), base(x) + x @ layer.dense().T)
    layer(x).sum().backward()
    assert layer.values.grad is not None
    torch.testing.assert_close(layer.values.grad, x.sum((0, 1))[torch.tensor([2, 0, 1])])


@pytest.mark.parametrize("rank", [2, 5])
def test_slora_starts_lora_from_the_accumulated_change(rank: int) -> None:
    method = SLoRA(rank=rank, alpha=3.0, sparse_rounds=2, density=0.5)
    before = {A: torch.randn(rank, 7), B: torch.randn(5, rank)}
    values = "x.base_layer.values"
    index = method.places("x", (5, 7))
    states = [{values: torch.randn(18)} for _ in WEIGHTS]
    mean = 0.25 * states[0][values] + 0.75 * states[1][values]
    first = aggregated(method, states, WEIGHTS, before)
    assert list(first) == [values]
    torch.testing.assert_close(first[values], mean)
    after = aggregated(method, states, WEIGHTS, before, 2)
    change = torch.zeros(5, 7)
    change[index[0], index[1]] = mean
    u, s, v = torch.linalg.svd(change)
    best = u[:, :rank] * s[:rank] @ v[:rank]
    torch.testing.assert_close(3.0 / rank * after[B] @ after[A], best, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after[A] @ after[A].T, after[B].T @ after[B], rtol=1e-4, atol=1e-4)
    assert not after[values].any()
    assert list(aggregated(method, [before], [1.0], before, 3)) == [A, B]


def test_slora_s_places() -> None:
    method = SLoRA(density=0.25)
    rows, columns = method.places("x", (8, 16))
    assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == 32
    assert rows.max() < 8 <= columns.max() < 16
    assert torch.equal(torch.stack([rows, columns]), SLoRA(density=0.25).places("x", (8, 16)))
    assert not torch.equal(rows, method.places("y", (8, 16))[0])
    assert not torch.equal(rows, SLoRA(density=0.25, mask_seed=1).places("x", (8, 16))[0])
    assert SLoRA().places("x", (768, 768)).shape == (2, 708)  # .0012 of 589,824
    assert SLoRA().places("x", (4, 4)).shape == (2, 1)
