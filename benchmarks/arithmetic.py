"""A client's step on a CPU, by what is done to make it less work, in one thread.

    python -m benchmarks.arithmetic ../shared/data/sst2 [--steps 20] [--compiled]

MiniLM with LoRA of rank 8 takes forward and backward passes over batches of sixteen rows of SST-2,
without dropout, so that all sides must find the same losses:

- plain: float32, rows in any order; its ratio to each other side is what that saves.
- buckets: batches of rows of like length, as all below.
- bf16_all: bfloat16 autocast, attention too.
- bf16: bfloat16 but for attention over short sequences, as fedpeft computes.
- packed: that, with several rows in one of the batch's, as long as the longest, told apart by
  position ids and a block mask: no option of fedpeft, as it needs a model that takes both.
- compiled: ``torch.compile`` of bf16, with --compiled, which needs a C compiler: no option either.
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
from fedpeft import config as configuration
from fedpeft.data.batching import Batch
from fedpeft.session import Session
from fedpeft.training import autocast

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
        Session(configuration.load([*job(str(args.data.resolve())), *size, *DRY, more]))
        for more in ("bucketing=false", "bucketing=true")
    )
    loss, model = bucketed.task.loss, bucketed.model.train()
    any_order, alike = (
        [batch for client in range(args.clients) for batch in batches(session, client, 1)]
        for session in (plain, bucketed)
    )
    several = [packed(batch) for batch in alike]
    bf16 = partial(autocast, CPU, "bf16")
    all_of_it = partial(torch.autocast, "cpu", torch.bfloat16, cache_enabled=False)
    sides: dict[str, Callable[[], float]] = {
        "plain": lambda: steps(
            plain.model.train(), any_order, loss, partial(autocast, CPU, "fp32")
        ),
        "buckets": lambda: steps(model, alike, loss, partial(autocast, CPU, "fp32")),
        "bf16_all": lambda: steps(model, alike, loss, all_of_it),
        "bf16": lambda: steps(model, alike, loss, bf16),
        "packed": lambda: steps(model, several, packed_loss, bf16),
    }
    result: dict[str, Any] = {"steps_a_client": args.steps, "clients": args.clients}
    result["tokens"] = {
        name: sum(batch["input_ids"].numel() for batch in given)
        for name, given in (("plain", any_order), ("buckets", alike), ("packed", several))
    }
    check(model, alike, several, loss)
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


def packed(batch: Batch) -> Batch:
    """The rows, longest first, each in the first longer row that has room for it.

    Gives token ids and positions (B', L), the mask (B', 1, L, L), of every token the row of the
    batch (B', L), -1 where there is none, and the labels (B,).
    """
    lengths: list[int] = batch["attention_mask"].sum(1).tolist()
    bins: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda r: -lengths[r]):
        fits = (b for b in bins if sum(lengths[r] for r in b) + lengths[row] <= max(lengths))
        found = next(fits, None)
        if found is None:
            bins.append([row])
        else:
            found.append(row)
    ids, positions = (torch.zeros(len(bins), max(lengths), dtype=torch.long) for _ in range(2))
    rows = torch.full_like(ids, -1)
    for place, members in enumerate(bins):
        at = 0
        for row in members:
            part = slice(at, at + lengths[row])
            ids[place, part] = batch["input_ids"][row, : lengths[row]]
            positions[place, part] = torch.arange(lengths[row])
            rows[place, part] = row
            at += lengths[row]
    mask = rows[:, None, :, None] == rows[:, None, None, :]
    labels = batch["labels"]
    return {"input_ids": ids, "positions": positions, "mask": mask, "rows": rows, "labels": labels}


def packed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the classifier on the mean of each row's tokens."""
    backbone: Any = model.backbone
    hidden = backbone(
        input_ids=batch["input_ids"],
        position_ids=batch["positions"],
        attention_mask=batch["mask"],
    )[0]
    rows, count = batch["rows"].reshape(-1), len(batch["labels"])
    total = torch.zeros(count + 1, hidden.shape[-1]).index_add(
        0, rows % (count + 1), hidden.flatten(0, 1).float()
    )
    means = total[:count] / rows[rows >= 0].bincount(minlength=count)[:, None]
    classifier: Any = model.classifier
    return nn.functional.cross_entropy(classifier(means).float(), batch["labels"])


@torch.no_grad()
def check(model: nn.Module, given: list[Batch], several: list[Batch], loss: Loss) -> None:
    """Packed rows must have the losses of padded ones.

    Raises:
        AssertionError: they have not.
    """
    for padded, own in zip(given[:4], several, strict=False):
        torch.testing.assert_close(packed_loss(model, own), loss(model, padded))


if __name__ == "__main__":
    main()
