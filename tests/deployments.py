"""Runs on real processes: their overrides, their end and the part of a summary that must agree."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from fedpeft.deployment.trial import Trial
from fedpeft.reporting.run_directory import read_metrics

ROUNDS = 4


def overrides_of(base: list[str], method: str, run_dir: Path) -> list[str]:
    """Return the overrides that a deployment and a simulation have in common."""
    rest = [o for o in base if not o.startswith(("method=", "runtime=", "num_"))]
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
    """Read the part of a summary on which a deployment and a simulation must agree."""
    whole = json.loads((run_dir / "summary.json").read_text())
    return {key: whole[key] for key in ("shared_state_sha256", "final", "refused")}


def until(done: Callable[[], bool], what: str, seconds: float = 300) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"waited {seconds} s until {what}"
        time.sleep(0.1)


def completed(trial: Trial, run: str, run_dir: Path) -> None:
    """Wait until a run is complete; asking Flower takes a second, so the summary comes first."""
    until((run_dir / "summary.json").exists, "there is a summary")
    until(lambda: trial.status(run)["status"].startswith("finished"), "the run ends")
    assert trial.status(run)["status"] == "finished:completed", trial.status(run)


def lines(run_dir: Path) -> int:
    """Return how many rounds a run has written."""
    return len(read_metrics(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0
