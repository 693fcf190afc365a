"""TT layers against the definition of a tensor train, computed here by einsum in float64."""

import math
import string

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedpeft.nn.tensor_train import (
    SHAPES,
    AdaptedOutput,
    TTAdapter,
    TTLinear,
    factorize,
    tt_shape,
)

AFFORDABLE = [pair for pair in SHAPES if math.prod(pair) <= 2**20]
# (in, out); an axis straddles the border of input and output, evenly or not, or none does.
PAIRS = [(768, 64), (64, 768), (64, 1024), (1024, 64), (1280, 64), (64, 1600), (768, 768)]


def layer(i: int, o: int, rank: int, shape: tuple[int, ...] | None = None) -> TTLinear:
    torch.manual_seed(i + o + rank)
    return TTLinear(i, o, shape or tt_shape(i, o), rank).double()


def product(factors: list[Tensor], i: int, o: int) -> Tensor:
    """Return the matrix (i, o) of the factors, by one einsum over all axes."""
    links, axes = string.ascii_lowercase, string.ascii_uppercase
    terms = [links[j] + axes[j] + links[j + 1] for j in range(len(factors))]
    ends = links[0] + axes[: len(factors)] + links[len(factors)]
    tensors = [f.detach().numpy() for f in factors]
    path = ["einsum_path", *[(0, 1)] * (len(factors) - 1)]
    dense = np.einsum(",".join(terms) + "->" + ends, *tensors, optimize=path)
    return torch.from_numpy(dense.reshape(i, o))


def test_dense_is_the_definition_entry_by_entry() -> None:
    tt = layer(6, 20, rank=3, shape=(2, 3, 4, 5))
    slices = [f.detach().numpy() for f in tt.factors()]
    expected = np.zeros((2, 3, 4, 5))
    for a in np.ndindex(2, 3, 4, 5):
        entry = np.eye(1)
        for g, index in zip(slices, a, strict=True):
            entry = entry @ g[:, index, :]
        expected[a] = entry[0, 0]
    torch.testing.assert_close(tt.dense(), torch.from_numpy(expected.reshape(6, 20)))


@pytest.mark.parametrize("rank", [1, 5, 10])
@pytest.mark.parametrize(("i", "o"), AFFORDABLE)
def test_forward_equals_the_dense_product(i: int, o: int, rank: int) -> None:
    tt = layer(i, o, rank)
    x = torch.randn(3, i, dtype=torch.float64)
    dense = product(tt.factors(), i, o)
    torch.testing.assert_close(tt(x), x @ dense + tt.bias, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(tt.dense(), dense, rtol=1e-10, atol=1e-12)


def test_the_largest_shape_row_by_row() -> None:
    """4096 x 4096 is 8^8; a row is four slices times the matrix of the last four factors."""
    tt = layer(4096, 4096, rank=5)
    right = product([torch.eye(5, dtype=torch.float64)[None], *tt.factors()[4:]], 5, 4096)
    rows = [0, 1, 777, 4095]
    expected = []
    for row in rows:
        left = torch.eye(1, dtype=torch.float64)
        for factor, index in zip(tt.factors(), np.unravel_index(row, (8, 8, 8, 8)), strict=False):
            left = left @ factor[:, int(index)].detach()
        expected.append((left @ right)[0] + tt.bias.detach())
    x = torch.zeros(4, 4096, dtype=torch.float64)
    x[range(4), rows] = 1
    torch.testing.assert_close(tt(x), torch.stack(expected))


@pytest.mark.parametrize("batch", [(), (1,), (7,), (2, 3), (2, 1, 3), (0,)])
@pytest.mark.parametrize(("i", "o"), [(1024, 64), (1280, 64), (64, 768)])
def test_batch_shapes(i: int, o: int, batch: tuple[int, ...]) -> None:
    tt = layer(i, o, rank=5)
    x = torch.randn(*batch, i, dtype=torch.float64)
    y = tt(x)
    assert y.shape == (*batch, o)
    torch.testing.assert_close(y, x @ product(tt.factors(), i, o) + tt.bias)


def test_a_view_that_is_not_contiguous() -> None:
    tt = layer(768, 64, rank=5)
    x = torch.randn(768, 9, dtype=torch.float64).T
    torch.testing.assert_close(tt(x), x @ product(tt.factors(), 768, 64) + tt.bias)


@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize(("i", "o"), PAIRS)
def test_gradients_equal_those_through_the_dense_matrix(i: int, o: int, rank: int) -> None:
    tt = layer(i, o, rank)
    x = torch.randn(2, 3, i, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 3, o, dtype=torch.float64)
    inputs = [x, tt.bias, *tt.factors()]
    gradients = torch.autograd.grad(tt(x), inputs, upstream)
    # Another test checks dense(), and torch alone computes gradients through it.
    expected = torch.autograd.grad(x @ tt.dense() + tt.bias, inputs, upstream)
    for gradient, value in zip(gradients, expected, strict=True):
        assert value.abs().max() > 0
        torch.testing.assert_close(gradient, value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("i", "o", "rank", "count"),
    [
        (768, 64, 5, 780),
        (64, 768, 5, 780),
        (768, 64, 10, 2960),
        (4096, 64, 5, 1100),
        (64, 4096, 5, 1100),
        (4096, 64, 10, 4200),
        (1024, 64, 5, 840),
        (1024, 64, 10, 3280),
        (5120, 64, 5, 1065),
        (5120, 64, 10, 4130),
        (768, 768, 5, 920),
        (768, 768, 10, 3440),
        (4096, 4096, 5, 1280),
    ],
)
def test_exact_numbers_of_parameters(i: int, o: int, rank: int, count: int) -> None:
    tt = TTLinear(i, o, tt_shape(i, o), rank, device=torch.device("meta"))
    assert sum(factor.numel() for factor in tt.factors()) == count
    assert sum(p.numel() for p in tt.parameters()) == count + o


def test_names_and_shapes_of_the_factors() -> None:
    shapes = {name: tuple(p.shape) for name, p in layer(768, 64, rank=5).named_parameters()}
    assert shapes == {
        "factor_1_of_5": (1, 8, 5),
        "factor_2_of_5": (5, 8, 5),
        "factor_3_of_5": (5, 12, 5),
        "factor_4_of_5": (5, 8, 5),
        "factor_5_of_5": (5, 8, 1),
        "bias": (64,),
    }


@pytest.mark.parametrize(("i", "o", "rank"), [(768, 64, 5), (64, 768, 10), (768, 768, 5)])
def test_entries_start_with_variance_one_over_in_plus_out(i: int, o: int, rank: int) -> None:
    squares = []
    for seed in range(60):
        torch.manual_seed(seed)
        tt = TTLinear(i, o, tt_shape(i, o), rank)
        squares.append(float(tt.dense().detach().square().mean()))
        bound = o**-0.5
        assert 0.8 * bound < tt.bias.abs().max() <= bound
    assert np.mean(squares) == pytest.approx(1 / (i + o), rel=0.25)


def test_factors_start_with_loretta_s_scale() -> None:
    """The standard deviation is s^(1/J) / sqrt(r_j), with r_j the rank to the right, at last 1."""
    torch.manual_seed(0)
    tt = TTLinear(4096, 4096, tt_shape(4096, 4096), rank=30)
    scale = math.sqrt(1 / 8192)
    for j, factor in enumerate(tt.factors(), start=1):
        expected = scale ** (1 / 8) / math.sqrt(30 if j < 8 else 1)
        assert float(factor.detach().std()) == pytest.approx(
            expected, rel=0.2 if j in (1, 8) else 0.05
        )


@pytest.mark.parametrize(
    ("width", "factors"),
    [
        (768, (8, 8, 12)),
        (64, (8, 8)),
        (384, (6, 8, 8)),
        (4096, (8, 8, 8, 8)),
        (3072, (6, 8, 8, 8)),
        (48, (6, 8)),
        (31 * 32, (4, 8, 31)),
    ],
)
def test_factorize(width: int, factors: tuple[int, ...]) -> None:
    assert factorize(width) == factors


@pytest.mark.parametrize("width", [11008, 37, 2 * 43, 1])
def test_a_width_without_small_factors_is_named(width: int) -> None:
    with pytest.raises(ValueError, match=rf"width {width} cannot .* at most 32.*method\.shapes"):
        factorize(width)


def test_shapes_come_from_the_table_then_are_computed() -> None:
    assert tt_shape(768, 64) == tt_shape(64, 768) == (8, 8, 12, 8, 8)
    assert tt_shape(384, 64) == (6, 8, 8, 8, 8)
    assert tt_shape(64, 384) == (8, 8, 8, 8, 6)


@pytest.mark.parametrize(("i", "o"), SHAPES)
def test_a_shape_of_the_table_has_as_many_entries_as_its_matrix(i: int, o: int) -> None:
    assert math.prod(SHAPES[i, o]) == i * o


def test_a_configured_shape_wins_for_its_pair_only() -> None:
    shapes = {"768x64": [16, 48, 64], "11008x64": [16, 688, 8, 8]}
    assert tt_shape(768, 64, shapes) == (16, 48, 64)
    assert tt_shape(64, 768, shapes) == (8, 8, 12, 8, 8)
    assert tt_shape(11008, 64, shapes) == (16, 688, 8, 8)


@pytest.mark.parametrize("shape", [[8, 8, 12, 8], [768, 64], [-8, -8, 12, 8, 8]])
def test_a_wrong_shape_is_refused(shape: list[int]) -> None:
    with pytest.raises(ValueError, match=r"768x64 matrix must have at least three .* 49152"):
        tt_shape(768, 64, {"768x64": shape})


def test_rank_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="tt_rank must be >= 1, got 0"):
        TTLinear(768, 64, tt_shape(768, 64), 0)


THIN = [
    *[(768, 64, r) for r in (1, 5, 10, 59)],
    (64, 768, 5),
    (1024, 64, 5),
    (64, 1024, 10),
    (4096, 64, 5),
    (64, 4096, 5),
    (64, 1600, 5),
    (64, 5120, 5),
    (768, 768, 10),
    (384, 64, 5),
]


@pytest.mark.parametrize(("i", "o", "rank"), THIN)
def test_no_dense_matrix_where_thin_products_are_cheaper(
    i: int, o: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tt = layer(i, o, rank)
    x = torch.randn(2, i, dtype=torch.float64)
    expected = x @ tt.dense() + tt.bias
    monkeypatch.setattr(tt, "dense", lambda: pytest.fail("the dense matrix was built"))
    torch.testing.assert_close(tt(x), expected)


@pytest.mark.parametrize(("i", "o", "rank"), [(768, 64, 60), (64, 64, 40), (64, 768, 100)])
def test_the_dense_matrix_where_it_is_cheaper(
    i: int, o: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """768 x 64 at rank 59 costs 59 (768 + 64) = 49,088 < 49,152 a token, at rank 60 more."""
    tt = layer(i, o, rank)
    calls: list[int] = []
    dense = tt.dense
    monkeypatch.setattr(tt, "dense", lambda: calls.append(1) or dense())
    x = torch.randn(2, i, dtype=torch.float64)
    torch.testing.assert_close(tt(x), x @ product(tt.factors(), i, o) + tt.bias)
    assert calls == [1]


def test_adapter_is_x_plus_up_of_relu_of_down() -> None:
    torch.manual_seed(0)
    adapter = TTAdapter(768, 64, rank=5).double()
    x = torch.randn(2, 4, 768, dtype=torch.float64)
    down = product(adapter.down.factors(), 768, 64)
    up = product(adapter.up.factors(), 64, 768)
    inner = (x @ down + adapter.down.bias).clamp(min=0)
    assert 0.2 < (inner > 0).double().mean() < 0.8
    torch.testing.assert_close(adapter(x), x + inner @ up + adapter.up.bias)


def test_zero_last_starts_as_the_identity_and_can_learn() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 768)
    adapter = TTAdapter(768, 64, rank=5, zero_last=True)
    assert torch.equal(adapter(x), x)
    adapter(x).square().sum().backward()
    last = adapter.up.factors()[-1]
    assert last.grad is not None and last.grad.abs().max() > 0
    normal = TTAdapter(768, 64, rank=5)
    assert 0.02 < float((normal(x) - x).detach().norm() / x.norm()) < 0.5


def test_adapter_takes_configured_shapes_both_ways() -> None:
    adapter = TTAdapter(768, 32, 5, {"768x32": [24, 32, 32], "32x768": [32, 32, 24]})
    assert (adapter.down.shape, adapter.up.shape) == ((24, 32, 32), (32, 32, 24))


def test_adapted_output_feeds_the_projection_to_the_adapter() -> None:
    projection, adapter = nn.Linear(10, 768), TTAdapter(768, 64, 5)
    x = torch.randn(3, 10)
    torch.testing.assert_close(
        AdaptedOutput(projection, adapter)(x), adapter(x @ projection.weight.T + projection.bias)
    )
