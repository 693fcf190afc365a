"""Every method on SST-2 and MRPC with MiniLM: a learning rate by validation, then three seeds.

    python scripts/comparison.py DATA [--processes 2] [--methods lora,scl] [--out FOLDER]

DATA is the folder that holds ``sst2`` and ``mrpc``. Each run adds a line to FOLDER/runs.jsonl
(results/comparison) and is not run again, so that the command can be stopped and given once more. A
method's learning rate is the one of GRID with the best measure on the clients' validation rows of
SST-2 after the last round of seed 0; it holds for both data sets.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from fedpeft import config as configuration

GRID = (3e-4, 1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)
DATA_SETS = ("sst2", "mrpc")
MEASURE = {"sst2": "accuracy", "mrpc": "f1"}
BOUNDS = {name: ("method=lora", f"strategy={name}") for name in ("local_only", "centralized")}


class Job(NamedTuple):
    """One run."""

    method: str
    data: str
    lr: float
    seed: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--methods", default=",".join([*different_methods(), *BOUNDS]))
    parser.add_argument("--out", type=Path, default=Path("results/comparison"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs, names = args.out / "runs.jsonl", args.methods.split(",")
    first = DATA_SETS[0]
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:

        def run(jobs: Iterable[Job]) -> None:
            known = {job_of(line) for line in lines(runs)}
            left = [(job, args.data, runs) for job in jobs if job not in known]
            for line in pool.map(run_one, left):
                print(line, flush=True)

        run(Job(name, first, lr, SEEDS[0]) for name in names for lr in GRID)
        chosen = {name: best_lr(lines(runs), name) for name in names}
        for data in DATA_SETS:
            run(Job(name, data, chosen[name], seed) for seed in SEEDS for name in names)


def different_methods() -> list[str]:
    """Names in conf/method, but for those that only name another's configuration."""
    found: dict[str, Any] = {}
    for path in sorted((configuration.CONF / "method").glob("*.yaml"), key=lambda p: p.stem):
        method = configuration.load([f"method={path.stem}"])
        key = (method.method, method.strategy, method.compression)
        if key not in found.values():
            found[path.stem] = key
    return list(found)


def overrides(job: Job) -> list[str]:
    """The configuration but for paths."""
    method = BOUNDS.get(job.method, (f"method={job.method}",))
    return [
        "experiment=comparison",
        *method,
        f"data={job.data}",
        f"lr={job.lr:g}",
        f"seed={job.seed}",
        "runtime=inprocess",
    ]


def run_one(task: tuple[Job, Path, Path]) -> str:
    """Runs a job in this process and appends its line; training that diverges is a result."""
    job, data, runs = task
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    line: dict[str, Any] = job._asdict() | {"overrides": " ".join(overrides(job))}
    with tempfile.TemporaryDirectory() as folder:
        given = [*overrides(job), f"data.path='{data / job.data}'", f"run_dir='{folder}'"]
        try:
            line |= measured(given, Path(folder), MEASURE[job.data])
        except RuntimeError as error:
            line["failed"] = str(error)
    with runs.open("a") as file:  # one write a line: other processes append to the same file
        file.write(json.dumps(line) + "\n")
    quality = line.get("failed") or f"{line['quality']:.3f}"
    return f"{job.method} {job.data} lr {job.lr:g} seed {job.seed}: {quality}"


def measured(given: list[str], folder: Path, measure: str) -> dict[str, Any]:
    """A run's qualities, its bytes, and the curve of quality by bytes."""
    from rich.console import Console

    from fedpeft.progress import Display
    from fedpeft.results import read_metrics
    from fedpeft.runtime import launch
    from fedpeft.server_app import serve

    config, summaries = configuration.load(given), []
    display = Display(Console(quiet=True))
    launch(
        lambda grid, _: summaries.append(serve(grid, given, display, simulated=True)),
        config.num_clients,
        config.runtime,
    )
    summary, curve, sent = summaries[0], [], 0
    for line in read_metrics(folder):
        sent += line.get("uplink_bytes", 0) + line.get("downlink_bytes", 0)
        if (quality := line.get(f"client_test_{measure}")) is not None:
            curve.append([line["round"], sent, round(quality, 4)])
    interference = [x for x in summary["interference"] if x is not None]
    final = summary["final"]
    return {
        "quality": final[f"client_test_{measure}"],
        "validation": final[f"client_validation_{measure}"],
        "global_test": final.get(f"test_{measure}"),
        "baseline": summary["baseline"],
        "curve": curve,
        "interference": sum(interference) / len(interference) if interference else None,
        "trained": summary["parameters"]["trained"],
        "bytes": summary["bytes"],
        "seconds": summary["seconds"],
        "shared_state_sha256": summary["shared_state_sha256"],
        "versions": summary["versions"],
    }


def lines(path: Path) -> list[dict[str, Any]]:
    """All runs so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def job_of(line: dict[str, Any]) -> Job:
    """Which run a line is of."""
    return Job(*(line[field] for field in Job._fields))


def best_lr(found: list[dict[str, Any]], method: str) -> float:
    """By the clients' validation rows of the first data set, seed 0; of equals the smaller."""
    grid = [
        (line["validation"], -line["lr"])
        for line in found
        if (line["method"], line["data"], line["seed"]) == (method, DATA_SETS[0], SEEDS[0])
        and "failed" not in line
    ]
    if not grid:
        raise RuntimeError(f"{method} failed at every learning rate of {GRID}")
    return -max(grid)[1]


if __name__ == "__main__":
    main()
