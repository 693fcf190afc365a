"""``fedpeft deploy trial``: a server and its nodes on this machine, one run, and their end.

It starts the same two commands that a deployment has, with TLS, a key for each node, and a log of
each program in one folder.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedpeft.deployment.keys import write_certificate, write_node_keys
from fedpeft.deployment.node import toml
from fedpeft.deployment.processes import BIN, Processes, Program, environment, free_ports

APP = Path(__file__).parents[2]  # a checkout; Flower submits a project's folder
START_SECONDS = 240
POLL_SECONDS = 2
OF_SITES = ("model=", "model.", "data=", "data.", "partition.file=", "partition.column=")


def main(arguments: list[str]) -> None:
    """Try a deployment on this machine: ``fedpeft deploy trial``.

    Raises:
        ValueError: an argument is wrong.
        RuntimeError: a program ended, or the run did not complete.
        TimeoutError: the programs were not up in time.
    """
    args = parse(arguments)
    os.umask(0o077)  # keys and states are this user's alone
    trial = Trial(new_folder(args.folder))
    try:
        trial.start(args.nodes, args.data_path, args.overrides)
        trial.run(args.app, [f"num_clients={args.nodes}", *args.overrides])
    finally:
        trial.processes.stop()
    if args.folder is None:
        shutil.rmtree(trial.folder)


def say(line: str) -> None:
    """Print on standard error, because standard output is for the run's log."""
    print(line, file=sys.stderr, flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the arguments after the word ``trial``, checked; ``--help`` may stand in its place.

    Raises:
        ValueError: the first word is not ``trial``, or a number or a folder is wrong.
    """
    first, rest = arguments[:1], arguments[1:]
    if first not in (["trial"], ["-h"], ["--help"]):
        raise ValueError(f"deploy must be followed by trial, got {' '.join(first)!r}")
    parser = argparse.ArgumentParser(prog="fedpeft deploy trial", description=__doc__)
    add = parser.add_argument
    add("--nodes", type=int, default=3, help="nodes, one client each (default: 3)")
    add("--data-path", action="append", default=[], help="a folder for all nodes, or one for each")
    add("--folder", type=Path, help="a new or empty folder that stays (default: temporary)")
    add("--app", type=Path, default=APP, help="the project's folder, a checkout of fedpeft")
    add("overrides", nargs="*", help="the run's configuration")
    args = parser.parse_args(rest if first == ["trial"] else first)
    if args.nodes < 1:
        raise ValueError(f"--nodes must be >= 1, got {args.nodes}")
    if (count := len(args.data_path)) not in (0, 1, args.nodes):
        raise ValueError(f"--data-path must come 0, 1 or {args.nodes} times, got {count}")
    for path in args.data_path:
        if not Path(path).is_dir():
            raise ValueError(f"--data-path: there is no folder {path}")
    if not (args.app / "pyproject.toml").is_file():
        raise ValueError(f"--app must be a checkout of fedpeft, got {args.app}")
    return args


def new_folder(wanted: Path | None) -> Path:
    """Return a new or empty folder, because an old database would bring its nodes into this run.

    Raises:
        ValueError: the folder holds something.
    """
    folder = wanted or Path(tempfile.mkdtemp(prefix="fedpeft-trial-"))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--folder must be a new or empty folder, got {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)  # private keys lie in it
    say(f"certificate, keys, database and logs: {folder.resolve()}")
    return folder.resolve()


class Trial:
    """One server and its nodes, with all that they keep in one folder.

    Attributes:
        processes: the server and the nodes.
        nodes: the nodes' programs by name.
        port: port at which sites reach the server.
        control: port at which operators reach it.
    """

    port: int
    control: int
    host = "127.0.0.1"  # address at which sites reach the server

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes = Processes(folder, folder)
        self.nodes: dict[str, Program] = {}

    def place(self, name: str) -> list[str | Path]:
        """Return the words to put before a program's command, if it runs in a place of its own."""
        return []

    def start(self, nodes: int, data_paths: list[str], overrides: list[str]) -> None:
        """Start the server and the nodes, and wait until all nodes are online.

        Args:
            nodes: number of nodes.
            data_paths: a folder for all nodes, or one for each, or none.
            overrides: the run's overrides; the nodes get the keys that a site sets by itself.
        """
        self.port, self.control = free_ports(2)
        certificate, key = write_certificate(self.folder, self.host)
        options: list[str | Path] = ["--folder", self.folder / "server", "--host", self.host]
        options += ["--port", str(self.port), "--control-port", str(self.control)]
        options += ["--certificate", certificate, "--key", key]
        self._start("server", "server", *options)
        self._wait("the server to answer", self.answers)
        of_sites = [o for o in overrides if o.lstrip("+").startswith(OF_SITES)]
        for number in range(nodes):
            name = f"node-{number}"
            private, public = write_node_keys(self.folder, name)
            self.flwr("supernode", "register", public, "local")
            options = ["--superlink", f"{self.host}:{self.port}", "--partition", str(number)]
            options += ["--certificate", certificate, "--key", private]
            options += ["--state-folder", self.folder / "state"]
            if data_paths:
                options += ["--data-path", data_paths[number % len(data_paths)]]
            self.nodes[name] = self._start(name, "node", *options, "--", *of_sites)
        self._wait("all nodes to be online", lambda: self.online() == nodes)
        say(f"the server at {self.host}:{self.port} and {nodes} nodes are up")

    def _start(self, name: str, *words: str | Path) -> Program:
        program = Program(name, [*self.place(name), BIN / "fedpeft", *words])
        self.processes.start(program)
        return program

    def _wait(self, what: str, done: Callable[[], bool]) -> None:
        self.processes.wait(what, done, START_SECONDS)

    def answers(self) -> bool:
        """Tell whether the server answers its operator."""
        try:
            self.online()
        except RuntimeError:
            return False
        return True

    def online(self) -> int:
        """Count the nodes that are online."""
        nodes = self.flwr("supernode", "list", "local")["nodes"]
        return sum(node["status"] == "online" for node in nodes)

    def flwr(self, *arguments: str | Path) -> dict[str, Any]:
        """Return the JSON answer of one ``flwr`` command.

        Raises:
            RuntimeError: the command failed.
        """
        done = subprocess.run(
            [*self.place("server"), BIN / "flwr", *arguments, "--format=json"],
            env=environment(self.folder / "server" / "cli"),
            capture_output=True,
            text=True,
            check=False,
        )
        try:
            answer = json.loads(done.stdout)
        except json.JSONDecodeError:
            answer = {"error-message": done.stdout + done.stderr}
        if done.returncode or not answer.get("success"):
            raise RuntimeError(f"flwr {arguments[0]} failed: {answer.get('error-message', answer)}")
        return answer

    def submit(self, app: Path, overrides: list[str]) -> str:
        """Submit a run of a checkout and return its number."""
        config = self.folder / "run.toml"
        config.write_text(toml({"overrides": shlex.join(overrides)}), encoding="utf-8")
        run = self.flwr("run", app.resolve(), "local", "--run-config", config)["run-id"]
        say(f"run {run} is submitted")
        return str(run)

    def run(self, app: Path, overrides: list[str]) -> None:
        """Submit a run and show its log until it ends.

        Raises:
            RuntimeError: the run did not complete.
        """
        run, shown = self.submit(app, overrides), 0
        while (ended := self.status(run))["status"].partition(":")[0] != "finished":
            shown = self._show_log(run, shown)
            time.sleep(POLL_SECONDS)
        if ended["status"] != "finished:completed":
            raise RuntimeError(
                f"run {run} did not complete: {ended['status']} {ended['status-details']}"
            )
        say(f"run {run} completed in {ended['elapsed']:.0f} s")

    def status(self, run: str) -> dict[str, Any]:
        """Return what Flower knows of a run."""
        return self.flwr("list", "local", "--run-id", run)["runs"][0]

    def _show_log(self, run: str, shown: int) -> int:
        """Print a run's log from a line on until the stream ends, which need not end the run.

        Returns:
            The number of lines that were printed in all.
        """
        with subprocess.Popen(
            [*self.place("server"), BIN / "flwr", "log", run, "local", "--stream"],
            env=environment(self.folder / "server" / "cli"),
            stdout=subprocess.PIPE,
            text=True,
        ) as stream:
            assert stream.stdout is not None
            for number, line in enumerate(stream.stdout):
                if number >= shown:
                    print(line, end="", flush=True)
                    shown = number + 1
        return shown
