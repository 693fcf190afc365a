"""Processes that are killed at any moment: the run goes on and ends with the same bits."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fedpeft.simulation.launch import run
from tests.conftest import ROOT, quiet

pytestmark = pytest.mark.slow
SECONDS = 300
CODE = "import sys; from fedpeft.cli import main; main()"


@pytest.fixture(scope="module")
def overrides(base: list[str]) -> list[str]:
    """A run of forty rounds, in which clients keep B, and the server a memory."""
    return [*base, "method=fedsa_lora", "method.rank=4", "strategy=fedadam", "num_rounds=40"]


@pytest.fixture(scope="module")
def whole(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of the run that nothing disturbs."""
    return run([*overrides, f"run_dir={tmp_path_factory.mktemp('whole')}/run"], quiet())


@pytest.fixture
def command(overrides: list[str]) -> list[str]:
    return [sys.executable, "-W", "ignore", "-c", CODE, "run", "--json", *overrides]


def started(command: Sequence[str], folder: Path) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, f"run_dir={folder}", "resume=true"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # its workers die with it
    )


def ended(process: "subprocess.Popen[str]") -> dict[str, Any]:
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


def lines(folder: Path) -> int:
    """Return how many lines a run has written."""
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def wait_for_round(folder: Path, number: int) -> None:
    """Wait until a run has written the line of a round."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if lines(folder) > number:
            return
        time.sleep(0.02)
    raise TimeoutError(f"no round {number}")


@pytest.mark.parametrize(
    ("runtime", "number", "code"),
    [
        ("inprocess", signal.SIGINT, 130),
        ("ray", signal.SIGTERM, 143),  # Ray has a handler of its own for SIGTERM
    ],
)
def test_kills_and_signals_at_random_moments(
    command: list[str],
    whole: dict[str, Any],
    runtime: str,
    number: int,
    code: int,
    tmp_path: Path,
) -> None:
    """Kill -9 of the driver soon after a round's line, also while it writes files, then a signal.

    The run goes on after both, and ends in one process.
    """
    more = [f"runtime={runtime}", *(["runtime.total_cpus=1"] if runtime == "ray" else [])]
    process = started([*command, *more], tmp_path / "run")
    wait_for_round(tmp_path / "run", 2)
    time.sleep(random.Random(5).random() * 0.3)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = lines(tmp_path / "run")
    process = started([*command, *more], tmp_path / "run")
    wait_for_round(tmp_path / "run", before)  # this process has taken up the run
    process.send_signal(number)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == code
    assert_stopped(errors, tmp_path / "run")
    resumed = ended(started(command, tmp_path / "run"))
    for key in ("shared_state_sha256", "final", "best", "interference", "refused"):
        assert resumed[key] == whole[key], key
    for key in ("uplink_bytes", "evaluation_uplink_bytes"):  # messages down name the runtime
        assert resumed["bytes"][key] == whole["bytes"][key] > 0, key


def assert_stopped(errors: str, folder: Path) -> None:
    """Assert that a run's errors are one sentence, which says how to go on."""
    (said,) = [line for line in errors.splitlines() if line.startswith("fedpeft: ")]
    assert said.startswith("fedpeft: stopped after round ")
    assert said.endswith(f"run_dir={folder} resume=true goes on")
    assert "Traceback" not in errors


def test_two_runs_in_one_directory(command: list[str], tmp_path: Path) -> None:
    """The second ends at once and leaves the first alone."""
    first = started([*command, "num_rounds=1000"], tmp_path / "run")
    wait_for_round(tmp_path / "run", 1)
    second = started([*command, "num_rounds=1000"], tmp_path / "run")
    _, errors = second.communicate(timeout=SECONDS)
    assert second.returncode == 2
    assert f"run_dir={tmp_path / 'run'}: another run writes into it now" in errors
    first.terminate()
    _, errors = first.communicate(timeout=SECONDS)
    assert first.returncode == 143
    assert_stopped(errors, tmp_path / "run")
    written = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rounds = [json.loads(line)["round"] for line in written]
    assert rounds == list(range(len(rounds))) and len(rounds) > 2
