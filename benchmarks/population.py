"""Measure a round's seconds and memory from ten clients to ten thousand, ten in each round.

SST-2, MiniLM, LoRA of rank 8, on two one-core Ray workers and in one process. With ten thousand
clients a client has six rows, of which four train. So each client takes one step of four rows,
which is the same work whatever the number of clients. Each run is a process of its own, and the
numbers of clients take turns. Memory is the proportional set size of the whole process tree,
sampled twice a second:

    python -m benchmarks.population FOLDER_OF_SST2 [--clients 10 100 1000 10000] [--repeats 5]
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
    parser.add_argument("--rounds", type=int, default=20, help="measured rounds of each process")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    args = parser.parse_args()
    data = str(args.data.resolve())
    # A first run, which does not count, caches the partition of each number of clients.
    for clients in args.clients:
        measured(data, "in_process", clients, rounds=1)
    runs: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(args.repeats):
        for kind in args.runtimes:
            for clients in args.clients:
                figures = measured(data, kind, clients, args.rounds)
                runs.setdefault((kind, clients), []).append(figures)
    result: dict[str, Any] = {"clients_per_round": COHORT, "batch_size": BATCH, "local_steps": 1}
    result |= {"repeats": args.repeats, "rounds": args.rounds}
    for kind in args.runtimes:
        result[kind] = table({n: figures for (k, n), figures in runs.items() if k == kind})
    save("population", result)


def measured(data: str, kind: str, clients: int, rounds: int) -> dict[str, float]:
    """Measure one run.

    Args:
        data: folder of SST-2.
        kind: a key of ``RUNTIMES``.
        clients: number of clients.
        rounds: number of rounds that count.

    Returns:
        ``seconds``, the median round's, and ``peak`` and ``steady``, in MiB.
    """
    sizes = [f"num_clients={clients}", f"clients_per_round={COHORT}", f"batch_size={BATCH}"]
    overrides = [*sizes, "local_steps=1", *RUNTIMES[kind]]
    settings = {"data": data, "rounds": rounds, "overrides": overrides}
    timed, samples = run("fedpeft", settings, every=0.5)
    return {"seconds": statistics.median(timed.seconds)} | memory(samples, timed)


def table(runs: dict[int, list[dict[str, float]]]) -> dict[str, Any]:
    """Return medians and ranges by number of clients, and the most clients against the fewest."""
    columns = {
        key: {str(n): [run[key] for run in repeats] for n, repeats in runs.items()}
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
