"""TT adapters and SCL's projection, forward and backward, against other ways to compute them.

    python -m benchmarks.layers [--repeats 5] [--threads 1] [--device cpu]

An adapter is compared with the same factors contracted by one ``torch.einsum``, with the dense
matrices built from them each time, and with two of tensorly-torch's factorized layers (optional:
``pip install tensorly-torch``) of the same ranks, both ways that it offers. Its TT has one factor
for a pair of an input and an output axis, FedTT's one for each axis, so that it has 1.4 to 2 times
the numbers. SCL's projection is compared with its dense product and with two ``nn.Linear``.

Each side's seconds are those of one call of forward and backward, with the gradient at the input,
as within a network.
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
# How tensorly-torch's users would cut a width and the bottleneck, as many axes each.
AXES = {768: (8, 8, 12), 1024: (8, 8, 16), 1280: (8, 10, 16), 4096: (16,) * 3, 5120: (16, 16, 20)}
LEAST_SECONDS = 0.03  # of a turn, which repeats a short call


class Built(nn.Module):
    """An adapter's own factors, used in another way."""

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
    """By the matrix, built each time."""
    return x @ layer.dense()


def by_einsum(layer: TensorTrain, x: Tensor) -> Tensor:
    """All factors and the rows in one einsum; the axes must end where the input does."""
    inputs = boundary(layer)
    assert inputs is not None
    axes, links = string.ascii_uppercase[: len(layer.shape)], string.ascii_lowercase
    terms = [f"{links[j]}{axes[j]}{links[j + 1]}" for j in range(len(axes))]
    given = ",".join([f"t{axes[:inputs]}".replace("t", "z"), *terms])
    rows = x.reshape(-1, *layer.shape[:inputs])
    y = torch.einsum(f"{given}->z{axes[inputs:]}", rows, *layer.factors())
    return y.reshape(*x.shape[:-1], layer.out_features)


def boundary(layer: TensorTrain) -> int | None:
    """How many axes make up the input; null where one straddles."""
    sizes = [math.prod(layer.shape[:j]) for j in range(len(layer.shape) + 1)]
    return sizes.index(layer.in_features) if layer.in_features in sizes else None


def factorized(width: int, rank: int, how: str) -> nn.Module:
    """An adapter of tensorly-torch's layers."""
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
    """The sides for a width and rank."""
    ours = TTAdapter(width, 64, rank)
    sides: dict[str, nn.Module] = {"fedpeft": ours, "dense": Built(ours, dense)}
    if boundary(ours.down) is not None and boundary(ours.up) is not None:
        sides["einsum"] = Built(ours, by_einsum)
    if find_spec("tltorch"):
        for how in ("factorized", "reconstructed"):
            sides[f"tensorly_{how}"] = factorized(width, rank, how)
    return sides


class DenseProjection(nn.Module):
    """SCL's by the product of its factors."""

    def __init__(self, layer: CompressedProjection) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = x @ (self.layer.project @ self.layer.compress).T
        return y if self.layer.bias is None else y + self.layer.bias


def projections(width: int, hidden: int) -> dict[str, nn.Module]:
    """The sides for SCL in an MLP of that width."""
    bias = torch.zeros(width)
    ours = CompressedProjection(torch.randn(width, hidden) / hidden**0.5, bias, COMPRESSION, "svd")
    two = nn.Sequential(nn.Linear(hidden, COMPRESSION, False), nn.Linear(COMPRESSION, width))
    return {"fedpeft": ours, "dense": DenseProjection(ours), "two_linear": two}


def timed(module: nn.Module, x: Tensor, upstream: Tensor) -> Callable[[], float]:
    """A turn: as many calls as fill ``LEAST_SECONDS``; the seconds of one."""

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
    """Milliseconds of each side, and its ratio to fedpeft's: above 1, fedpeft is faster."""
    x = torch.randn(tokens, inputs, device=args.device, requires_grad=True)
    upstream = torch.randn(tokens, outputs, device=args.device)
    sides = {name: timed(m.to(args.device), x, upstream) for name, m in modules.items()}
    seconds = interleaved(sides, args.repeats)
    others = [name for name in seconds if name != "fedpeft"]
    return {
        "tokens": tokens,
        "milliseconds": {n: float(f"{1e3 * s:.4g}") for n, s in medians(seconds).items()},
        "times_fedpeft": {n: ratio(seconds[n], seconds["fedpeft"]) for n in others},
    }


def least(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each other side, its least ratio and where."""
    found: dict[str, Any] = {}
    for row in rows:
        where = {k: row[k] for k in ("width", "rank", "hidden", "tokens") if k in row}
        for name, value in row["times_fedpeft"].items():
            if name not in found or value["median"] < found[name]["median"]:
                found[name] = {"median": value["median"], "at": where}
    return found


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
                found = compared(adapters(width, rank), width, width, tokens, args)
                tt.append({"width": width, "rank": rank} | found)
    for width, hidden in PROJECTIONS:
        for tokens in TOKENS:
            found = compared(projections(width, hidden), hidden, width, tokens, args)
            scl.append({"width": width, "hidden": hidden} | found)
    summary = {"tt_adapter": least(tt), "scl": least(scl)}
    save(args.name, {"threads": args.threads, "least": summary, "tt_adapter": tt, "scl": scl})


if __name__ == "__main__":
    main()
