"""All four doors give the same bits: in process, Ray, ``flwr run``, and real processes over TLS."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpeft.config.load import join

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
METHODS = ("fedsa_lora", "fedtt_plus")  # one with personal parameters, one with changing roles


def given(base: list[str], method: str, run_dir: Path) -> list[str]:
    rest = [o for o in base if not o.startswith(("method=", "runtime="))]
    one_by_one = (
        "runtime.clients_per_pass=1"  # as real machines train; together, sums are in another order
    )
    return [
        *rest,
        f"method={method}",
        "evaluation.clients=always",
        one_by_one,
        f"run_dir={run_dir}",
    ]


def summary(run_dir: Path) -> dict[str, object]:
    """What all doors must agree on."""
    found = json.loads((run_dir / "summary.json").read_text())
    # Messages carry the overrides, and these name the door: only that part of the bytes differs.
    for key in ("downlink_bytes", "evaluation_downlink_bytes"):
        del found["bytes"][key]
    return {key: found[key] for key in ("shared_state_sha256", "final", "bytes", "refused")}


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program of this environment."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        arguments,
        env=os.environ | {"PATH": path} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.fixture(scope="module")
def expected(
    base: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, object]]:
    """The summaries of runs in one process, through the command line."""
    found = {}
    for method in METHODS:
        run_dir = tmp_path_factory.mktemp(method) / "run"
        done = command("fedpeft", "run", *given(base, method, run_dir), "runtime=inprocess")
        assert done.returncode == 0, done.stderr
        found[method] = summary(run_dir)
    assert found["fedsa_lora"]["refused"] == {}
    assert found["fedsa_lora"] != found["fedtt_plus"]
    return found


@pytest.mark.parametrize("actors", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_ray(
    base: list[str],
    expected: dict[str, dict[str, object]],
    method: str,
    actors: int,
    tmp_path: Path,
) -> None:
    overrides = given(base, method, tmp_path / "run")
    done = command(
        "fedpeft", "run", "--json", *overrides, "runtime=ray", f"runtime.total_cpus={actors}"
    )
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "run") == expected[method]
    assert json.loads(done.stdout)["shared_state_sha256"] == expected[method]["shared_state_sha256"]


def test_a_ray_that_runs_already(
    base: list[str], expected: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    overrides = given(base, "fedtt_plus", tmp_path / "run")
    code = "import ray; ray.init(num_cpus=1); from fedpeft.cli import main; main()"
    done = command(sys.executable, "-c", code, "run", *overrides, "runtime=ray")
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "run") == expected["fedtt_plus"]


def test_ray_ends_with_one_sentence_for_wrong_input(base: list[str], tmp_path: Path) -> None:
    overrides = [*given(base, "lora", tmp_path / "run"), "method.rank=0", "runtime=ray"]
    done = command("fedpeft", "run", *overrides)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fedpeft: method.rank must be >= 1, got 0\n"
    assert not (tmp_path / "run").exists()


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An own home and ports; the SuperLink that ``flwr run`` leaves behind is ended."""
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
    overrides = join(given(base, "fedsa_lora", tmp_path / "run"))
    done = command(
        "flwr",
        "run",
        str(ROOT),
        "--run-config",
        f'overrides="{overrides}"',
        "--federation-config",
        "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=2",
        "--stream",
        **flower,
    )
    assert (tmp_path / "run" / "summary.json").exists(), done.stdout + done.stderr
    assert summary(tmp_path / "run") == expected["fedsa_lora"]


def test_three_supernodes_over_tls(
    base: list[str], expected: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    overrides = given(base, "fedsa_lora", tmp_path / "run")
    done = command(sys.executable, "scripts/deploy_local.py", "--", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary(tmp_path / "run") == expected["fedsa_lora"]
