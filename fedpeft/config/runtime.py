"""The place where clients run: processes, cores, devices, waiting times."""

import os
from dataclasses import dataclass

MOST_THREADS = 1024  # PyTorch ends the process where the system has no more


def check_address(name: str, value: str) -> None:
    """Check the address of a Ray cluster.

    Args:
        name: name of the key or variable that holds the address.
        value: the address.

    Raises:
        ValueError: the value is no address of a cluster that this machine belongs to.
    """
    host, colon, port = value.rpartition(":")
    is_port = port.isascii() and port.isdigit() and 0 < int(port) < 2**16
    if value not in ("auto", "local") and not (host and colon and is_port and "/" not in host):
        raise ValueError(
            f"{name} must be HOST:PORT of a Ray cluster that this machine belongs to, auto or "
            f"local, got {value}"
        )


@dataclass(frozen=True)
class Runtime:
    """The place where clients run.

    Args:
        kind: ``ray`` (worker processes) or ``inprocess`` (same apps and messages, one process).
        num_cpus: cores of a worker; cores / num_cpus workers run at once.
        num_gpus: share of a GPU of a worker, e.g. 0.5 for two workers a GPU.
        total_cpus: cores that workers may take altogether; null for all. A Ray that is started here
            has this many. On a running cluster, a run takes at most this many.
        address: a running Ray cluster that this machine belongs to: ``HOST:PORT``, or ``auto`` for
            the one on this machine. ``local`` starts a Ray of this machine alone. Null takes the
            environment's RAY_ADDRESS if it is set, and else is ``local``.
        threads: torch's threads in every process. The default does not depend on the machine,
            because results are equal bit for bit only for equal numbers of threads.
        device: ``auto`` (a GPU if there is one), ``cpu`` or ``cuda``.
        clients_per_pass: clients that train in one forward and backward pass, each as if alone
            (apart from the order of sums); null chooses by the tokens of a step.
        round_timeout: seconds to wait for a round's replies; late clients are left out.
        join_timeout: seconds to wait until all clients have a node.
        min_replies: usable replies that a round needs: a count (int), or a share (float) of the
            round's clients, rounded up. With fewer, the round is repeated once. If that
            fails too, the run ends, and ``resume=true`` goes on from its last checkpoint.
        wait_after_min: seconds to wait for the other replies once ``min_replies`` usable ones are
            in; null waits until ``round_timeout``.
        lost_state: treatment of a client whose node lacks the kept state that the server counts on:
            ``refuse`` leaves it out and says so, ``restart`` begins its kept state anew.
    """

    kind: str = "ray"
    num_cpus: float = 1
    num_gpus: float = 0
    total_cpus: int | None = None
    address: str | None = None
    threads: int = 1
    device: str = "auto"
    clients_per_pass: int | None = None
    round_timeout: float = 3600
    join_timeout: float = 120
    min_replies: int | float = 0.5
    wait_after_min: float | None = None
    lost_state: str = "refuse"

    def cluster(self) -> tuple[str, str]:
        """Return the key or variable that gives the Ray cluster's address, and the address.

        ``runtime.address`` comes before the environment's RAY_ADDRESS, as overrides of a command
        do.
        """
        if self.address is not None:
            return "runtime.address", self.address
        return "RAY_ADDRESS", os.environ.get("RAY_ADDRESS") or "local"

    def __post_init__(self) -> None:
        if self.kind not in ("ray", "inprocess"):
            raise ValueError(f"runtime.kind must be ray or inprocess, got {self.kind}")
        if self.lost_state not in ("refuse", "restart"):
            raise ValueError(f"runtime.lost_state must be refuse or restart, got {self.lost_state}")
        share = isinstance(self.min_replies, float)
        if not (0 < self.min_replies <= 1 if share else self.min_replies >= 1):
            raise ValueError(
                "runtime.min_replies must be a count >= 1 or a share in (0, 1], got "
                f"{self.min_replies}"
            )
        if self.wait_after_min is not None and self.wait_after_min <= 0:
            raise ValueError(
                f"runtime.wait_after_min must be > 0 or null, got {self.wait_after_min}"
            )
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"runtime.device must be auto, cpu or cuda, got {self.device}")
        if self.threads < 1 or self.num_cpus <= 0 or self.num_gpus < 0:
            raise ValueError(
                "runtime.threads must be >= 1, num_cpus > 0 and num_gpus >= 0, got "
                f"{self.threads}, {self.num_cpus} and {self.num_gpus}"
            )
        if self.threads > MOST_THREADS:
            raise ValueError(f"runtime.threads must be <= {MOST_THREADS}, got {self.threads}")
        if self.total_cpus is not None and self.total_cpus < 1:
            raise ValueError(f"runtime.total_cpus must be >= 1 or null, got {self.total_cpus}")
        if self.total_cpus is not None and self.total_cpus < self.num_cpus:
            raise ValueError(
                f"runtime.total_cpus={self.total_cpus} must be >= the cores of a worker, "
                f"runtime.num_cpus={self.num_cpus:g}"
            )
        if self.address is not None:
            check_address("runtime.address", self.address)
            if self.kind != "ray":
                raise ValueError(f"runtime.address={self.address} is for Ray: set runtime=ray")
        if self.clients_per_pass is not None and self.clients_per_pass < 1:
            raise ValueError(
                f"runtime.clients_per_pass must be >= 1 or null, got {self.clients_per_pass}"
            )
        if self.round_timeout <= 0 or self.join_timeout <= 0:
            raise ValueError(
                "runtime.round_timeout and runtime.join_timeout must be > 0, got "
                f"{self.round_timeout} and {self.join_timeout}"
            )
