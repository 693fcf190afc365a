"""Starts Ray. Every private name of Ray that fedpeft needs stands in this file.

It imports no torch, so that Ray starts while another thread imports torch.
"""

import logging
import os
import sys

import ray

from fedpeft.config.schema import Runtime

# Ray's private name for its ``worker_process_setup_hook``. The public option belongs to a runtime
# environment, for which workers start later.
SETUP_HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"


def start_ray(runtime: Runtime) -> bool:
    """Start Ray, and return true, unless it runs already.

    Workers import the clients' modules as soon as they start. With GPUs they do not, because an
    import may look for GPUs before Ray has given the worker its own.
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
    ray.init(
        num_cpus=runtime.total_cpus,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    return True
