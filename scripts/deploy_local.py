"""Runs one experiment on real Flower processes, with TLS, on this machine.

One SuperLink and N SuperNodes start, each node with a partition, a key, an unpacked bundle and a
log of its own. The run is submitted, its log shown, its end checked, and every process stopped.
Arguments after ``--`` are fedpeft overrides; ``num_clients`` is set to the number of nodes:

    python scripts/deploy_local.py --num-nodes 3 -- method=fedsa_lora num_rounds=2
"""

import argparse
import json
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from deploy_keys import write_certificate, write_node_keys
from deploy_processes import BIN, Processes, environment, free_ports, listens


def main() -> None:
    args = parse_args()
    deployment = Deployment(new_folder(args.work_dir))
    # SIGTERM becomes an exception, so that ``finally`` runs.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))
    try:
        deployment.start(args.num_nodes, args.data_path)
        deployment.run(args.app, [f"num_clients={args.num_nodes}", *args.overrides])
    except KeyboardInterrupt:
        sys.exit("stopped by Ctrl-C")
    finally:
        deployment.processes.stop()
    if not args.keep and args.work_dir is None:
        shutil.rmtree(deployment.folder)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # stdout is for the run's log


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Runs an experiment on real Flower processes.")
    add = parser.add_argument
    add("--num-nodes", type=int, default=3, help="SuperNodes, one partition each (default: 3)")
    add("--data-path", action="append", default=[], help="a folder for all nodes, or one for each")
    add("--work-dir", type=Path, help="a new or empty folder for all state (default: temporary)")
    add("--keep", action="store_true", help="keep the temporary folder of a completed run too")
    add("--app", type=Path, default=Path(__file__).parents[1], help="the app's project folder")
    add("overrides", nargs="*", help="fedpeft overrides, after --")
    args = parser.parse_args()
    if args.num_nodes < 1:
        parser.error(f"--num-nodes must be >= 1, got {args.num_nodes}")
    if (count := len(args.data_path)) not in (0, 1, args.num_nodes):
        parser.error(f"--data-path must come 0, 1 or {args.num_nodes} times, got {count}")
    if wrong := [path for path in args.data_path if not Path(path).is_dir()]:
        parser.error(f"--data-path must be a folder, got {wrong[0]}")
    return args


def new_folder(work_dir: Path | None) -> Path:
    """Return a new or empty folder, because an old database would bring its nodes into this run."""
    folder = work_dir or Path(tempfile.mkdtemp(prefix="fedpeft-deploy-"))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        sys.exit(f"--work-dir must be a new or empty folder, got {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)  # private keys lie in it
    say(f"certificate, keys, database and logs: {folder.resolve()}")
    return folder.resolve()


class Deployment:
    """One SuperLink and its SuperNodes, with all their state in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes = Processes(folder)

    def start(self, num_nodes: int, data_paths: list[str]) -> None:
        """Start the SuperLink and the nodes, and wait until all nodes are online."""
        port, *node_ports = free_ports(1 + num_nodes)
        trust = self.start_superlink(port)
        for node, node_port in enumerate(node_ports):
            config: dict[str, Any] = {"partition-id": node, "num-partitions": num_nodes}
            config["state-folder"] = str(self.folder / "state")
            if data_paths:
                config["data-path"] = str(Path(data_paths[node % len(data_paths)]).resolve())
            command = f"flower-supernode --superlink 127.0.0.1:{port} --port {node_port}"
            self.start_node(f"node-{node}", command, trust, config)
        self.processes.wait("all SuperNodes to be online", lambda: self.online() == num_nodes)
        say(f"1 SuperLink at 127.0.0.1:{port} and {num_nodes} SuperNodes are up")

    def start_superlink(self, port: int) -> Path:
        """Start the SuperLink, and return the certificate that its clients must trust."""
        trust, key = write_certificate(self.folder)
        address = f"127.0.0.1:{port}"
        connection = toml({"address": address, "root-certificates": str(trust)})
        (self.folder / "cli").mkdir()
        self.write("cli/config.toml", "[superlink.local]\n" + connection)
        command = f"flower-superlink --port {port} --isolation process --enable-supernode-auth"
        files = ["--ssl-ca-certfile", trust, "--ssl-certfile", trust, "--ssl-keyfile", key]
        self.processes.launch("superlink", command, *files, "--database", self.folder / "state.db")
        self.processes.wait("the SuperLink to listen", lambda: listens(port))
        # The SuperLink could start this process too, but might then leave a busy ServerApp behind.
        command = f"flower-superexec --runtime-api-address {address}"
        self.processes.launch("serverapp", command, "--root-certificates", trust)
        return trust

    def start_node(self, name: str, command: str, trust: Path, config: dict[str, Any]) -> None:
        """Register and start a SuperNode.

        Args:
            name: of the process and its files.
            command: the SuperNode's, without files.
            trust: certificate of the SuperLink.
            config: the node's configuration.
        """
        key, public = write_node_keys(self.folder, name)
        self.flwr("supernode", "register", public, "local")
        # In a file, because a value on the command line cannot hold every character.
        files = ["--node-config", self.write(f"{name}.toml", toml(config))]
        files += ["--root-certificates", trust, "--auth-supernode-private-key", key]
        self.processes.launch(name, command, *files)

    def write(self, name: str, text: str) -> Path:
        """Write a file in the folder, and return its path."""
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return path

    def online(self) -> int:
        """Count the nodes that are online."""
        nodes = self.flwr("supernode", "list", "local")["nodes"]
        return sum(node["status"] == "online" for node in nodes)

    def flwr(self, *arguments: str | Path) -> dict[str, Any]:
        """Return the JSON answer of one ``flwr`` command; exit if it failed."""
        command, env = [BIN / "flwr", *arguments, "--format=json"], environment(self.folder / "cli")
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        try:
            answer = json.loads(done.stdout)
        except json.JSONDecodeError:
            answer = {"error-message": done.stdout + done.stderr}
        if done.returncode or not answer.get("success"):
            sys.exit(f"flwr {arguments[0]} failed: {answer.get('error-message', answer)}")
        return answer

    def run(self, app: Path, overrides: list[str]) -> None:
        """Submit the app, show its log to the end, and exit if the run did not complete."""
        config = self.write("run.toml", toml({"overrides": shlex.join(overrides)}))
        run_id = self.flwr("run", app.resolve(), "local", "--run-config", config)["run-id"]
        say(f"run {run_id} is submitted")
        show = [BIN / "flwr", "log", run_id, "local", "--stream"]
        subprocess.run(show, env=environment(self.folder / "cli"), check=False)
        # ``flwr log`` exits with 0 even if the run failed.
        ended = self.flwr("list", "local", "--run-id", run_id)["runs"][0]
        if ended["status"] != "finished:completed":
            sys.exit(f"run {run_id} did not complete: {ended['status']} {ended['status-details']}")
        say(f"run {run_id} completed in {ended['elapsed']:.0f} s")


def toml(values: dict[str, Any]) -> str:
    """Write one key a line, by JSON, because TOML has the same integers and strings."""
    return "".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in values.items())


if __name__ == "__main__":
    main()
