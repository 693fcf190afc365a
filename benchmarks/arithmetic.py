"""A client's step on a CPU, by what is done to make it less work, in one thread.

    python -m benchmarks.arithmetic ../shared/data/sst2 [--steps 20] [--compiled]

MiniLM with LoRA of rank 8 takes forward and backward passes over batches of sixteen rows of SST-2,
without dropout, so that all sides must find the same losses:

- plain: float32, rows in any order; its ratio to each other side is what that saves.
- buckets: batches of rows of like length, as all below.
- bf16_all: bfloat16 autocast, attention too.
- bf16: bfloat16 but for attention over short sequences, as fedpeft computes.
- compiled: ``torch.compile`` of bf16, with --compiled, which needs a C compiler: no option of
  fedpeft, as it takes minutes to compile for so many lengths.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import REPEATS, interleaved, medians, ratio, save, spread
from benchmarks.round import batches
from benchmarks.sides import job
from fedpeft.config import load as configuration
from fedpeft.data.batching import Batch
from fedpeft.engine.engine import Engine
from fedpeft.engine.passes import autocast

CPU = torch.device("cpu")
DRY = [f"model.settings.{name}_dropout_prob=0.0" for name in ("hidden", "attention_probs")]
Loss = Callable[[nn.Module, Batch], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, help="folder of SST-2")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--steps", type=int, default=20, help="of a client and round")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--compiled", action="store_true")
    args = parser.parse_args()
    size = ["num_clients=10", "batch_size=16", f"local_steps={args.steps}", "runtime=inprocess"]
    plain, bucketed = (
        Engine(configuration.load_config([*job(str(args.data.resolve())), *size, *DRY, more]))
        for more in ("bucketing=false", "bucketing=true")
    )
    task, model = bucketed.task, bucketed.replica.model.train()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return task.loss(task.forward(model, batch), batch)

    any_order, alike = (
        [batch for client in range(args.clients) for batch in batches(session, client, 1)]
        for session in (plain, bucketed)
    )
    fp32, bf16 = (partial(autocast, CPU, precision) for precision in ("fp32", "bf16"))
    all_of_it = partial(torch.autocast, "cpu", torch.bfloat16, cache_enabled=False)
    sides: dict[str, Callable[[], float]] = {
        "plain": lambda: steps(model, any_order, loss, fp32),
        "buckets": lambda: steps(model, alike, loss, fp32),
        "bf16_all": lambda: steps(model, alike, loss, all_of_it),
        "bf16": lambda: steps(model, alike, loss, bf16),
    }
    result: dict[str, Any] = {"steps_a_client": args.steps, "clients": args.clients}
    result["tokens"] = {
        "plain": sum(batch["input_ids"].numel() for batch in any_order),
        "buckets": sum(batch["input_ids"].numel() for batch in alike),
        "real": sum(int(batch["attention_mask"].sum()) for batch in alike),
    }
    if args.compiled:
        compiled = torch.compile(model, dynamic=True)
        sides["compiled"] = lambda: steps(compiled, alike, loss, bf16)  # type: ignore[arg-type]
        begun = time.perf_counter()
        sides["compiled"]()
        result["seconds_of_the_first_compiled_pass"] = round(time.perf_counter() - begun, 1)
    taken = interleaved(sides, args.repeats)
    result["milliseconds_a_step"] = medians(
        {name: [1e3 * s / len(alike) for s in own] for name, own in taken.items()}
    )
    result["range_of_seconds"] = {name: spread(own) for name, own in taken.items()}
    result["plain / "] = {n: ratio(taken["plain"], own) for n, own in taken.items() if n != "plain"}
    save(f"arithmetic_{args.steps}_steps", result)


def steps(
    model: nn.Module,
    given: list[Batch],
    loss: Loss,
    casting: Callable[[], AbstractContextManager[Any]],
) -> float:
    """Seconds of forward and backward passes over all batches."""
    begun = time.perf_counter()
    for batch in given:
        with casting():
            value = loss(model, batch)
        value.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
