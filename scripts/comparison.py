"""Every method on SST-2 and MRPC with MiniLM: a learning rate by validation, then three seeds.

    python scripts/comparison.py DATA [--processes 2] [--methods lora,scl] [--out FOLDER]

DATA is the folder that holds ``sst2`` and ``mrpc``. Each run adds a line to FOLDER/runs.jsonl
(results/comparison) and is not run again, so that the command can be stopped and given once more;
where all runs are there, it only makes the tables and the picture beside them anew. A method's
learning rate is the one of GRID with the best measure on the clients' validation rows of SST-2
after the last round of seed 0; it holds for both data sets. Processes share a GPU if there is one.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from comparison_page import write_page
from comparison_picture import draw
from comparison_rows import Line, Result, write_csv
from comparison_run import BOUNDS, DATA_SETS, GRID, SEEDS, Job, Paths, job_of, overrides, run_one
from omegaconf import OmegaConf

from fedpeft.config import load as configuration

T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--methods", help="by commas, in the order in which they begin; all if not")
    parser.add_argument("--model", type=Path, help="the weights' folder, without their package")
    parser.add_argument("--out", type=Path, default=Path("results/comparison"))
    args = parser.parse_args()
    if args.model is not None:
        check_weights(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    aliases, paths = different_methods(), Paths(args.data, args.out / "runs.jsonl", args.model)
    names = args.methods.split(",") if args.methods else [*aliases, *BOUNDS]
    finish(searches(names), paths, args.processes)
    finish(repeats(names, lines(paths.runs)), paths, args.processes)
    write(args.out, lines(paths.runs), aliases)


def searches(names: Iterable[str]) -> list[Job]:
    """The runs that choose learning rates."""
    return [Job(name, DATA_SETS[0], lr, SEEDS[0]) for name in names for lr in GRID]


def repeats(names: Iterable[str], found: list[Line]) -> list[Job]:
    """Every seed on every data set at the chosen learning rates; one of them is a search's."""
    chosen = {name: lr for name in names if (lr := best_lr(found, name)) is not None}
    return [
        Job(name, data, lr, seed)
        for data in DATA_SETS
        for seed in SEEDS
        for name, lr in chosen.items()
    ]


def best_lr(found: list[Line], method: str) -> float | None:
    """By the clients' validation rows of the first data set, seed 0; of equals the smaller.

    None where training diverged at every one.
    """
    grid = [
        (line["validation"], -line["lr"])
        for line in found
        if job_of(line) in searches([method]) and "failed" not in line
    ]
    return -max(grid)[1] if grid else None


def different_methods() -> dict[str, list[str]]:
    """Names in conf/method, each with the later ones that only name its configuration anew."""
    found: list[tuple[Any, str]] = []
    names: dict[str, list[str]] = {}
    for name in sorted(path.stem for path in (configuration.CONF / "method").glob("*.yaml")):
        method = configuration.load_config([f"method={name}"])
        key = (method.method, method.strategy, method.compression)
        first = next((other for known, other in found if known == key), name)
        found.append((key, first))
        names.setdefault(first, []).extend([] if first == name else [name])
    return names


def check_weights(folder: Path) -> None:
    """They must be the package's, whose hash the configuration has."""
    from fedpeft.models.hub import weights_sha256

    given, wanted = weights_sha256(str(folder)), configuration.load_config().model.sha256
    if given != wanted:
        sys.exit(f"--model must hold the weights of sha256 {wanted}, got {given}")


def finish(jobs: Iterable[Job], paths: Paths, processes: int) -> None:
    """Runs those of the jobs that have no line yet."""
    found = lines(paths.runs)
    known = {job_of(line) for line in found}
    left = [(job, paths) for job in slow_first(jobs, found) if job not in known]
    if died := run_all(run_one, left, processes):
        names = ", ".join(str(job) for job, _ in died)
        sys.exit(f"a process died (out of memory?) in {names}: give the command once more")


def slow_first(jobs: Iterable[Job], found: list[Line]) -> list[Job]:
    """So that no long run is the last; methods without a run may be long, and stay as given."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for line in found:
        if "seconds" in line:
            seconds[line["method"]].append(line["seconds"])

    def expected(job: Job) -> float:
        known = seconds.get(job.method)
        return sum(known) / len(known) if known else float("inf")

    return sorted(jobs, key=expected, reverse=True)


def run_all(function: Callable[[T], str], tasks: Sequence[T], processes: int) -> list[T]:
    """Prints what ``function`` says of each task; gives the tasks whose process died.

    Every process is a pool of its own, as a pool that loses one of several ends all they do. An
    error is raised when the tasks that had begun are done; the others do not begin.
    """
    left, died = iter(tasks), []  # a sequence's iterator can be shared by threads

    def work() -> None:
        while (task := next(left, None)) is not None:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                try:
                    while task is not None:
                        print(process.submit(function, task).result(), flush=True)
                        task = next(left, None)
                except BrokenProcessPool:
                    died.append(task)
                except Exception as error:
                    error.add_note(f"in {task}")
                    raise

    with ThreadPoolExecutor(processes) as threads:
        workers = [threads.submit(work) for _ in range(processes)]
        try:
            wait(workers, return_when=FIRST_EXCEPTION)
        finally:  # Ctrl-C comes here too
            deque(left, maxlen=0)
    for worker in workers:
        worker.result()
    return died


def lines(path: Path) -> list[Line]:
    """All runs so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(folder: Path, found: list[Line], aliases: dict[str, list[str]]) -> None:
    """The tables, the picture and a configuration, of the methods whose runs are all there."""
    known = {job_of(line) for line in found}
    names = sorted({job.method for job in known})
    whole = [n for n in names if known.issuperset(searches([n]) + repeats([n], found))]
    result = Result(found, {name: best_lr(found, name) for name in whole}, aliases)
    missing = [name for name in (*aliases, *BOUNDS) if name not in whole]
    one = overrides(Job("lora", DATA_SETS[0], GRID[0], SEEDS[0]))
    write_page(folder / "comparison.md", result, configuration.load_config(one), missing)
    write_csv(folder / "comparison.csv", result)
    draw(folder / "comparison.png", result)
    about = "# One run; the others have the `overrides` that their lines in runs.jsonl name.\n"
    tree = OmegaConf.to_yaml(configuration.composed(one), resolve=True)
    (folder / "config.yaml").write_text(about + tree)


if __name__ == "__main__":
    main()
