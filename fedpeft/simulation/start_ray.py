"""Starts Ray. Every private name of Ray that fedpeft needs stands in this file.

It imports no torch, so that Ray starts while another thread imports torch.
"""

import logging
import os
import socket
import sys
from typing import Any

import ray

from fedpeft.config.runtime import Runtime, check_address

# Ray's private name for its ``worker_process_setup_hook``. The public option belongs to a runtime
# environment, for which workers start later.
SETUP_HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
ANSWER_SECONDS = 10
STARTS = 3


def start_ray(runtime: Runtime) -> bool:
    """Start Ray or connect to a running cluster, and return true, unless this process has a Ray.

    Workers import the clients' modules as soon as they start. With GPUs they do not, because an
    import may look for GPUs before Ray has given the worker its own. Those of a running cluster
    have the environment with which it was started, and import later.

    Raises:
        ValueError: nothing answers at the address.
        RuntimeError: Ray does not start on this machine.
    """
    # Actors inherit this environment; Ray's default would run them at nice 15.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.pop(SETUP_HOOK, None)
    if runtime.num_gpus == 0:
        os.environ[SETUP_HOOK] = "fedpeft.client.app.ready"
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    if ray.is_initialized():  # as within a job of Hydra's Ray launcher
        return False
    name, address = address_of(runtime)
    quiet: Any = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == "local":
        _start_here(address=address, num_cpus=runtime.total_cpus, include_dashboard=False, **quiet)
        return True
    check_answers(name, address)
    try:
        ray.init(address, **quiet)  # its cores are the cluster's; RayGrid heeds total_cpus
    except (ConnectionError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{name}={address}: {reason}") from error
    return True


def _start_here(**settings: Any) -> None:
    """Start a Ray of this machine, again if that fails.

    Ray gives its own processes 30 seconds to answer, which a busy machine does not always keep.

    Args:
        settings: arguments of ``ray.init``.

    Raises:
        RuntimeError: the start failed ``STARTS`` times.
    """
    for start in range(1, STARTS + 1):
        try:
            ray.init(**settings)
            return
        except Exception as error:  # Ray raises nothing more exact
            ray.shutdown()
            if start == STARTS:
                reason = " ".join(str(error).split())
                raise RuntimeError(
                    f"Ray did not start on this machine, tried {STARTS} times: {reason} "
                    "(runtime=inprocess does without Ray)"
                ) from error


def address_of(runtime: Runtime) -> tuple[str, str]:
    """Return what ``Runtime.cluster`` does, checked.

    Raises:
        ValueError: RAY_ADDRESS is not the address of a cluster that this machine can belong to.
    """
    name, address = runtime.cluster()
    check_address(name, address)
    return name, address


def check_answers(name: str, address: str) -> None:
    """Check that something answers at an address, for which Ray itself would wait for minutes.

    Args:
        name: name of the key or variable that holds the address.
        address: HOST:PORT, or ``auto``, which is not checked.

    Raises:
        ValueError: nothing answers at the address.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except OSError as error:
        raise ValueError(f"{name}={address}: no Ray cluster answers there ({error})") from error
