"""Tensor-train (TT) linear layers and adapters (FedTT, https://arxiv.org/abs/2410.13097)."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedpeft.nn.thin import ThinAdapter, ThinLinear, without_autocast

# The papers' factorisations (FedTT, and LoRETTA on which it builds), by (in, out). Their entry for
# 2304, [8, 8, 8, 8, 8, 9], is that of a bottleneck of 128: 2304 x 64 is computed.
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
    """Splits a width into about log2(width)/3 balanced factors, largest last: 768 = 8 x 8 x 12.

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
    """The TT axes (k_1..k_J) of an (in, out) matrix: given, from the papers' table, or computed.

    Args:
        shapes: user's factorisations, keyed ``"{in}x{out}"``.

    Raises:
        ValueError: the axes' product is not ``in_features * out_features``, or there are fewer
            than three, or a width has no small factors.
    """
    given = (shapes or {}).get(f"{in_features}x{out_features}")
    shape = tuple(given) if given else SHAPES.get((in_features, out_features))
    if shape is None:
        shape = factorize(in_features) + factorize(out_features)[::-1]
    if math.prod(shape) != in_features * out_features or len(shape) < 3 or min(shape) < 1:
        raise ValueError(
            f"TT shape {list(shape)} of a {in_features}x{out_features} matrix must have at least "
            f"three axes with product {in_features * out_features}, got {math.prod(shape)}"
        )
    return shape


class TensorTrain(nn.Module):
    """W and b of ``y = x W + b``.

    ``W[a_1..a_J] = G_1[:,a_1,:] ... G_J[:,a_J,:]``, reshaped to (in, out).

    Parameter ``factor_j_of_J`` is G_j, (r_{j-1}, k_j, r_j), r_0 = r_J = 1, inner ranks ``rank``.
    Cuts the train where input turns into output and multiplies by the two thin sides, in the
    dtype of x whatever autocast says, unless the dense W costs fewer multiply-adds a token.

    Args:
        shape: axes k_1..k_J with product in_features * out_features.
        rank: inner TT rank, >= 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        shape: Sequence[int],
        rank: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"tt_rank must be >= 1, got {rank}")
        self.in_features, self.out_features = in_features, out_features
        self.shape, self.rank = tuple(shape), rank
        ranks = [1, *[rank] * (len(self.shape) - 1), 1]
        self._names = [f"factor_{j + 1}_of_{len(self.shape)}" for j in range(len(self.shape))]
        for j, name in enumerate(self._names):
            factor = torch.empty(ranks[j], self.shape[j], ranks[j + 1], device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(factor))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        self.cut = self._cut()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0,1)/sqrt(r_j) * s^(1/J), so that entries of W have std s = sqrt(1/(in+out)).

        Source: LoRETTA's code, on which FedTT builds.
        """
        scale = math.sqrt(1 / (self.in_features + self.out_features)) ** (1 / len(self.shape))
        for factor in self.factors():
            nn.init.normal_(factor, std=scale / math.sqrt(factor.shape[2]))
        bound = 1 / math.sqrt(self.out_features)
        nn.init.uniform_(self.bias, -bound, bound)

    def factors(self) -> list[Tensor]:
        """The factors G_1..G_J in order."""
        return [getattr(self, name) for name in self._names]

    def _cut(self) -> tuple[int, int, int] | None:
        """The cheapest cut (j, s, q): L is made of the first j factors, R of the others.

        Where the axes' product meets the input's width only across an axis, either s slots of the
        input stay for R, or q slots of the output already come out of L; else both are 1.
        None where W costs no more multiply-adds a token. Forward and the two products of backward
        cost alike, and every build is a part of W's, so the choice holds for any number of tokens.
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
        """W, (in, out)."""
        return _chain(self.factors()).reshape(self.in_features, self.out_features)

    def parts(self, dtype: torch.dtype) -> list[Tensor]:
        """L (in, q * m), R (m, out / q) and b (1, out) of ``ThinLinear``, m = s * rank."""
        assert self.cut is not None, "the dense matrix costs less"
        j, s, _ = self.cut
        factors = self.factors()
        left = _chain(factors[:j]).reshape(self.in_features // s, -1)
        right = _chain(factors[j:]).reshape(self.rank, -1)
        if s > 1:  # columns of its own for every slot: one product with x as it lies in memory
            left = torch.kron(left, torch.eye(s, dtype=left.dtype, device=left.device))
            right = right.reshape(left.shape[1], -1)
        return [part.to(dtype) for part in (left, right, self.bias[None])]

    def times(self, x: Tensor) -> Tensor:
        """x W + b, (..., in) to (..., out)."""
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
    """A linear layer by a tensor train."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return self.times(x)


def _chain(factors: Sequence[Tensor]) -> Tensor:
    """Contracts neighbouring factors from the cheaper end: (r_first * k.. , r_last) as one matrix.

    Rows run over (r_first, k_1, k_2, ...) in row-major order.
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

    It multiplies by them at once; they are not called.

    The activation is open in the paper; ReLU is used.

    Args:
        zero_last: last factor of ``up`` and its bias start at zero, so the adapter is the identity.
    """

    def __init__(
        self,
        width: int,
        bottleneck: int,
        rank: int,
        shapes: Mapping[str, Sequence[int]] | None = None,
        zero_last: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        down, up = tt_shape(width, bottleneck, shapes), tt_shape(bottleneck, width, shapes)
        self.down = TensorTrain(width, bottleneck, down, rank, device, dtype)
        self.up = TensorTrain(bottleneck, width, up, rank, device, dtype)
        if zero_last:
            nn.init.zeros_(self.up.factors()[-1])
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to (..., width)."""
        if self.down.cut is None or self.up.cut is None:
            return x + self.up.times(torch.relu(self.down.times(x)))
        with without_autocast(x.device):
            parts = self.down.parts(x.dtype) + self.up.parts(x.dtype)
            y, *_ = ThinAdapter.apply(x.reshape(-1, x.shape[-1]), *parts)
        return y.reshape(x.shape)


class AdaptedOutput(nn.Module):
    """An adapter on the output of a frozen projection, before dropout, residual and LayerNorm.

    What comes out has the projection's dtype, whatever the adapter's own.
    """

    def __init__(self, projection: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.projection = projection
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        y = self.projection(x)
        return self.adapter(y).to(y.dtype)
