"""One run of the comparison, in a process of its own: its configuration, and its line."""

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from fedpeft.config import load as configuration

GRID = (3e-4, 1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)
MEASURE = {"sst2": "accuracy", "mrpc": "f1"}
DATA_SETS = tuple(MEASURE)  # the first one's validation rows choose the learning rates
BOUNDS = {name: ("method=lora", f"strategy={name}") for name in ("local_only", "centralized")}
NOT_FINITE = re.compile("finite|training loss is")  # in what fedpeft says of diverged training


class Job(NamedTuple):
    """Which run it is."""

    method: str
    data: str
    lr: float
    seed: int

    def __str__(self) -> str:
        return f"{self.method} {self.data} lr {self.lr:g} seed {self.seed}"


class Paths(NamedTuple):
    """Where things are on this machine; no line tells.

    Args:
        data: folder of the data sets' folders.
        runs: file of the lines.
        model: folder of the weights, or None for their package.
    """

    data: Path
    runs: Path
    model: Path | None = None


class Diverged(Exception):
    """Training left the finite numbers: a result, not an error."""


def job_of(line: dict[str, Any]) -> Job:
    """Which run a line is of."""
    return Job(*(line[field] for field in Job._fields))


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


def run_one(task: tuple[Job, Paths]) -> str:
    """Runs a job in this process, appends its line, and says how it went."""
    job, paths = task
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    line: dict[str, Any] = job._asdict() | {"overrides": " ".join(overrides(job))}
    line["device"] = device()
    with tempfile.TemporaryDirectory() as folder:
        given = [*overrides(job), f"data.path='{paths.data / job.data}'", f"run_dir='{folder}'"]
        given += [] if paths.model is None else [f"model.path='{paths.model}'"]
        try:
            line |= measured(given, Path(folder), MEASURE[job.data])
        except Diverged as error:
            line["failed"] = str(error)
    with paths.runs.open("a") as file:  # one write a line: other processes append to the same file
        file.write(json.dumps(line) + "\n")
    return f"{job}: {line.get('failed') or format(line['quality'], '.3f')}"


def device() -> str:
    """What runtime.device=auto takes."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def measured(given: list[str], folder: Path, measure: str) -> dict[str, Any]:
    """A run's qualities, its bytes, and the curve of quality by bytes.

    Raises:
        Diverged: there is no number of all clients after the last round.
    """
    from fedpeft.reporting.run_directory import read_metrics

    summary = summary_of(given)
    found = read_metrics(folder)
    refused = check_refused(found)
    curve, sent = [], 0
    for line in found:  # what evaluation sends is apart, as evaluation_..._bytes
        sent += line.get("uplink_bytes", 0) + line.get("downlink_bytes", 0)
        if (quality := line.get(f"client_test_{measure}")) is not None:
            curve.append([line["round"], sent, quality])
    interference = [x for x in summary["interference"] if x is not None]
    final = summary["final"]
    as_they_are = ("baseline", "bytes", "seconds", "shared_state_sha256", "versions")
    return {
        "quality": final[f"client_test_{measure}"],
        "validation": final[f"client_validation_{measure}"],
        "global_test": final.get(f"test_{measure}"),
        "curve": curve,
        "interference": sum(interference) / len(interference) if interference else None,
        "trained": summary["parameters"]["trained"],
        "refused": refused,
    } | {key: summary[key] for key in as_they_are}


def summary_of(given: list[str]) -> dict[str, Any]:
    """Runs a configuration.

    Raises:
        Diverged: every client of a round did, or the aggregation had no decomposition.
    """
    from rich.console import Console
    from torch.linalg import LinAlgError  # type: ignore[attr-defined]

    from fedpeft.reporting.progress import Display
    from fedpeft.server.app import serve
    from fedpeft.server.strategy import RoundFailed
    from fedpeft.simulation.launch import launch

    config, summaries = configuration.load_config(given), []
    display = Display(Console(quiet=True))
    try:
        launch(
            lambda grid, _: summaries.append(serve(grid, given, display, simulated=True)),
            config.num_clients,
            config.runtime,
        )
    except LinAlgError as error:
        raise Diverged(str(error)) from error
    except RoundFailed as error:
        if NOT_FINITE.search(str(error)):
            raise Diverged(str(error)) from error
        raise
    return summaries[0]


def check_refused(found: list[dict[str, Any]]) -> int:
    """How many replies the server left out, in a run that went on without them.

    Raises:
        Diverged: one of the last evaluation, so that its mean is not that of all clients.
        RuntimeError: one for another reason than divergence, which would spoil the comparison.
    """
    reasons = [why for line in found for why in line.get("refused", {}).values()]
    if other := [why for why in reasons if not NOT_FINITE.search(why)]:
        raise RuntimeError(f"a client's reply was refused: {other[0]}")
    for why in found[-1].get("refused", {}).values():
        if why.startswith("evaluation: "):
            raise Diverged(why)
    return len(reasons)
