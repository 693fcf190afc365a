"""Kill the programs of a deployment at random moments, and see that the run ends with its bits.

    python -m benchmarks.kills [--kills 20]

A server and three nodes run on this machine. Each time a worker, a SuperNode, the ServerApp or the
SuperLink gets SIGKILL, at a random moment of a run of many rounds. Where Flower then fails the run,
the same command goes on from the last checkpoint. The program fails if the result differs in a bit
from the result of a run in one process.
"""

import argparse
import json
import random
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import save
from fedpeft.deployment.processes import BIN
from fedpeft.deployment.trial import APP, Trial

VICTIMS = ("fedpeft.deployment.worker", "flower-supernode", "flwr-serverapp", "flower-superlink")
MOST_SECONDS = 20  # until the next kill
OVERRIDES = [
    *("method=fedsa_lora", "method.rank=4", "strategy=fedadam", "num_clients=3"),
    *("model=minilm", "model.random=true", "model.architecture.num_hidden_layers=2"),
    *("data=docstrings", "data.rows_per_label=100", "data.max_length=16"),
    *("local_steps=2", "batch_size=4", "evaluation.every=1000000", "evaluation.max_client_rows=4"),
    *("runtime.clients_per_pass=1", "runtime.min_replies=1.0", "runtime.join_timeout=180"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    given = [*OVERRIDES, f"num_rounds={args.rounds}"]
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name) / "whole", Path(name) / "killed"
        command = [BIN / "fedpeft", "run", *given, "runtime=inprocess", f"run_dir={whole}"]
        subprocess.run(command, check=True, capture_output=True)
        trial = Trial(Path(name) / "trial")
        trial.folder.mkdir()
        try:
            trial.start(3, [], given)
            result = survive(trial, [*given, f"run_dir={killed}", "resume=true"], args.kills)
        finally:
            trial.processes.stop()
        for key in ("shared_state_sha256", "final", "refused"):
            one, other = (
                json.loads((p / "summary.json").read_text())[key] for p in (whole, killed)
            )
            assert one == other, f"{key} differs: {one} and {other}"
    save("kills", {"rounds": args.rounds} | result)


def survive(trial: Trial, overrides: Sequence[str], kills: int) -> dict[str, Any]:
    """Run to the end, and kill programs on the way.

    Args:
        trial: a running SuperLink with its nodes.
        overrides: the run's overrides.
        kills: number of programs to kill, at most.

    Returns:
        Kills by program, their number, and how often the run was submitted.
    """
    draws, killed, submitted = random.Random(11), Counter[str](), 0
    due, run = time.monotonic() + 30, ""
    while True:
        if not run:
            run, submitted = trial.submit(APP, [*overrides]), submitted + 1
        if killed.total() < kills and time.monotonic() > due:
            victim = draws.choice(VICTIMS)
            if running := alive(victim):
                draws.choice(running).kill()
                killed[victim] += 1
                due = time.monotonic() + MOST_SECONDS * draws.random()
        time.sleep(1)
        if (ended := status(trial, run)) == "finished:completed":
            return {"killed": dict(killed), "kills": killed.total(), "runs": submitted}
        if ended.startswith("finished"):
            run = ""


def alive(word: str) -> list[psutil.Process]:
    """Return the programs below this process that a word names, in the order of their ids."""
    below = psutil.Process().children(recursive=True)
    return sorted((p for p in below if _named(p, word)), key=lambda p: p.pid)


def _named(process: psutil.Process, word: str) -> bool:
    try:
        return any(part.endswith(word) for part in process.cmdline())
    except psutil.Error:
        return False


def status(trial: Trial, run: str) -> str:
    """Return a run's status; empty while the SuperLink is not there."""
    try:
        return str(trial.status(run)["status"])
    except RuntimeError:
        return ""


if __name__ == "__main__":
    main()
