"""Memory of a simulation: fedpeft, a Flower app as public examples are, and bare processes.

Ten clients of SST-2, MiniLM with LoRA of rank 8, two one-core workers. Proportional set size of
each side's whole process tree, looked at four times a second: at the most, and steady, the median
over the rounds that count. The bare side is two processes that stay, each a script with torch,
transformers and PEFT that takes half of the clients' steps. The sides take turns:

    python -m benchmarks.memory ../shared/data/sst2 [--repeats 5] [--steps 5]
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.measure import REPEATS, medians, ratio, save, spread
from benchmarks.sides import memory, run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, help="folder of SST-2")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--rounds", type=int, default=3, help="that count, of each process")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(args.repeats):
        for name, (side, settings) in _sides(args).items():
            taken, samples = run(side, settings, every=0.25)
            found.setdefault(name, []).append(memory(samples, taken))
    keys = ("repeats", "rounds", "clients", "steps")
    save("memory", {key: getattr(args, key) for key in keys} | {"batch_size": 16} | table(found))


def _sides(args: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    job: dict[str, Any] = {"data": str(args.data.resolve()), "rounds": args.rounds}
    whole = ["data.max_validation_rows=null", "data.max_test_rows=null"]  # as a user evaluates
    base = [f"num_clients={args.clients}", f"local_steps={args.steps}", *whole]
    ray = [*base, "runtime=ray", "runtime.total_cpus=2"]
    given = job | {"clients": args.clients, "steps": args.steps}
    return {
        "fedpeft_ray": ("fedpeft", job | {"overrides": ray}),
        "fedpeft_in_process": ("fedpeft", job | {"overrides": [*base, "runtime=inprocess"]}),
        "bare_two_processes": ("scripts", given),
        "example": ("example", given),
    }


def table(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians and spreads in MiB, and ratios to the bare processes."""
    result: dict[str, Any] = {}
    for key in ("peak", "steady"):
        values = {name: [run[key] for run in runs] for name, runs in found.items()}
        bare = values["bare_two_processes"]
        result[f"{key}_mebibytes"] = medians(values)
        result[f"{key}_range"] = {name: spread(own) for name, own in values.items()}
        result[f"{key} / bare_two_processes"] = {
            name: ratio(own, bare) for name, own in values.items() if own is not bare
        }
    return result


if __name__ == "__main__":
    main()
