"""fedpeft: federated parameter-efficient fine-tuning on Flower.

The names below are the public API. Each is imported when it is first asked for, because torch and
Ray take seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedpeft.client.app import client_app
    from fedpeft.config.load import load_config
    from fedpeft.data.tasks.base import Task
    from fedpeft.export.load import load
    from fedpeft.methods.base import At, Method, Phase, Round, Term
    from fedpeft.server.strategy import FederatedPEFT
    from fedpeft.simulation.launch import run
    from fedpeft.state import Role, State

__version__ = "0.1.0"

_HOMES = {
    "client_app": "fedpeft.client.app",
    "load_config": "fedpeft.config.load",
    "load": "fedpeft.export.load",
    "Task": "fedpeft.data.tasks.base",
    "At": "fedpeft.methods.base",
    "Method": "fedpeft.methods.base",
    "Phase": "fedpeft.methods.base",
    "Round": "fedpeft.methods.base",
    "Term": "fedpeft.methods.base",
    "FederatedPEFT": "fedpeft.server.strategy",
    "run": "fedpeft.simulation.launch",
    "Role": "fedpeft.state",
    "State": "fedpeft.state",
}

__all__ = [
    "At",
    "FederatedPEFT",
    "Method",
    "Phase",
    "Role",
    "Round",
    "State",
    "Task",
    "Term",
    "client_app",
    "load",
    "load_config",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module fedpeft has no attribute {name}")
    return getattr(import_module(_HOMES[name]), name)
