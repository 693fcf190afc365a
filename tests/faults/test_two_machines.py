"""Ray on two machines without a shared folder: any worker takes any client, and the bits stay.

The second machine is a Ray node of this one in a mount namespace of its own, in which the folders
of the run and of kept states are empty and private.
"""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

import pytest
import ray
from flwr.app import MessageType

from fedpeft.config.runtime import Runtime
from fedpeft.deployment.processes import free_ports
from fedpeft.simulation import machines
from fedpeft.simulation.launch import run, simulate
from fedpeft.simulation.ray import RayGrid
from fedpeft.simulation.start_ray import start_ray
from tests.conftest import command, quiet

# Ray leaves files of its processes open, and Python warns when it collects them.
OPEN = "ignore::pytest.PytestUnraisableExceptionWarning"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(OPEN)]
RAY = str(Path(sys.executable).parent / "ray")
SECOND = "127.0.0.2"  # address of the second machine
HIDE = 'for folder in "$FEDPEFT_STATE" "$HIDDEN"; do mount -t tmpfs none "$folder" || exit 9; done'
SECONDS = 60


class Cluster(NamedTuple):
    """Two machines, of which this process is on the first.

    Attributes:
        address: the cluster's address, host:port.
        hidden: a folder of the first machine that the second does not see.
        second: the process group of the second machine.
    """

    address: str
    hidden: Path
    second: int


def started(words: Sequence[str], folder: Path, **environment: str) -> "subprocess.Popen[bytes]":
    """Start one of Ray's machines, with one core, and wait until it runs."""
    rest = [f"--temp-dir={folder}", "--num-cpus=1", "--disable-usage-stats", "--block"]
    log = folder.with_suffix(".log")
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*words, *rest],
            env=os.environ | environment,
            stdout=file,
            stderr=file,
            start_new_session=True,  # all of its processes die with it
        )
    deadline = time.monotonic() + SECONDS
    while "Ray runtime started" not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            stop(process)
            pytest.fail(log.read_text())
        time.sleep(0.1)
    return process


def stop(process: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0:
        pytest.skip("this system does not let us have a mount namespace (unshare -m)")
    hidden, (port, of_clients) = tmp_path_factory.mktemp("hidden"), free_ports(2)
    folder = Path(mkdtemp(prefix="ray-"))  # short, because the paths of sockets are limited
    running = []
    try:
        ports = [f"--port={port}", f"--ray-client-server-port={of_clients}"]
        head = [RAY, "start", "--head", "--include-dashboard=false", *ports]
        # so that the loss of a machine is noticed within seconds
        running.append(started(head, folder / "1", RAY_health_check_period_ms="1000"))
        address = f"127.0.0.1:{port}"
        inside = f'{HIDE}; exec "$@"'
        join = [RAY, "start", f"--address={address}", f"--node-ip-address={SECOND}"]
        second = ["unshare", "-m", "sh", "-c", inside, "sh", *join]
        running.append(started(second, folder / "2", HIDDEN=str(hidden)))
        assert start_ray(Runtime(address=address, total_cpus=2))
        yield Cluster(address, hidden, running[1].pid)
    finally:
        ray.shutdown()
        for process in running:
            stop(process)
        shutil.rmtree(folder, ignore_errors=True)
        gc.collect()


class Alternating(RayGrid):
    """Lets each client change machines from round to round, and to be evaluated too.

    Attributes:
        trained: addresses of the machines on which each client trained, in order.
        doomed: the process group that is killed when it has been sent a message of round 2.
    """

    def __init__(self, num_clients: int) -> None:
        self.trained: dict[int, list[str]] = defaultdict(list)
        self.doomed: int | None = None
        self._both = False
        super().__init__(num_clients, 1, 0)

    def _hand_out(self) -> None:
        self._both = self._both or len(self._machines) == 2
        while self._queue and self._both:
            (message,) = self._queue.popleft()
            client = message.metadata.dst_node_id - 1
            trains = message.metadata.message_type == MessageType.TRAIN
            turn = client + len(self.trained[client]) + (not trains)
            ordered = sorted(self._machines.items(), key=_is_second)
            worker, machine = ordered[turn % len(ordered)]
            self._give(worker, [message])
            if trains:
                self.trained[client].append(machine.address)
                if self.doomed and machine.address == SECOND and len(self.trained[client]) == 2:
                    os.killpg(self.doomed, signal.SIGKILL)
                    self.doomed = None


def _is_second(item: tuple[Any, machines.Machine]) -> bool:
    return item[1].address == SECOND


def overrides_of(base: Sequence[str], run_dir: Path, *more: str) -> list[str]:
    """Return the overrides of a run in which clients keep B and the moments."""
    rest = [o for o in base if not o.startswith(("method=", "runtime=", "num_rounds="))]
    personal = ["method=fedsa_lora", "method.rank=4", "optimizer.keep_state=true"]
    fixed = ["num_rounds=3", "runtime.clients_per_pass=1", "evaluation.clients=always"]
    return [*rest, *personal, *fixed, *more, f"run_dir={run_dir}"]


@pytest.fixture(scope="module")
def expected(base: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of the run in one process."""
    folder = tmp_path_factory.mktemp("inprocess")
    return run(overrides_of(base, folder / "run", "runtime=inprocess"), quiet())


def test_the_command_finds_the_cluster_by_the_environment(
    base: list[str], expected: dict[str, Any], cluster: Cluster
) -> None:
    overrides = overrides_of(base, cluster.hidden / "command", "runtime=ray")
    words = ["fedpeft", "run", "--json", *overrides, "runtime.total_cpus=2"]
    done = command(*words, RAY_ADDRESS=cluster.address)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["refused"] == {}
    assert summary["shared_state_sha256"] == expected["shared_state_sha256"]


def test_a_machine_with_other_code_is_refused(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = machines.code_versions()
    here = there | {"fedpeft": "0.0.9 (code 0123456789ab)"}
    monkeypatch.setattr(machines, "code_versions", lambda: here)
    with pytest.raises(ValueError) as error:
        RayGrid(2, 1, 0)
    assert str(error.value) == (
        f"Ray's machine {SECOND} has fedpeft {there['fedpeft']}, and this one has 0.0.9 (code "
        "0123456789ab): install the same on both"
    )


@pytest.fixture(scope="module")
def grid(cluster: Cluster) -> Iterator[Alternating]:
    alternating = Alternating(3)
    with alternating:
        yield alternating


def test_clients_change_machines_and_the_bits_stay(
    base: list[str], expected: dict[str, Any], cluster: Cluster, grid: Alternating
) -> None:
    grid.trained.clear()
    overrides = overrides_of(base, cluster.hidden / "run", "runtime=ray")
    summary = simulate(grid, overrides, quiet())
    assert summary["refused"] == {}
    for addresses in grid.trained.values():
        assert addresses[0] == addresses[2] != addresses[1]
        assert SECOND in addresses[:2]
    for key in ("shared_state_sha256", "final", "best"):
        assert summary[key] == expected[key], key
    kept = sorted((cluster.hidden / "run" / "clients").rglob("client_*/*"))
    assert {path.parent.name for path in kept} == {"client_0", "client_1", "client_2"}
    # files of the last round, of the checkpoint before it and perhaps of the best round
    assert {path.name for path in kept if path.parent.name == "client_1"} >= {"00003.safetensors"}


def test_a_machine_without_the_weights_says_so(
    base: list[str], cluster: Cluster, grid: Alternating, checkpoint: Path
) -> None:
    grid.trained.clear()
    weights = cluster.hidden / "weights"
    shutil.copytree(checkpoint, weights)
    more = ["runtime=ray", f"model.path={weights}", "num_rounds=1", "runtime.min_replies=1"]
    overrides = overrides_of(base, cluster.hidden / "weightless", *more)
    summary = simulate(grid, [*overrides, "evaluation.clients=never"], quiet())
    there = {client for client, addresses in grid.trained.items() if addresses == [SECOND]}
    assert there == {1}
    assert list(summary["refused"]["1"]) == ["1"]
    reason = summary["refused"]["1"]["1"]
    assert reason.startswith(f"on the machine {SECOND}: model.path={weights} ")


def test_a_machine_that_is_lost_takes_no_state_with_it(
    base: list[str], cluster: Cluster, grid: Alternating
) -> None:
    grid.trained.clear()
    grid.doomed = cluster.second
    overrides = overrides_of(base, cluster.hidden / "lost", "runtime=ray")
    summary = simulate(grid, overrides, quiet())
    assert list(summary["refused"]) == ["2"]  # in round 3 all clients go on
    (reason,) = summary["refused"]["2"].values()
    assert reason.startswith(f"on the machine {SECOND}: the worker that was at it died")
    assert {addresses[-1] == SECOND for addresses in grid.trained.values()} == {False}
