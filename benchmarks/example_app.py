"""Time short rounds, mostly overhead: fedpeft, a Flower app in the usual style, and a bare loop.

One step a client and round (SST-2, MiniLM, LoRA of rank 8 on query and value, batch 16), all
clients in each round, on two one-core Ray workers and in one process. The sides take turns. In its
turn a side runs some rounds in a process of its own; start-up does not count:

    python -m benchmarks.example_app FOLDER_OF_SST2 [--clients 10 100] [--repeats 5]

The Flower app is ``example_run.py``. The bare loop takes fedpeft's steps over fedpeft's batches
without federation, on one core, as fedpeft in process, and on two, as its Ray workers.
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
    parser.add_argument("--rounds", type=int, default=2, help="measured rounds of each process")
    parser.add_argument("--sides", nargs="+", help="names of the sides to run (default: all)")
    args = parser.parse_args()
    settings = {"batch_size": 16, "local_steps": 1, "repeats": args.repeats, "rounds": args.rounds}
    results: dict[str, Any] = {}
    for count in args.clients:
        results[str(count)] = compared(args, count)
        # Save after each count, because a hundred clients take most of an hour.
        save("example_app", {**settings, "clients": results})


def compared(args: Any, clients: int) -> dict[str, Any]:
    """Time a round of each side with some number of clients, and return the ratios of PAIRS."""
    job: dict[str, Any] = {"data": str(args.data.resolve()), "rounds": args.rounds}
    size = [f"num_clients={clients}", "local_steps=1", "batch_size=16"]
    ray = job | {"overrides": [*size, "runtime=ray", "runtime.total_cpus=2"]}
    in_process = job | {"overrides": [*size, "runtime=inprocess"]}
    bare = job | {"overrides": size}
    sides = {
        "example": partial(seconds, "example", job | {"clients": clients}),
        "fedpeft_ray": partial(seconds, "fedpeft", ray),
        "fedpeft_in_process": partial(seconds, "fedpeft", in_process),
        "bare_one_core": partial(seconds, "bare", bare),
        "bare_two_cores": partial(seconds, "bare", bare | {"threads": min(2, os.cpu_count() or 1)}),
    }
    sides = {name: side for name, side in sides.items() if name in (args.sides or sides)}
    timings = interleaved(sides, args.repeats, warmups=0)
    pairs = [(a, b) for a, b in PAIRS if {a, b} <= timings.keys()]
    return {
        "seconds_a_round": medians(timings),
        "range": {name: spread(values) for name, values in timings.items()},
        "ratios": {f"{a} / {b}": ratio(timings[a], timings[b]) for a, b in pairs},
    }


if __name__ == "__main__":
    main()
