"""From ten clients to ten thousand, ten in each round: seconds a round, and memory.

SST-2, MiniLM, LoRA of rank 8, on two one-core Ray workers and in one process. A client of ten
thousand has six rows, of which four train, so that one step of four rows is the same work
whatever the number of clients. Each run is a process of its own, and the sizes take turns; memory
is the proportional set size of the whole process tree, looked at twice a second:

    python -m benchmarks.population ../shared/data/sst2 [--clients 10 100 1000 10000] [--repeats 5]
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks.measure import REPEATS, medians, ratio, save, spread
from benchmarks.sides import memory, run

RUNTIMES = {
    "ray": ["runtime=ray", "runtime.total_cpus=2"],
    "in_process": ["runtime=inprocess"],
}
COHORT, BATCH = 10, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, help="folder of SST-2")
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000, 10000])
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--rounds", type=int, default=20, help="that count, of each process")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    args = parser.parse_args()
    data = str(args.data.resolve())
    for clients in args.clients:  # who holds what is found once, and kept
        measured(data, "in_process", clients, rounds=1)
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(args.repeats):
        for kind in args.runtimes:
            for clients in args.clients:
                found.setdefault((kind, clients), []).append(
                    measured(data, kind, clients, args.rounds)
                )
    result: dict[str, Any] = {"clients_per_round": COHORT, "batch_size": BATCH, "local_steps": 1}
    result |= {"repeats": args.repeats, "rounds": args.rounds}
    for kind in args.runtimes:
        result[kind] = table({n: runs for (k, n), runs in found.items() if k == kind})
    save("population", result)


def measured(data: str, kind: str, clients: int, rounds: int) -> dict[str, float]:
    """Median seconds a round, and MiB, of one run."""
    sizes = [f"num_clients={clients}", f"clients_per_round={COHORT}", f"batch_size={BATCH}"]
    overrides = [*sizes, "local_steps=1", *RUNTIMES[kind]]
    given = {"data": data, "rounds": rounds, "overrides": overrides}
    taken, samples = run("fedpeft", given, every=0.5)
    return {"seconds": statistics.median(taken.seconds)} | memory(samples, taken)


def table(runs: dict[int, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians and spreads by number of clients, and what the most clients take over the fewest."""
    columns = {
        key: {str(n): [run[key] for run in found] for n, found in runs.items()}
        for key in ("seconds", "peak", "steady")
    }
    fewest, most = str(min(runs)), str(max(runs))
    peaks = [b - a for a, b in zip(columns["peak"][fewest], columns["peak"][most], strict=True)]
    return {
        "seconds_a_round": medians(columns["seconds"]),
        "range": {name: spread(values) for name, values in columns["seconds"].items()},
        "peak_mebibytes": medians(columns["peak"]),
        "steady_mebibytes": medians(columns["steady"]),
        f"seconds of {most} / {fewest}": ratio(
            columns["seconds"][most], columns["seconds"][fewest]
        ),
        f"peak mebibytes of {most} - {fewest}": {
            "median": round(statistics.median(peaks), 1),
            "range": spread(peaks),
        },
    }


if __name__ == "__main__":
    main()
