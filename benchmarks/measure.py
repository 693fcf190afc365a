"""Run the sides of a benchmark in turns, and save the ratios with the machine and versions."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Event, Thread
from typing import Any

from fedpeft.versions import installed

FOLDER = Path(__file__).parent.parent / "results" / "benchmarks"
REPEATS = 5


def interleaved(
    sides: Mapping[str, Callable[[], float | None]], repeats: int = REPEATS, warmups: int = 1
) -> dict[str, list[float]]:
    """Call the sides in turns, so that a slow spell of the machine hits all of them.

    Args:
        sides: functions by name; a call does the work once, and may return its seconds that count.
        repeats: calls of each side that count.
        warmups: calls of each side before the calls that count.

    Returns:
        The seconds of each side's calls, in order.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmups + repeats):
        for name, side in sides.items():
            begun = time.perf_counter()
            told = side()
            if turn >= warmups:
                seconds[name].append(time.perf_counter() - begun if told is None else told)
    return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, Any]:
    """Return median and range of the ratios of two sides, paired turn by turn."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return {"median": round(statistics.median(ratios), 4), "range": spread(ratios)}


def spread(values: Sequence[float]) -> list[float]:
    """Return the least and the greatest value, to four digits."""
    return [float(f"{min(values):.4g}"), float(f"{max(values):.4g}")]


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median of each side's seconds, to four digits."""
    return {name: float(f"{statistics.median(s):.4g}") for name, s in seconds.items()}


def machine() -> dict[str, Any]:
    """Describe the machine and the versions of Python and the libraries."""
    import torch

    description: dict[str, Any] = {"processor": _processor(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        description["gpu"] = torch.cuda.get_device_name()
    return description | {"versions": installed()}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def save(name: str, result: Mapping[str, Any]) -> None:
    """Write a result and the machine to ``results/benchmarks/NAME.json``, and print the result."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    content = {**result, "machine": machine()}
    (FOLDER / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    print(name, json.dumps(result, indent=1), flush=True)


def proportional_mebibytes(pid: int | None = None) -> float:
    """Return the proportional set size of a process and its descendants, in MiB."""
    import psutil

    root = psutil.Process(pid)
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total / 2**20


def anonymous_mebibytes(pid: int | None = None) -> float:
    """Return the part of ``proportional_mebibytes`` that no file backs, so that it must stay.

    The kernel drops the pages of mapped files when it needs their room.
    """
    import psutil

    root = psutil.Process(pid)
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))
    return total / 2**10


# Environment of every measured process: no telemetry, no tokenizer threads beside the workers, and
# Ray's workers at the priority of a process without Ray.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(Path(__file__).parent.parent),
}


def process(
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
    every: float | None = None,
    size: Callable[[int], float] = proportional_mebibytes,
) -> tuple[str, list[tuple[float, float]]]:
    """Run a Python process to its end, and sample its memory.

    Args:
        arguments: the Python interpreter's arguments.
        environment: variables added to this process's and ``QUIET``.
        every: seconds between two samples of the memory of the process and its descendants; null
            for none.
        size: returns the memory of a process and its descendants in MiB, by its id.

    Returns:
        The text that the process printed, and pairs of ``time.time`` and MiB.

    Raises:
        RuntimeError: the process failed.
    """
    command, samples, ended = [sys.executable, *arguments], [], Event()
    child = subprocess.Popen(
        command,
        env=os.environ | QUIET | dict(environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watcher = Thread(target=_watch, args=(child.pid, every, ended, samples, size))
    watcher.start()
    output, errors = child.communicate()
    ended.set()
    watcher.join()
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)[:200]} failed: {errors[-2000:]}")
    return output, samples


def _watch(
    pid: int,
    every: float | None,
    ended: Event,
    samples: list[tuple[float, float]],
    size: Callable[[int], float],
) -> None:
    import psutil

    while every is not None and not ended.wait(every):
        try:
            samples.append((time.time(), size(pid)))
        except psutil.NoSuchProcess:
            return
