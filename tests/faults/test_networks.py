"""A deployment between networks: the server in one, three sites in others, one link cut and back.

Each network is a network namespace of this machine with an address of its own. They hang on a
bridge in a further namespace, so that nothing of the machine's own network changes.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpeft.deployment.trial import APP, Trial
from tests.conftest import command
from tests.deployments import completed, lines, overrides_of, summary, until

pytestmark = pytest.mark.slow
SERVER = "10.77.0.1"
PREFIX = f"fedpeft-{os.getpid()}-"  # of the namespaces, which all programs of a machine share
HUB = f"{PREFIX}hub"
PLACES = {
    "server": SERVER,
    "node-0": "10.77.0.10",
    "node-1": "10.77.0.11",
    "node-2": "10.77.0.12",
}
CUT_SECONDS = 30


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def inside(place: str, *words: str) -> None:
    ip("-n", place, *words)


@pytest.fixture
def networks() -> Iterator[None]:
    """Four namespaces on a bridge in a fifth."""
    places = [HUB, *(f"{PREFIX}{name}" for name in PLACES)]
    try:
        for place in places:
            ip("netns", "add", place)
            inside(place, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError):
        _remove(places)
        pytest.skip("network namespaces cannot be made here")
    try:
        inside(HUB, "link", "add", "bridge", "type", "bridge")
        inside(HUB, "link", "set", "bridge", "up")
        for name, address in PLACES.items():
            place, end = f"{PREFIX}{name}", f"to-{name}"
            inside(HUB, "link", "add", end, "type", "veth", "peer", "name", "net", "netns", place)
            inside(HUB, "link", "set", end, "master", "bridge", "up")
            inside(place, "address", "add", f"{address}/24", "dev", "net")
            inside(place, "link", "set", "net", "up")
        yield
    finally:
        _remove(places)


def _remove(places: list[str]) -> None:
    for place in places:
        subprocess.run(["ip", "netns", "delete", place], capture_output=True)


class Between(Trial):
    """A trial whose programs each run in a network of their own."""

    host = SERVER

    def place(self, name: str) -> list[str | Path]:
        return [shutil.which("ip") or "ip", "netns", "exec", f"{PREFIX}{name}"]


def test_a_link_is_cut_and_a_site_moves(networks: None, base: list[str], tmp_path: Path) -> None:
    """The run has the bits of a simulation, whatever the network does meanwhile."""
    method = "fedsa_lora"
    simulated = [*overrides_of(base, method, tmp_path / "simulated"), "num_clients=3"]
    done = command("fedpeft", "run", *simulated, "runtime=inprocess")
    assert done.returncode == 0, done.stderr
    run_dir, trial = tmp_path / "run", Between(tmp_path)
    try:
        trial.start(3, [], base)
        run = trial.submit(APP, overrides_of(base, method, run_dir))
        until(lambda: lines(run_dir) > 1, "round 1 is over")
        inside(HUB, "link", "set", "to-node-0", "down")
        moved = trial.processes.started["node-1"]
        moved.terminate()
        assert moved.wait(60) == 143
        inside(f"{PREFIX}node-1", "address", "flush", "dev", "net")
        inside(f"{PREFIX}node-1", "address", "add", "10.77.0.99/24", "dev", "net")
        trial.processes.start(trial.nodes["node-1"])
        time.sleep(CUT_SECONDS)
        assert lines(run_dir) <= 3  # at most the round that was under way has ended
        inside(HUB, "link", "set", "to-node-0", "up")
        completed(trial, run, run_dir)
    finally:
        trial.processes.stop()
    assert summary(run_dir) == summary(tmp_path / "simulated")
