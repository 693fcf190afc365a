"""Runs through several doors: their overrides, their end and the part of a summary that agrees."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedpeft.deployment.trial import Trial
from fedpeft.reporting.run_files import read_metrics
from fedpeft.simulation.launch import run
from tests.conftest import ROOT, quiet

METHODS = ("fedsa_lora", "fedtt_plus")  # one with personal parameters, one with changing roles
ROUNDS = 4


def overrides_of(base: list[str], method: str, run_dir: Path) -> list[str]:
    """Return the overrides that all doors have in common."""
    rest = [o for o in base if not o.startswith(("method=", "runtime=", "num_rounds="))]
    return [
        *rest,
        f"method={method}",
        f"num_rounds={ROUNDS}",
        f"evaluation.every={ROUNDS}",
        "evaluation.clients=always",
        "runtime.clients_per_pass=1",  # as real machines train; in one pass sums have another order
        "runtime.min_replies=1.0",  # a round waits for a node that starts again
        f"run_dir={run_dir}",
    ]


def summary(run_dir: Path) -> dict[str, object]:
    """Read the part of a summary on which all doors must agree."""
    whole = json.loads((run_dir / "summary.json").read_text())
    return {key: whole[key] for key in ("shared_state_sha256", "final", "refused")}


def simulated(base: list[str], folder: Path) -> dict[str, dict[str, object]]:
    """Run both methods in this process and return the parts of their summaries."""
    for method in METHODS:
        overrides = overrides_of(base, method, folder / method)
        run([*overrides, "runtime=inprocess"], quiet())
    summaries = {method: summary(folder / method) for method in METHODS}
    assert summaries["fedsa_lora"] != summaries["fedtt_plus"]
    return summaries


def copied_app(folder: Path) -> Path:
    """Copy what Flower bundles into a folder, because it would look at each file of a checkout.

    An environment in the checkout has tens of thousands of them, which takes seconds at each run.
    """
    for name in ("fedpeft", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def until(done: Callable[[], bool], what: str, seconds: float = 300) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"waited {seconds} s until {what}"
        time.sleep(0.1)


def ended(trial: Trial, run: str) -> dict[str, Any]:
    """Wait until a run ends, and return what Flower knows of it.

    Asking takes a program of a second or more, so it comes seldom.
    """
    deadline = time.monotonic() + 300
    while not (status := trial.status(run))["status"].startswith("finished"):
        assert time.monotonic() < deadline, status
        time.sleep(3)
    return status


def completed(trial: Trial, run: str, run_dir: Path) -> None:
    """Wait until a run is complete; the summary comes first."""
    until((run_dir / "summary.json").exists, "there is a summary")
    status = ended(trial, run)
    assert status["status"] == "finished:completed", status


def lines(run_dir: Path) -> int:
    """Return how many rounds a run has written."""
    return len(read_metrics(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0
