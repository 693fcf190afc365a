"""Starts Ray. Every private name of Ray that fedpeft needs stands in this file.

It imports no torch, so that Ray starts while another thread imports torch.
"""

import logging
import os
import sys

import ray

from fedpeft.config.schema import Runtime

# Ray's own name for its ``worker_process_setup_hook``, which would be a runtime environment, and
# workers for that start later.
SETUP_HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"


def start_ray(runtime: Runtime) -> bool:
    """Start Ray unless it runs already; tell whether it was started.

    Workers that start with Ray import at once what clients import, but not where Ray says later
    which GPU is theirs, because an import may look for GPUs before.
    """
    # Actors inherit the environment as Ray starts, and would run at nice 15.
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
