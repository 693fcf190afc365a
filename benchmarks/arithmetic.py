"""Time a client's steps on a CPU in one thread, with and without what makes them cheaper.

    python -m benchmarks.arithmetic FOLDER_OF_SST2 [--steps 20] [--compiled]

MiniLM with LoRA of rank 8 takes forward and backward passes over batches of sixteen rows of SST-2,
without dropout, so that all sides compute the same losses:

- plain: float32, rows in any order. The ratio of plain to another side is what that side saves.
- buckets: batches of rows of like length; all sides below have them too.
- bf16_all: bfloat16 autocast, in attention too.
- bf16: bfloat16 except in attention over short sequences, which is what fedpeft does.
- compiled: ``torch.compile`` of bf16, only with --compiled, because it needs a C compiler. fedpeft
  has no such option, because compiling for so many lengths takes minutes.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import REPEATS, interleaved, medians, ratio, save, spread
from benchmarks.round import batches
from benchmarks.sides import job
from fedpeft.config.load import load_config
from fedpeft.data.batching import Batch
from fedpeft.engine.engine import Engine
from fedpeft.engine.passes import autocast

CPU = torch.device("cpu")
DRY = [f"model.settings.{name}_dropout_prob=0.0" for name in ("hidden", "attention_probs")]
FP32, BF16 = (partial(autocast, CPU, precision) for precision in ("fp32", "bf16"))
BF16_ALL = partial(torch.autocast, "cpu", torch.bfloat16, cache_enabled=False)
Loss = Callable[[nn.Module, Batch], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, help="folder of SST-2")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--steps", type=int, default=20, help="of a client and round")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--compiled", action="store_true")
    args = parser.parse_args()
    plain = _engine(args, "bucketing=false")
    bucketed = _engine(args, "bucketing=true")
    model, loss = bucketed.replica.model.train(), partial(_loss, bucketed)
    any_order, alike = _batches(plain, args.clients), _batches(bucketed, args.clients)
    sides: dict[str, Callable[[], float]] = {
        "plain": lambda: steps(model, any_order, loss, FP32),
        "buckets": lambda: steps(model, alike, loss, FP32),
        "bf16_all": lambda: steps(model, alike, loss, BF16_ALL),
        "bf16": lambda: steps(model, alike, loss, BF16),
    }
    result: dict[str, Any] = {"steps_a_client": args.steps, "clients": args.clients}
    result["tokens"] = {
        "plain": sum(batch["input_ids"].numel() for batch in any_order),
        "buckets": sum(batch["input_ids"].numel() for batch in alike),
        "real": sum(int(batch["attention_mask"].sum()) for batch in alike),
    }
    if args.compiled:
        compiled = torch.compile(model, dynamic=True)
        sides["compiled"] = lambda: steps(compiled, alike, loss, BF16)  # type: ignore[arg-type]
        begun = time.perf_counter()
        sides["compiled"]()
        result["seconds_of_the_first_compiled_pass"] = round(time.perf_counter() - begun, 1)
    timings = interleaved(sides, args.repeats)
    save(f"arithmetic_{args.steps}_steps", result | _summary(timings, len(alike)))


def _engine(args: argparse.Namespace, bucketing: str) -> Engine:
    """Return an engine of the job without dropout, with or without bucketing."""
    size = ["num_clients=10", "batch_size=16", f"local_steps={args.steps}", "runtime=inprocess"]
    overrides = [*job(str(args.data.resolve())), *size, *DRY, bucketing]
    return Engine(load_config(overrides))


def _batches(engine: Engine, clients: int) -> list[Batch]:
    """Return the batches of the first clients in round 1."""
    return [batch for client in range(clients) for batch in batches(engine, client, 1)]


def _loss(engine: Engine, model: nn.Module, batch: Batch) -> Tensor:
    return engine.task.loss(engine.task.forward(model, batch), batch)


def _summary(timings: Mapping[str, Sequence[float]], num_steps: int) -> dict[str, Any]:
    """Return the time of a step on each side, and the ratio of plain to each other side."""
    plain = timings["plain"]
    return {
        "milliseconds_a_step": medians(
            {name: [1e3 * s / num_steps for s in seconds] for name, seconds in timings.items()}
        ),
        "range_of_seconds": {name: spread(seconds) for name, seconds in timings.items()},
        "plain / ": {n: ratio(plain, seconds) for n, seconds in timings.items() if n != "plain"},
    }


def steps(
    model: nn.Module,
    batches: Sequence[Batch],
    loss: Loss,
    casting: Callable[[], AbstractContextManager[Any]],
) -> float:
    """Take a forward and a backward pass over each batch.

    Args:
        model: the model; its gradients are dropped at the end.
        batches: one batch for each step.
        loss: returns the mean loss of a batch.
        casting: opens the context of a forward pass.

    Returns:
        The seconds of all passes.
    """
    begun = time.perf_counter()
    for batch in batches:
        with casting():
            value = loss(model, batch)
        value.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
