"""Time TT adapters and SCL's projection, forward and backward, against other implementations.

    python -m benchmarks.layers [--repeats 5] [--threads 1] [--device cpu]

A TT adapter is compared with the same factors contracted by one ``torch.einsum``, with the same
factors multiplied to dense matrices in each call, and with two factorized layers of the same ranks
from tensorly-torch (optional: ``pip install tensorly-torch``) in both of its implementations.
tensorly-torch has one factor for each pair of an input and an output axis where FedTT has one for
each axis, so its layers have 1.4 to 2 times the numbers. SCL's projection is compared with the
dense product of its factors and with two ``nn.Linear``.

A side's time is the time of one forward and backward call with a gradient at the input, as within
a network.
"""

import argparse
import math
import string
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import REPEATS, interleaved, medians, ratio, save
from fedpeft.nn.scl import CompressedProjection
from fedpeft.nn.tensor_train import TensorTrain, TTAdapter

WIDTHS = (768, 1024, 1280, 4096, 5120)
RANKS = (5, 10)
TOKENS = (64, 256, 1024, 4096, 16384)
PROJECTIONS = ((384, 1536), (768, 3072), (2048, 5632))  # MiniLM, RoBERTa-base, TinyLlama
COMPRESSION = 64
# Axes into which a user of tensorly-torch would cut a width: three, as many as the bottleneck has.
AXES = {768: (8, 8, 12), 1024: (8, 8, 16), 1280: (8, 10, 16), 4096: (16,) * 3, 5120: (16, 16, 20)}
LEAST_SECONDS = 0.03  # seconds of a turn, so a short call is repeated


class Built(nn.Module):
    """An adapter with the factors of a ``TTAdapter``, multiplied in another way.

    Args:
        adapter: holds factors and biases.
        product: multiplies rows (..., in) by a tensor train; returns (..., out).
    """

    def __init__(
        self, adapter: TTAdapter, product: Callable[[TensorTrain, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.adapter, self.product = adapter, product

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.adapter.down, self.adapter.up
        hidden = torch.relu(self.product(down, x) + down.bias)
        return x + self.product(up, hidden) + up.bias


def dense(layer: TensorTrain, x: Tensor) -> Tensor:
    """Multiply the rows by the dense matrix, built anew in each call."""
    return x @ layer.dense()


def by_einsum(layer: TensorTrain, x: Tensor) -> Tensor:
    """Multiply the rows by all factors in one einsum; no axis may belong to input and output."""
    inputs = boundary(layer)
    assert inputs is not None
    axes, links = string.ascii_uppercase[: len(layer.shape)], string.ascii_lowercase
    terms = [f"{links[j]}{axes[j]}{links[j + 1]}" for j in range(len(axes))]
    operands = ",".join([f"z{axes[:inputs]}", *terms])
    rows = x.reshape(-1, *layer.shape[:inputs])
    y = torch.einsum(f"{operands}->z{axes[inputs:]}", rows, *layer.factors())
    return y.reshape(*x.shape[:-1], layer.out_features)


def boundary(layer: TensorTrain) -> int | None:
    """Return how many axes make up the input; null if one belongs to both input and output."""
    sizes = [math.prod(layer.shape[:j]) for j in range(len(layer.shape) + 1)]
    return sizes.index(layer.in_features) if layer.in_features in sizes else None


def factorized(width: int, rank: int, how: str) -> nn.Module:
    """Build an adapter of tensorly-torch's layers.

    Args:
        width: input and output features; a key of ``AXES``.
        rank: rank of the block tensor train.
        how: tensorly-torch's implementation, ``factorized`` or ``reconstructed``.
    """
    import tltorch  # type: ignore[import-not-found]

    def linear(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> nn.Module:
        return tltorch.FactorizedLinear(
            inputs, outputs, factorization="blocktt", rank=rank, implementation=how
        )

    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = linear(AXES[width], (4, 4, 4))
            self.up = linear((4, 4, 4), AXES[width])

        def forward(self, x: Tensor) -> Tensor:
            return x + self.up(torch.relu(self.down(x)))

    return Adapter()


def adapters(width: int, rank: int) -> dict[str, nn.Module]:
    """Build each side's TT adapter of a width and rank."""
    ours = TTAdapter(width, 64, rank)
    sides: dict[str, nn.Module] = {"fedpeft": ours, "dense": Built(ours, dense)}
    if boundary(ours.down) is not None and boundary(ours.up) is not None:
        sides["einsum"] = Built(ours, by_einsum)
    if find_spec("tltorch"):
        for how in ("factorized", "reconstructed"):
            sides[f"tensorly_{how}"] = factorized(width, rank, how)
    return sides


class DenseProjection(nn.Module):
    """SCL's projection by the dense product of its factors."""

    def __init__(self, layer: CompressedProjection) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = x @ (self.layer.project @ self.layer.compress).T
        return y if self.layer.bias is None else y + self.layer.bias


def projections(width: int, hidden: int) -> dict[str, nn.Module]:
    """Build each side's SCL projection for an MLP's (width, hidden) weight."""
    bias = torch.zeros(width)
    ours = CompressedProjection(torch.randn(width, hidden) / hidden**0.5, bias, COMPRESSION, "svd")
    two = nn.Sequential(nn.Linear(hidden, COMPRESSION, False), nn.Linear(COMPRESSION, width))
    return {"fedpeft": ours, "dense": DenseProjection(ours), "two_linear": two}


def timed(module: nn.Module, x: Tensor, upstream: Tensor) -> Callable[[], float]:
    """Return a function that repeats a call for ``LEAST_SECONDS`` and returns the seconds of one.

    Args:
        module: called once before the calls that count.
        x: input (tokens, in) that requires a gradient.
        upstream: gradient at the output (tokens, out).
    """

    def call() -> None:
        module(x).backward(upstream)

    call()
    begun = time.perf_counter()
    call()
    _wait(x)
    count = max(1, math.ceil(LEAST_SECONDS / (time.perf_counter() - begun)))

    def turn() -> float:
        begun = time.perf_counter()
        for _ in range(count):
            call()
        _wait(x)
        return (time.perf_counter() - begun) / count

    return turn


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def compared(
    modules: Mapping[str, nn.Module], inputs: int, outputs: int, tokens: int, args: Any
) -> dict[str, Any]:
    """Time all sides on random input.

    Args:
        modules: the sides by name; ``fedpeft`` is one of them.
        inputs: input features.
        outputs: output features.
        tokens: rows of the input.
        args: the command's ``device`` and ``repeats``.

    Returns:
        The milliseconds of each side, and its ratio to fedpeft's; above 1, fedpeft is faster.
    """
    x = torch.randn(tokens, inputs, device=args.device, requires_grad=True)
    upstream = torch.randn(tokens, outputs, device=args.device)
    sides = {name: timed(m.to(args.device), x, upstream) for name, m in modules.items()}
    seconds = interleaved(sides, args.repeats)
    return {
        "tokens": tokens,
        "milliseconds": {n: float(f"{1e3 * s:.4g}") for n, s in medians(seconds).items()},
        "times_fedpeft": {
            n: ratio(s, seconds["fedpeft"]) for n, s in seconds.items() if n != "fedpeft"
        },
    }


def least(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the least ratio of each side but fedpeft's, and the size at which it is so."""
    worst: dict[str, Any] = {}
    for row in rows:
        size = {k: row[k] for k in ("width", "rank", "hidden", "tokens") if k in row}
        for name, value in row["times_fedpeft"].items():
            if name not in worst or value["median"] < worst[name]["median"]:
                worst[name] = {"median": value["median"], "at": size}
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="layers")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tt, scl = [], []
    for width in WIDTHS:
        for rank in RANKS:
            for tokens in TOKENS:
                row = compared(adapters(width, rank), width, width, tokens, args)
                tt.append({"width": width, "rank": rank} | row)
    for width, hidden in PROJECTIONS:
        for tokens in TOKENS:
            row = compared(projections(width, hidden), hidden, width, tokens, args)
            scl.append({"width": width, "hidden": hidden} | row)
    summary = {"tt_adapter": least(tt), "scl": least(scl)}
    save(args.name, {"threads": args.threads, "least": summary, "tt_adapter": tt, "scl": scl})


if __name__ == "__main__":
    main()
