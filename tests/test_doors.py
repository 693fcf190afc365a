"""All four doors give the same bits: in process, Ray, ``flwr run``, and real processes over TLS."""

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpeft.config.overrides import join
from tests.conftest import command
from tests.deployments import copied_app, overrides_of, simulated, summary

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def expected(
    base: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, object]]:
    return simulated(base, tmp_path_factory.mktemp("inprocess"))


def test_ray(base: list[str], expected: dict[str, dict[str, object]], tmp_path: Path) -> None:
    whole = expected["fedsa_lora"]
    overrides = [*overrides_of(base, "fedsa_lora", tmp_path / "run"), "runtime=ray"]
    done = command("fedpeft", "run", "--json", *overrides, "runtime.total_cpus=2")
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "run") == whole
    assert json.loads(done.stdout)["shared_state_sha256"] == whole["shared_state_sha256"]


def test_a_ray_that_runs_already(
    base: list[str], expected: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    overrides = overrides_of(base, "fedtt_plus", tmp_path / "run")
    code = "import ray; ray.init(num_cpus=1); from fedpeft.cli import main; main()"
    done = command(sys.executable, "-c", code, "run", *overrides, "runtime=ray")
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "run") == expected["fedtt_plus"]


def test_ray_ends_with_one_sentence_for_wrong_input(base: list[str], tmp_path: Path) -> None:
    overrides = [*overrides_of(base, "lora", tmp_path / "run"), "method.rank=0", "runtime=ray"]
    done = command("fedpeft", "run", *overrides)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fedpeft: method.rank must be >= 1, got 0\n"
    assert not (tmp_path / "run").exists()


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment of ``flwr run``: its home and free ports. Ends the SuperLink that it leaves."""
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(str(free.getsockname()[1]))
    yield {
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": ports[0],
        "FLWR_LOCAL_CONTROL_API_PORT": ports[1],
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
    }
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if any("flower-superlink" in word for word in words) and ports[0] in words:
            os.kill(int(process.name), signal.SIGTERM)


def test_flwr_run(
    base: list[str],
    expected: dict[str, dict[str, object]],
    flower: dict[str, str],
    tmp_path: Path,
) -> None:
    overrides = join(overrides_of(base, "fedsa_lora", tmp_path / "run"))
    (tmp_path / "app").mkdir()
    done = command(
        "flwr",
        "run",
        str(copied_app(tmp_path / "app")),
        "--run-config",
        f'overrides="{overrides}"',
        "--federation-config",
        "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=1",
        "--stream",
        **flower,
    )
    assert (tmp_path / "run" / "summary.json").exists(), done.stdout + done.stderr
    assert summary(tmp_path / "run") == expected["fedsa_lora"]
    whole = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert whole["command"] == "flwr run"
