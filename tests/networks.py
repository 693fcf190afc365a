"""A deployment between networks of this machine: the server in one, three sites in others.

Each network is a network namespace with an address of its own. They hang on a bridge in a further
namespace, so that nothing of the machine's own network changes.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedpeft.deployment.trial import Trial

SERVER = "10.77.0.1"
PREFIX = f"fedpeft-{os.getpid()}-"  # begins namespaces' names, which a machine's programs share
HUB = f"{PREFIX}hub"
PLACES = {
    "server": SERVER,
    "node-0": "10.77.0.10",
    "node-1": "10.77.0.11",
    "node-2": "10.77.0.12",
    "outside": "10.77.0.66",
}


class Between(Trial):
    """A trial whose programs each run in a network of their own."""

    host = SERVER

    def place(self, name: str) -> list[str | Path]:
        return [shutil.which("ip") or "ip", "netns", "exec", f"{PREFIX}{name}"]


@contextmanager
def trial_between_networks(folder: Path) -> Iterator[Trial]:
    """Yield a trial with its networks; one on the machine's own where none can be made."""
    places = [HUB, *(f"{PREFIX}{name}" for name in PLACES)]
    try:
        for place in places:
            ip("netns", "add", place)
            inside(place, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError):
        _remove(places)
        yield Trial(folder)
        return
    try:
        _connect()
        yield Between(folder)
    finally:
        _remove(places)


def ip(*words: str) -> None:
    """Run the program ``ip``."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


def inside(place: str, *words: str) -> None:
    """Run ``ip`` in a namespace."""
    ip("-n", place, *words)


def link(name: str, state: str) -> None:
    """Set the link of a place ``up`` or ``down``, at the bridge."""
    inside(HUB, "link", "set", f"to-{name}", state)


def move(name: str, address: str) -> None:
    """Give a place another address."""
    inside(f"{PREFIX}{name}", "address", "flush", "dev", "net")
    inside(f"{PREFIX}{name}", "address", "add", f"{address}/24", "dev", "net")


def _connect() -> None:
    inside(HUB, "link", "add", "bridge", "type", "bridge")
    inside(HUB, "link", "set", "bridge", "up")
    for name, address in PLACES.items():
        place, end = f"{PREFIX}{name}", f"to-{name}"
        inside(HUB, "link", "add", end, "type", "veth", "peer", "name", "net", "netns", place)
        inside(HUB, "link", "set", end, "master", "bridge", "up")
        inside(place, "address", "add", f"{address}/24", "dev", "net")
        inside(place, "link", "set", "net", "up")


def _remove(places: list[str]) -> None:
    for place in places:
        subprocess.run(["ip", "netns", "delete", place], capture_output=True)
