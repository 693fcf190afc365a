"""Rounds bound by overhead: fedpeft, a Flower app as public examples are, and a bare loop.

One step a client and round (SST-2, MiniLM, LoRA of rank 8 on query and value, batch 16), all
clients in each round, on two one-core Ray workers and in one process. Each side runs some rounds
in a process of its own, start-up not counted, and the sides take turns:

    python -m benchmarks.example_app ../shared/data/sst2 [--clients 10 100] [--repeats 5]

The bare loop takes the same steps over the same batches without federation: on one core, which is
what fedpeft in process has, and on two, which its Ray workers share.
"""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import REPEATS, interleaved, medians, ratio, save, spread
from benchmarks.sides import seconds

PAIRS = (  # numerator, denominator
    ("example", "fedpeft_ray"),
    ("fedpeft_ray", "bare_one_core"),
    ("fedpeft_ray", "bare_two_cores"),
    ("fedpeft_in_process", "bare_one_core"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, help="folder of SST-2")
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--rounds", type=int, default=2, help="that count, of each process")
    parser.add_argument("--sides", nargs="+", help="some of them")
    args = parser.parse_args()
    settings = {"batch_size": 16, "local_steps": 1, "repeats": args.repeats, "rounds": args.rounds}
    found: dict[str, Any] = {}
    for count in args.clients:
        found[str(count)] = compared(args, count)
        save("example_app", {**settings, "clients": found})  # a hundred take most of an hour


def compared(args: Any, clients: int) -> dict[str, Any]:
    """Seconds a round of each side, and ratios."""
    data = str(args.data.resolve())
    overrides = [f"num_clients={clients}", "local_steps=1", "batch_size=16"]
    ours: dict[str, Any] = {"data": data, "rounds": args.rounds, "overrides": overrides}
    ray = ours | {"overrides": [*overrides, "runtime=ray", "runtime.total_cpus=2"]}
    app = {"data": data, "rounds": args.rounds, "clients": clients}
    sides = {
        "example": partial(seconds, "example", app),
        "fedpeft_ray": partial(seconds, "fedpeft", ray),
        "fedpeft_in_process": partial(
            seconds, "fedpeft", ours | {"overrides": [*overrides, "runtime=inprocess"]}
        ),
        "bare_one_core": partial(seconds, "bare", ours),
        "bare_two_cores": partial(seconds, "bare", ours | {"threads": min(2, os.cpu_count() or 1)}),
    }
    sides = {name: side for name, side in sides.items() if name in (args.sides or sides)}
    taken = interleaved(sides, args.repeats, warmups=0)
    return {
        "seconds_a_round": medians(taken),
        "range": {name: spread(values) for name, values in taken.items()},
        "ratios": {
            f"{a} / {b}": ratio(taken[a], taken[b]) for a, b in PAIRS if {a, b} <= taken.keys()
        },
    }


if __name__ == "__main__":
    main()
