"""Start and stop the Flower processes of ``deploy_local.py`` together."""

import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path

BIN = Path(sysconfig.get_path("scripts"))  # of the environment that runs this script
START_SECONDS = 120  # wait for the processes to be up
STOP_SECONDS = 10  # wait for processes to end by themselves

Process = subprocess.Popen[bytes]


class Processes:
    """Processes in the order of their start, each with its log ``<name>.log`` in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: dict[str, Process] = {}

    def launch(self, name: str, command: str, *files: str | Path) -> None:
        """Start a process in a session of its own.

        Ctrl-C then reaches this script alone, which stops all processes in order.

        Args:
            name: of the process and its log.
            command: the program and options without spaces.
            files: further options, which may have spaces.
        """
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
        """Wait until ``done`` is true; exit if a process ends or after START_SECONDS."""
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
        """End all processes, the SuperLink last, because the rest sign off there."""
        for number in (signal.SIGINT, signal.SIGTERM):  # a second one would leave some behind
            signal.signal(number, signal.SIG_IGN)
        first, rest = list(self.started.values())[:1], list(self.started.values())[1:]
        for batch in (rest, first):
            if not _ended(batch, signal.SIGTERM):
                _ended(batch, signal.SIGKILL)


def _ended(batch: Sequence[Process], number: int) -> bool:
    """Signal processes and their children; return true if all end within STOP_SECONDS."""
    deadline = time.monotonic() + STOP_SECONDS
    while any([_signalled(process, number) for process in batch]):
        if time.monotonic() > deadline:
            return False
        number = 0  # signal 0 only asks whether a process is there
        time.sleep(0.1)
    return True


def _signalled(process: Process, number: int) -> bool:
    process.poll()  # collects a process that ended, which else still counts as there
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def environment(home: Path) -> dict[str, str]:
    """Return the environment of a process, with a Flower home of its own.

    In a shared home, a process would use a bundle that another one has not fully unpacked.
    """
    return os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",  # processes start others by name
        "TERM": "dumb",  # no colours in JSON, even where they are forced
    }


def free_ports(count: int) -> list[int]:
    """Return free ports; all are bound at once, so that they differ."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def listens(port: int) -> bool:
    """Tell whether a process of this machine listens on a port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
