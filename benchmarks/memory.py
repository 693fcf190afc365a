"""Measure a simulation's memory: fedpeft, a Flower app in the usual style, and bare processes.

Ten clients of SST-2, MiniLM with LoRA of rank 8, two one-core workers. The proportional set size of
each side's whole process tree is sampled four times a second. ``peak`` is the most, ``steady`` the
median over the rounds that count. The Flower app is ``example_run.py``. The bare side is two
processes that stay, each a script with torch, transformers and PEFT that takes half of the clients'
steps. The sides take turns:

    python -m benchmarks.memory FOLDER_OF_SST2 [--repeats 5] [--steps 5]

With ``--full`` it measures full fine-tuning instead, of which a reply is 87 MiB, with 2 and with 20
clients in one process. That process is the server, and trains one client after another.
"""

import argparse
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.measure import (
    REPEATS,
    anonymous_mebibytes,
    medians,
    proportional_mebibytes,
    ratio,
    save,
    spread,
)
from benchmarks.sides import memory, run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, help="folder of SST-2")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds of each process")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="measure full fine-tuning instead")
    args = parser.parse_args()
    if args.full:
        measure_full(args)
        return
    runs: dict[str, list[dict[str, float]]] = {}
    for _ in range(args.repeats):
        for name, (side, settings) in _sides(args).items():
            rounds, samples = run(side, settings, every=0.25)
            runs.setdefault(name, []).append(memory(samples, rounds))
    result = {key: getattr(args, key) for key in ("repeats", "rounds", "clients", "steps")}
    save("memory", result | {"batch_size": 16} | table(runs))


def measure_full(args: Any) -> None:
    """Measure whether the server's memory grows with the number of clients."""
    sizes = {"peak": proportional_mebibytes, "peak_without_mapped_files": anonymous_mebibytes}
    runs: dict[str, dict[str, list[float]]] = {name: {} for name in sizes}
    for _ in range(args.repeats):
        for clients, (name, size) in product((2, 20), sizes.items()):
            overrides = ["method=full", f"num_clients={clients}", "local_steps=1"]
            overrides += ["runtime=inprocess", "runtime.clients_per_pass=1"]
            job = {"data": str(args.data.resolve()), "rounds": args.rounds, "overrides": overrides}
            rounds, samples = run("fedpeft", job, every=0.1, size=size)
            runs[name].setdefault(str(clients), []).append(memory(samples, rounds)["peak"])
    result: dict[str, Any] = {"repeats": args.repeats, "rounds": args.rounds, "steps": 1}
    for name, by_clients in runs.items():
        result[f"{name}_mebibytes_by_clients"] = medians(by_clients)
        result[f"{name}_range"] = {clients: spread(v) for clients, v in by_clients.items()}
    save("memory_full", result)


def _sides(args: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the side of ``benchmarks.sides`` and its settings, by name."""
    job: dict[str, Any] = {"data": str(args.data.resolve()), "rounds": args.rounds}
    whole = ["data.max_validation_rows=null", "data.max_test_rows=null"]  # as a user evaluates
    overrides = [f"num_clients={args.clients}", f"local_steps={args.steps}", *whole]
    ray = [*overrides, "runtime=ray", "runtime.total_cpus=2"]
    in_process = [*overrides, "runtime=inprocess"]
    size = {"clients": args.clients, "steps": args.steps}
    return {
        "fedpeft_ray": ("fedpeft", job | {"overrides": ray}),
        "fedpeft_in_process": ("fedpeft", job | {"overrides": in_process}),
        "bare_two_processes": ("scripts", job | size),
        "example": ("example", job | size),
    }


def table(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return medians and ranges in MiB, and ratios to the bare processes."""
    result: dict[str, Any] = {}
    for key in ("peak", "steady"):
        values = {name: [run[key] for run in side] for name, side in runs.items()}
        bare = values["bare_two_processes"]
        result[f"{key}_mebibytes"] = medians(values)
        result[f"{key}_range"] = {name: spread(side) for name, side in values.items()}
        result[f"{key} / bare_two_processes"] = {
            name: ratio(side, bare) for name, side in values.items() if side is not bare
        }
    return result


if __name__ == "__main__":
    main()
