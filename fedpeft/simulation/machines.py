"""The machines of a Ray cluster. All must have the code of the machine that starts a run.

fedpeft checks the code and does not ship it, because equal numbers also need equal versions of
torch and its like, which a copy of fedpeft's own files would not bring along.
"""

import hashlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedpeft.config.compose import CONF
from fedpeft.versions import installed

PACKAGE = Path(__file__).parent.parent
ANSWER_SECONDS = 60


class Machine(NamedTuple):
    """A machine of the cluster, which Ray calls a node.

    Attributes:
        node: Ray's id of the machine.
        address: the machine's IP address.
        versions: versions of Python, fedpeft and the packages that decide a run's numbers, by name.
    """

    node: str
    address: str
    versions: Mapping[str, str]

    def differs(self, other: "Machine") -> str | None:
        """Return the sentence for code that differs from another machine's; null if none does."""
        for name in dict.fromkeys([*self.versions, *other.versions]):
            here, there = (one.versions.get(name, "unknown") for one in (self, other))
            if there != here:
                return (
                    f"Ray's machine {other.address} has {name} {there}, and this one has {here}: "
                    "install the same on both"
                )
        return None


def this_machine() -> Machine:
    """Return the machine on which this process runs, as Ray knows it."""
    context = ray.get_runtime_context()
    return Machine(context.get_node_id(), ray.util.get_node_ip_address(), code_versions())


@cache
def code_versions() -> dict[str, str]:
    """Return the versions of Python, fedpeft and the packages that decide a run's numbers.

    fedpeft's version holds a hash of its files, because a checkout changes without a new number. A
    suffix such as +cpu is left out, because a build for GPUs has another suffix.
    """
    numbers = {name: number.partition("+")[0] for name, number in installed().items()}
    ours = f"{numbers.pop('fedpeft', 'unknown')} (code {_hash_of_code()})"
    return {"fedpeft": ours, "Python": numbers.pop("python"), **numbers}


def check_machines(home: Machine, num_cpus: float, num_gpus: float) -> None:
    """Check that all machines with room for a worker have this one's code.

    Args:
        home: this machine.
        num_cpus: cores of a worker.
        num_gpus: share of a GPU of a worker.

    Raises:
        ValueError: a machine has another version, has no fedpeft, or does not answer.
    """
    asked: dict[str, Any] = {}
    for node in ray.nodes():
        if node["NodeID"] != home.node and rooms_of(node, num_cpus, num_gpus):
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(this_machine).options(num_cpus=0, scheduling_strategy=there)
            asked[node["NodeManagerAddress"]] = task.remote()
    for address, future in asked.items():
        try:
            reason = home.differs(ray.get(future, timeout=ANSWER_SECONDS))
        except GetTimeoutError:
            reason = f"Ray's machine {address} does not answer within {ANSWER_SECONDS} s"
        except RayError as error:
            reason = (
                f"Ray's machine {address} cannot run this machine's fedpeft "
                f"{home.versions['fedpeft']}: {_last_line(error)}"
            )
        if reason:
            raise ValueError(reason)


def rooms_of(node: Mapping[str, Any], num_cpus: float, num_gpus: float) -> int:
    """Return how many workers a machine can hold.

    Args:
        node: one of ``ray.nodes()``.
        num_cpus: cores of a worker.
        num_gpus: share of a GPU of a worker.
    """
    free = node["Resources"] if node["Alive"] else {}
    by_gpus = [free.get("GPU", 0) / num_gpus] if num_gpus else []
    return int(min(free.get("CPU", 0) / num_cpus, *by_gpus, float("inf")))


def _hash_of_code() -> str:
    whole = hashlib.sha256()
    for name, content in _files():
        whole.update(f"{name} {len(content)}\n".encode() + content)
    return whole.hexdigest()[:12]


def _files() -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of the package's modules and of conf, in the order of names."""
    for root, pattern in ((PACKAGE, "*.py"), (CONF, "*.yaml")):
        for path in sorted(root.rglob(pattern)):
            yield str(path.relative_to(root)), path.read_bytes()


def _last_line(error: RayError) -> str:
    return str(error).strip().splitlines()[-1].strip()
