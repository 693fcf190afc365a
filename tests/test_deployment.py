"""Real processes over TLS give the bits of a simulation, also when a node starts again half-way."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedpeft.deployment.trial import Trial
from tests.deployments import (
    completed,
    copied_app,
    ended,
    lines,
    overrides_of,
    simulated,
    summary,
    until,
)
from tests.networks import Between, link, move, trial_between_networks

pytestmark = pytest.mark.slow
CUT_SECONDS = 30


@pytest.fixture(scope="module")
def expected(
    base: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, object]]:
    return simulated(base, tmp_path_factory.mktemp("inprocess"))


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied_app(tmp_path_factory.mktemp("app"))


@pytest.fixture(scope="module")
def trial(base: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    """A server and three nodes, up and running, each in a network of its own if this can be."""
    with trial_between_networks(tmp_path_factory.mktemp("trial")) as trial:
        try:
            trial.start(3, [], base)
            yield trial
        finally:
            trial.processes.stop()


def child(trial: Trial, program: str, word: str) -> psutil.Process:
    """Return the process below one of the trial's programs that a word of its command names."""
    below = psutil.Process(trial.processes.started[program].pid).children(recursive=True)
    (found,) = [p for p in below if any(part.endswith(word) for part in words(p))]
    return found


def words(process: psutil.Process) -> list[str]:
    """Return a process's command; none if it has ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # a zombie process counts as such
        return []


def test_a_check(base: list[str], trial: Trial, app: Path, tmp_path: Path) -> None:
    """Nodes answer under their policy, and a refusal is the text with which the run fails."""
    overrides = [*overrides_of(base, "lora", tmp_path / "run"), "check=true"]
    good = trial.submit(app, overrides)
    bad = ended(trial, trial.submit(app, [*overrides, "batch_size=5000"]))
    assert ended(trial, good)["status"] == "finished:completed"
    assert bad["status"] == "finished:failed"
    limited = "clients 0-2: this site's policy limits batch_size to 4096, got 5000"
    assert limited in bad["status-details"]
    assert not (tmp_path / "run").exists()


def test_nodes_start_again_a_link_is_cut_and_a_site_moves(
    base: list[str],
    expected: dict[str, dict[str, object]],
    trial: Trial,
    app: Path,
    tmp_path: Path,
) -> None:
    """Personal parameters are on the nodes' disks, and a round waits for the nodes it needs."""
    method, run_dir = "fedsa_lora", tmp_path / "run"
    run = trial.submit(app, overrides_of(base, method, run_dir))
    until(lambda: lines(run_dir) > 1, "round 1 is over")
    between = isinstance(trial, Between)
    if between:
        link("node-0", "down")
    child(trial, "node-2", "fedpeft.deployment.worker").kill()
    node = trial.processes.started["node-1"]
    node.send_signal(signal.SIGTERM)
    assert node.wait(60) == 143
    if between:
        move("node-1", "10.77.0.99")
    trial.processes.start(trial.nodes["node-1"])
    if between:
        time.sleep(CUT_SECONDS)
        assert lines(run_dir) <= 3  # at most the round that was under way has ended
        link("node-0", "up")
    completed(trial, run, run_dir)
    assert summary(run_dir) == expected[method]
    if not between:
        pytest.skip("nodes started again, but network namespaces, to cut a link, cannot be made")


def test_a_server_that_is_killed_half_way(
    base: list[str],
    expected: dict[str, dict[str, object]],
    trial: Trial,
    app: Path,
    tmp_path: Path,
) -> None:
    """A new run goes on from the last checkpoint, where the old one does not go on by itself."""
    method, run_dir = "fedtt_plus", tmp_path / "run"
    overrides = [*overrides_of(base, method, run_dir), "resume=true"]
    trial.submit(app, overrides)
    until(lambda: lines(run_dir) > 1, "round 1 is over")
    child(trial, "server", "flwr-serverapp").kill()
    run = trial.submit(app, overrides)
    until(lambda: lines(run_dir) > 2, "round 2 is over")
    child(trial, "server", "flower-superlink").kill()
    until(trial.answers, "the SuperLink is there")
    # The ServerApp asks again until the SuperLink is back, which Flower may take for its end.
    if ended(trial, run)["status"] != "finished:completed":
        completed(trial, trial.submit(app, overrides), run_dir)
    assert summary(run_dir) == expected[method]


# Prints the status of the answer to each path that standard input names.
ASK = """
import json, ssl, sys
from http.client import HTTPSConnection

certificate, host, port = sys.argv[1:]
context = ssl.create_default_context(cafile=certificate)
found = {}
for path in json.load(sys.stdin):
    opened = HTTPSConnection(host, int(port), context=context, timeout=20)
    opened.request("POST", path, b"", {"Content-Type": "application/protobuf"})
    found[path] = opened.getresponse().status
    opened.close()
print(json.dumps(found))
"""


def test_an_outsider_reaches_only_what_sites_use(trial: Trial) -> None:
    """The address and the public certificate are not enough to submit a run or to take a task."""
    statuses = {
        "/v1/fleet/pull-messages": 401,  # the SuperLink's own answer to one without a key
        "/v1/fleet/register-node": 401,
        "/v1/control/list-runs": 404,
        "/v1/control/register-node": 404,
        "/v1/runtime/acquire-task": 404,
        "/v1/fleet/../control/list-runs": 404,
        "/v1/fleet/%2e%2e/control/list-runs": 404,
        "/v1/fleet/%2e%2e%2fcontrol%2flist-runs": 404,
        "//v1/control/list-runs": 404,
        "/docs": 404,
    }
    certificate, words = trial.folder / "server.pem", trial.place("outside")
    asked = subprocess.run(
        [*words, sys.executable, "-c", ASK, certificate, trial.host, str(trial.port)],
        input=json.dumps(list(statuses)),
        capture_output=True,
        text=True,
    )
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout) == statuses


def test_a_site_that_the_operator_removes_stays_away(trial: Trial) -> None:
    """Its programs go on and try; the key is refused, and Flower registers it no second time.

    No test of the trial may follow, because a node is gone for good.
    """

    def refusals() -> dict[str, int]:
        logs = {name: (trial.folder / f"{name}.log").read_text() for name in trial.nodes}
        return {name: text.count("Failed to activate SuperNode") for name, text in logs.items()}

    until(lambda: trial.online() == 3, "all nodes are online")
    before = refusals()
    node = trial.flwr("supernode", "list", "local")["nodes"][0]["node-id"]
    trial.flwr("supernode", "unregister", node, "local")
    until(lambda: refusals() != before, "the site's key is refused")
    assert trial.online() == 2
    (name,) = [name for name, count in refusals().items() if count > before[name]]
    with pytest.raises(RuntimeError, match="Public key already in use"):
        trial.flwr("supernode", "register", trial.folder / f"{name}.pub", "local")


def test_the_command_ends_with_one_sentence(base: list[str], tmp_path: Path) -> None:
    command_line = [sys.executable, "-c", "from fedpeft.cli import main; main()"]
    command_line += ["deploy", "trial", "--folder", "x"]
    for wrong, sentence in (
        (["--nodes", "0"], "fedpeft: --nodes must be >= 1, got 0\n"),
        (["--data-path", "nowhere"], "fedpeft: --data-path: there is no folder nowhere\n"),
    ):
        done = subprocess.run([*command_line, *wrong], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (2, sentence)
    assert not (tmp_path / "x").exists()
