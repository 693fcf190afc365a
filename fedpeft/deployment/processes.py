"""Programs that run as long as this process does, each in a session of its own."""

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

BIN = Path(sysconfig.get_path("scripts"))  # programs of the environment that runs this process
STOP_SECONDS = 10  # wait for programs to end by themselves
MOST_SECONDS = 60  # longest wait between a program's end and its next start
PR_SET_PDEATHSIG = 1  # linux/prctl.h

log = logging.getLogger(__name__)


class Program(NamedTuple):
    """A program that this process starts.

    Attributes:
        name: the program's name in messages, of its folder and, if logs are kept, of its log.
        command: the program and its arguments; a program without a folder is this environment's.
    """

    name: str
    command: Sequence[str | Path]


class Processes:
    """Programs in the order of their start.

    Args:
        home: folder for what Flower keeps. In a shared one, a process would use a bundle that
            another has not fully unpacked.
        logs: folder for a log of each program; null for this process's standard error.
    """

    def __init__(self, home: Path, logs: Path | None = None) -> None:
        self.home, self.logs = home, logs
        self.started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, program: Program) -> None:
        """Start a program.

        It has a session of its own, so that Ctrl-C reaches this process alone, which stops all
        programs in order. The system ends it if this process is killed.
        """
        name, (first, *arguments) = program
        with nullcontext(2) if self.logs is None else (self.logs / f"{name}.log").open("ab") as out:
            self.started[name] = subprocess.Popen(
                [BIN / first, *arguments],
                env=environment(self.home / name),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )

    def ended(self) -> dict[str, int]:
        """Return the exit codes of the programs that ended, by name."""
        codes = {name: process.poll() for name, process in self.started.items()}
        return {name: code for name, code in codes.items() if code is not None}

    def wait(self, what: str, done: Callable[[], bool], seconds: float) -> None:
        """Wait until ``done`` is true.

        Args:
            what: the awaited event; the error names it.
            done: called once a second; true ends the wait.
            seconds: longest time to wait.

        Raises:
            TimeoutError: ``done`` did not become true in time.
            RuntimeError: a program ended.
        """
        deadline = time.monotonic() + seconds
        while not done():
            for name, code in self.ended().items():
                raise RuntimeError(f"{name} exited with {code} at its start{self._tail(name)}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {seconds} s for {what}, see the logs in {self.logs}")
            time.sleep(1)  # because asking may take a program of its own

    def _tail(self, name: str) -> str:
        if self.logs is None:
            return ""
        return ":\n" + (self.logs / f"{name}.log").read_text(errors="replace")[-2000:]

    def keep(self, programs: Sequence[Program]) -> None:
        """Start programs, and start each again that ends, until an exception comes."""
        kept = [_Kept(program) for program in programs]
        while True:
            for each in kept:
                each.look(self)
            time.sleep(0.2)

    def stop(self) -> None:
        """End all programs in reverse order, because later ones sign off at earlier ones."""
        # A second signal would leave some behind.
        numbers = (signal.SIGINT, signal.SIGTERM)
        handlers = [signal.signal(number, signal.SIG_IGN) for number in numbers]
        for process in reversed(self.started.values()):
            if not _ended(process, signal.SIGTERM):
                _ended(process, signal.SIGKILL)
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


class _Kept:
    """A program that starts again when it ends, each time after a longer wait if it ends soon."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.wait, self.begun = 0.5, 0.0
        self.due: float | None = 0.0  # time of the next start; null while the program runs

    def look(self, processes: Processes) -> None:
        """Start the program if it is time, and note that it has ended."""
        now, name = time.monotonic(), self.program.name
        if self.due is not None:
            if now >= self.due:
                processes.start(self.program)
                self.begun, self.due = now, None
        elif (code := processes.started[name].poll()) is not None:
            self.wait = 1.0 if now - self.begun > MOST_SECONDS else min(2 * self.wait, MOST_SECONDS)
            self.due = now + self.wait
            log.warning("%s exited with %s and starts again in %.0f s", name, code, self.wait)


def _end_with_parent() -> None:
    """Let the system end this process when its parent is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _ended(process: subprocess.Popen[bytes], number: int) -> bool:
    """Signal a program and its children; return true if all end within STOP_SECONDS."""
    deadline = time.monotonic() + STOP_SECONDS
    while _signalled(process, number):
        if time.monotonic() > deadline:
            return False
        number = 0  # signal 0 only asks whether a process is there
        time.sleep(0.1)
    return True


def _signalled(process: subprocess.Popen[bytes], number: int) -> bool:
    process.poll()  # collects a process that ended, which else still counts as there
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def environment(home: Path) -> dict[str, str]:
    """Return the environment of a Flower process whose home is its own."""
    return os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",  # programs start others by name
        # A proxy would take what is meant to stay on this machine.
        "NO_PROXY": _with_local(os.environ.get("NO_PROXY", "")),
        "no_proxy": _with_local(os.environ.get("no_proxy", "")),
        "TERM": "dumb",  # no colours in JSON, even where they are forced
    }


def _with_local(hosts: str) -> str:
    return ",".join([*filter(None, [hosts]), "127.0.0.1", "localhost"])


def free_ports(count: int) -> list[int]:
    """Return free ports of this machine; all are bound at once, so that they differ."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports
