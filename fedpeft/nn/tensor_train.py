"""Tensor-train (TT) linear layers and adapters (FedTT, https://arxiv.org/abs/2410.13097)."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedpeft.nn.thin import ThinAdapter, ThinLinear, without_autocast

# TT axes by (in, out), from the papers of FedTT and of LoRETTA, on which it builds. Their entry for
# 2304, [8, 8, 8, 8, 8, 9], fits a bottleneck of 128, so axes of 2304 x 64 are computed.
SHAPES: dict[tuple[int, int], tuple[int, ...]] = {
    (768, 64): (8, 8, 12, 8, 8),
    (64, 768): (8, 8, 12, 8, 8),
    (4096, 64): (16, 16, 16, 4, 4, 4),
    (64, 4096): (4, 4, 4, 16, 16, 16),
    **{pair: (4, 8, 8, 8, 8, 4) for pair in ((1024, 64), (64, 1024))},
    **{pair: (4, 8, 8, 8, 8, 5) for pair in ((1280, 64), (64, 1280))},
    **{pair: (4, 8, 8, 8, 8, 6) for pair in ((1536, 64), (64, 1536))},
    **{pair: (5, 8, 8, 8, 8, 5) for pair in ((1600, 64), (64, 1600))},
    **{pair: (8, 8, 8, 8, 8, 9) for pair in ((2304, 128), (128, 2304))},
    **{pair: (5, 8, 8, 16, 8, 8) for pair in ((5120, 64), (64, 5120))},
    **{pair: (4, 16, 16, 16, 8, 4) for pair in ((8192, 64), (64, 8192))},
    (768, 768): (12, 8, 8, 8, 8, 12),
    (1024, 1024): (4, 8, 8, 16, 8, 8, 4),
    (4096, 4096): (8,) * 8,
}
LARGEST_FACTOR = 32


def factorize(width: int) -> tuple[int, ...]:
    """Split a width into about log2(width)/3 balanced factors, largest last: 768 = 8 x 8 x 12.

    Raises:
        ValueError: a prime factor of ``width`` is larger than 32, so the TT would not be small.
    """
    primes: list[int] = []
    rest, prime = width, 2
    while rest > 1:
        while rest % prime == 0:
            primes.append(prime)
            rest //= prime
        prime += 1
    if not primes or primes[-1] > LARGEST_FACTOR:
        raise ValueError(
            f"width {width} cannot be split into factors of at most {LARGEST_FACTOR}: "
            "give a shape for it with method.shapes"
        )
    factors = [1] * max(2, round(math.log2(width) / 3))
    for prime in reversed(primes):
        factors[factors.index(min(factors))] *= prime
    return tuple(sorted(f for f in factors if f > 1))


def tt_shape(
    in_features: int, out_features: int, shapes: Mapping[str, Sequence[int]] | None = None
) -> tuple[int, ...]:
    """Return the TT axes (k_1..k_J) of an (in, out) matrix.

    They come from ``shapes``, else from the papers' table, else from ``factorize``.

    Args:
        in_features: the matrix's rows.
        out_features: the matrix's columns.
        shapes: the user's TT axes, by ``"{in}x{out}"``.

    Raises:
        ValueError: the axes' product is not ``in_features * out_features``, or there are fewer
            than three, or a width has no small factors.
    """
    axes = (shapes or {}).get(f"{in_features}x{out_features}")
    shape = tuple(axes) if axes else SHAPES.get((in_features, out_features))
    if shape is None:
        shape = factorize(in_features) + factorize(out_features)[::-1]
    if math.prod(shape) != in_features * out_features or len(shape) < 3 or min(shape) < 1:
        raise ValueError(
            f"TT shape {list(shape)} of a {in_features}x{out_features} matrix must have at least "
            f"three axes with product {in_features * out_features}, got {math.prod(shape)}"
        )
    return shape


class TensorTrain(nn.Module):
    """W, as a tensor train, and b of ``y = x W + b``.

    ``W[a_1..a_J] = G_1[:,a_1,:] ... G_J[:,a_J,:]``, reshaped to (in, out).

    Parameter ``factor_j_of_J`` is G_j, (r_{j-1}, k_j, r_j), r_0 = r_J = 1, inner ranks ``rank``.
    The train is cut where input turns into output, and x is multiplied by the two thin sides,
    unless the dense W costs fewer multiply-adds a token. Products are in the dtype of x, also under
    autocast.

    Args:
        in_features: rows of W.
        out_features: columns of W.
        shape: axes k_1..k_J with product in_features * out_features.
        rank: inner TT rank, >= 1.
        device: the parameters' device; null for torch's default.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        shape: Sequence[int],
        rank: int,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"tt_rank must be >= 1, got {rank}")
        self.in_features, self.out_features = in_features, out_features
        self.shape, self.rank = tuple(shape), rank
        ranks = [1, *[rank] * (len(self.shape) - 1), 1]
        self._names = [f"factor_{j + 1}_of_{len(self.shape)}" for j in range(len(self.shape))]
        for j, name in enumerate(self._names):
            factor = torch.empty(ranks[j], self.shape[j], ranks[j + 1], device=device)
            self.register_parameter(name, nn.Parameter(factor))
        self.bias = nn.Parameter(torch.empty(out_features, device=device))
        self.cut = self._cut()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the factors and the bias, as LoRETTA's code does, on which FedTT builds.

        Entries of G_j are N(0, 1) / sqrt(r_j) * s^(1/J), so that entries of W have standard
        deviation s = sqrt(1 / (in + out)).
        """
        scale = math.sqrt(1 / (self.in_features + self.out_features)) ** (1 / len(self.shape))
        for factor in self.factors():
            nn.init.normal_(factor, std=scale / math.sqrt(factor.shape[2]))
        bound = 1 / math.sqrt(self.out_features)
        nn.init.uniform_(self.bias, -bound, bound)

    def factors(self) -> list[Tensor]:
        """Return the factors G_1..G_J in order."""
        return [getattr(self, name) for name in self._names]

    def _cut(self) -> tuple[int, int, int] | None:
        """Return the cheapest cut (j, s, q), or null if W costs no more multiply-adds a token.

        L is made of the first j factors, R of the others. Where the axes' product meets the input's
        width only across an axis, either s slots of the input stay for R, or q slots of the output
        already come out of L; else both are 1. Forward and the two products of backward cost alike,
        and every build is a part of W's, so the choice holds for any number of tokens.
        """
        options: list[tuple[int, tuple[int, int, int] | None]]
        options = [(self.in_features * self.out_features, None)]
        inside = 1
        for j, k in enumerate(self.shape[:-1], start=1):
            inside *= k
            s, q = max(1, self.in_features // inside), max(1, inside // self.in_features)
            if self.in_features * q == inside * s:
                cost = self.rank * s * (self.in_features * q + self.out_features)
                options.append((cost, (j, s, q)))
        return min(options, key=lambda option: option[0])[1]

    def dense(self) -> Tensor:
        """Return W, (in, out)."""
        return _chain(self.factors()).reshape(self.in_features, self.out_features)

    def parts(self, dtype: torch.dtype) -> list[Tensor]:
        """Return L (in, q * m), R (m, out / q) and b (1, out) of ``ThinLinear``, m = s * rank."""
        assert self.cut is not None, "the dense matrix costs less"
        j, s, _ = self.cut
        factors = self.factors()
        left = _chain(factors[:j]).reshape(self.in_features // s, -1)
        right = _chain(factors[j:]).reshape(self.rank, -1)
        if s > 1:  # every slot gets its columns of L, so one product takes x as it lies in memory
            left = torch.kron(left, torch.eye(s, dtype=left.dtype, device=left.device))
            right = right.reshape(left.shape[1], -1)
        return [part.to(dtype) for part in (left, right, self.bias[None])]

    def times(self, x: Tensor) -> Tensor:
        """Return x W + b, from (..., in) to (..., out)."""
        rows = x.reshape(-1, self.in_features)
        with without_autocast(x.device):
            if self.cut is None:
                y = torch.addmm(self.bias.to(x.dtype), rows, self.dense().to(x.dtype))
            else:
                y, _ = ThinLinear.apply(rows, *self.parts(x.dtype))
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, shape={self.shape}, rank={self.rank}"


class TTLinear(TensorTrain):
    """A linear layer whose weight is a tensor train."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return self.times(x)


def _chain(factors: Sequence[Tensor]) -> Tensor:
    """Contract neighbouring factors (r_0, k_1, r_1) .. (r_{n-1}, k_n, r_n) from the cheaper end.

    Returns:
        (k_1 * .. * k_n, r_n) if r_0 is 1, else (r_0, k_1 * .. * k_n * r_n), in row-major order.
    """
    first, last = factors[0].shape[0], factors[-1].shape[2]
    if last == 1:  # from the right every intermediate is (r, k..) and stays thin
        product = factors[-1].reshape(factors[-1].shape[0], -1)
        for factor in reversed(factors[:-1]):
            r0, k, r1 = factor.shape
            product = (factor.reshape(r0 * k, r1) @ product).reshape(r0, -1)
    else:
        product = factors[0].reshape(-1, factors[0].shape[2])
        for factor in factors[1:]:
            r0, k, r1 = factor.shape
            product = (product @ factor.reshape(r0, k * r1)).reshape(-1, r1)
    return product.reshape(-1, last) if first == 1 else product.reshape(first, -1)


class TTAdapter(nn.Module):
    """``x + up(relu(down(x)))`` with TT matrices down (width, bottleneck) and up.

    ``down`` and ``up`` only hold parameters and are not called, because the adapter is one product
    where both have a cut. The activation is open in the paper; ReLU is used.

    Args:
        width: features of input and output.
        bottleneck: inner width.
        rank: inner TT rank of both matrices, >= 1.
        shapes: the user's TT axes, see ``tt_shape``.
        zero_last: start the last factor of ``up`` and its bias at zero, so that the adapter starts
            as the identity.
        device: the parameters' device; null for torch's default.
    """

    def __init__(
        self,
        width: int,
        bottleneck: int,
        rank: int,
        shapes: Mapping[str, Sequence[int]] | None = None,
        zero_last: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        down, up = tt_shape(width, bottleneck, shapes), tt_shape(bottleneck, width, shapes)
        self.down = TensorTrain(width, bottleneck, down, rank, device)
        self.up = TensorTrain(bottleneck, width, up, rank, device)
        if zero_last:
            nn.init.zeros_(self.up.factors()[-1])
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        if self.down.cut is None or self.up.cut is None:
            return x + self.up.times(torch.relu(self.down.times(x)))
        with without_autocast(x.device):
            parts = self.down.parts(x.dtype) + self.up.parts(x.dtype)
            y, *_ = ThinAdapter.apply(x.reshape(-1, x.shape[-1]), *parts)
        return y.reshape(x.shape)


class AdaptedOutput(nn.Module):
    """A frozen projection with an adapter on its output, before dropout, residual and LayerNorm.

    The output has the projection's dtype, also if the adapter has another.

    Args:
        projection: a linear layer.
        adapter: maps the projection's output to the same shape.
        copies: return a copy, which a model may change in place; autograd refuses to let it change
            the result of a custom function.
    """

    def __init__(self, projection: nn.Module, adapter: nn.Module, copies: bool = False) -> None:
        super().__init__()
        self.copies = copies
        self.projection = projection
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        y = self.projection(x)
        adapted = self.adapter(y).to(y.dtype)
        return adapted.clone() if self.copies else adapted
