"""Sides that take turns in one run, and the file that says what came out."""

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

from fedpeft.reporting.run_directory import versions

FOLDER = Path(__file__).parent.parent / "results" / "benchmarks"
REPEATS = 5


def interleaved(
    sides: Mapping[str, Callable[[], float | None]], repeats: int = REPEATS, warmups: int = 1
) -> dict[str, list[float]]:
    """Seconds of each side's calls, in turn: a slow spell of the machine hits all of them.

    Args:
        sides: each does its work once, and may return the seconds that count of it.
        warmups: rounds before, which do not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmups + repeats):
        for name, side in sides.items():
            begun = time.perf_counter()
            own = side()
            if turn >= warmups:
                seconds[name].append(time.perf_counter() - begun if own is None else own)
    return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, Any]:
    """Median and range of the ratios of calls that stood side by side."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return {"median": round(statistics.median(ratios), 4), "range": spread(ratios)}


def spread(values: Sequence[float]) -> list[float]:
    """Least and greatest."""
    return [float(f"{min(values):.4g}"), float(f"{max(values):.4g}")]


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Of each side's seconds."""
    return {name: float(f"{statistics.median(s):.4g}") for name, s in seconds.items()}


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    found: dict[str, Any] = {"processor": _processor(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found | {"versions": versions()}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def save(name: str, result: Mapping[str, Any]) -> None:
    """Writes ``results/benchmarks/NAME.json``, and prints it but for the machine."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    whole = {**result, "machine": machine()}
    (FOLDER / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n")
    print(name, json.dumps(result, indent=1), flush=True)


def proportional_mebibytes(pid: int | None = None) -> float:
    """Proportional set size of a process and all below it, in MiB."""
    import psutil

    root = psutil.Process(pid)
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total / 2**20


# Of every side in a process of its own: nothing reported home, no tokenizer threads beside the
# workers, and Ray's workers no less important than a process without Ray.
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
) -> tuple[str, list[tuple[float, float]]]:
    """Runs a Python process to its end; what it printed, and its memory over time.

    Args:
        every: seconds between two looks at the memory of the process and all below it; null for
            none.

    Returns:
        The output, and pairs of the time and MiB.

    Raises:
        RuntimeError: it failed.
    """
    command, samples, ended = [sys.executable, *arguments], [], Event()
    child = subprocess.Popen(
        command,
        env=os.environ | QUIET | dict(environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watcher = Thread(target=_watch, args=(child.pid, every, ended, samples))
    watcher.start()
    output, errors = child.communicate()
    ended.set()
    watcher.join()
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)[:200]} failed: {errors[-2000:]}")
    return output, samples


def _watch(pid: int, every: float | None, ended: Event, samples: list[tuple[float, float]]) -> None:
    import psutil

    while every is not None and not ended.wait(every):
        try:
            samples.append((time.time(), proportional_mebibytes(pid)))
        except psutil.NoSuchProcess:
            return
