"""The Flower processes that ``deploy_local.py`` starts and ends together."""

import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path

BIN = Path(sysconfig.get_path("scripts"))  # of the environment that runs this
START_SECONDS = 120  # for the processes to be there
STOP_SECONDS = 10  # for the others, then for the first one, to leave by themselves

Process = subprocess.Popen[bytes]


class Processes:
    """Started one after the other, each with its log ``<name>.log`` in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: dict[str, Process] = {}

    def launch(self, name: str, command: str, *files: str | Path) -> None:
        """In a session of its own: Ctrl-C is for this script alone, which stops all in order."""
        program, *options = command.split()
        with (self.folder / f"{name}.log").open("wb") as log:
            self.started[name] = subprocess.Popen(
                [BIN / program, *options, *files],
                env=environment(self.folder / name),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, what: str, done: Callable[[], bool]) -> None:
        """Until it is done; exits when a process has ended instead, or in the end."""
        deadline = time.monotonic() + START_SECONDS
        while not done():
            for name, process in self.started.items():
                if process.poll() is not None:
                    log = (self.folder / f"{name}.log").read_text(errors="replace")[-2000:]
                    sys.exit(f"{name} exited with {process.returncode} at its start:\n{log}")
            if time.monotonic() > deadline:
                sys.exit(f"waited {START_SECONDS} s for {what}, see the logs in {self.folder}")
            time.sleep(0.2)

    def stop(self) -> None:
        """Ends all, the first one (the SuperLink, where the others sign off) at last."""
        for number in (signal.SIGINT, signal.SIGTERM):  # a second one would leave some behind
            signal.signal(number, signal.SIG_IGN)
        first, others = list(self.started.values())[:1], list(self.started.values())[1:]
        for batch in (others, first):
            if not _ended(batch, signal.SIGTERM):
                _ended(batch, signal.SIGKILL)


def _ended(batch: Sequence[Process], number: int) -> bool:
    """Signals processes and those they started; whether all of them have gone in time."""
    deadline = time.monotonic() + STOP_SECONDS
    while any([_signalled(process, number) for process in batch]):
        if time.monotonic() > deadline:
            return False
        number = 0  # from now on only ask
        time.sleep(0.1)
    return True


def _signalled(process: Process, number: int) -> bool:
    process.poll()  # collects it: until then it counts as there
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def environment(home: Path) -> dict[str, str]:
    """A Flower home for each process: one that finds another's half unpacked bundle uses it."""
    return os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",  # they start others by name
        "TERM": "dumb",  # no colours in JSON, even where they are forced
    }


def free_ports(count: int) -> list[int]:
    """Bound all at once, so that they differ."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
