"""``fedpeft node``: a site's SuperNode, and beside it the worker that answers its messages."""

import argparse
import json
import logging
import os
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Any

from fedpeft.config.compose import composed
from fedpeft.config.overrides import quoted
from fedpeft.deployment.policy import Policy
from fedpeft.deployment.processes import Processes, Program, free_ports


def main(arguments: list[str]) -> None:
    """Run a site's programs until the process is ended.

    Raises:
        ValueError: an argument, the policy or the site's configuration is wrong.
    """
    args = parse(arguments)
    policy = read_policy(args)
    os.umask(0o077)  # kept states and encoded rows are this user's alone
    logging.basicConfig(level=logging.INFO, format="%(asctime)s fedpeft node: %(message)s")
    with tempfile.TemporaryDirectory(prefix="fedpeft-node-") as folder:  # its owner alone reads it
        processes = Processes(Path(folder))
        try:
            processes.keep(programs(args, policy, Path(folder)))
        finally:
            processes.stop()


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the arguments, checked.

    Raises:
        ValueError: a file or folder is not there, or a number is out of range.
    """
    parser = argparse.ArgumentParser(prog="fedpeft node", description=__doc__)
    add = parser.add_argument
    add("--superlink", required=True, metavar="HOST:PORT", help="the server's address for sites")
    add("--certificate", type=Path, help="certificate that the server must show, PEM")
    add("--key", type=Path, help="this node's private key, whose public half the server knows")
    add("--insecure", action="store_true", help="no TLS and no key, for a server that has none")
    add("--partition", type=int, required=True, metavar="N", help="the client that this node is")
    add("--data-path", type=Path, help="a folder whose rows all belong to this client")
    add("--state-folder", type=Path, help="folder for what the client keeps from round to round")
    add("--policy", type=Path, help="YAML of what a server may set here, see docs/deployment.md")
    add("overrides", nargs="*", help="the site's own configuration, such as model=minilm data=sst2")
    args = parser.parse_args(arguments)
    if args.partition < 0:
        raise ValueError(f"--partition must be >= 0, got {args.partition}")
    if args.insecure == bool(args.certificate or args.key) or bool(args.certificate) != bool(
        args.key
    ):
        raise ValueError("give --certificate and --key, or --insecure alone")
    for name in ("certificate", "key", "data_path", "policy"):
        path = getattr(args, name)
        if path is not None and not (path.is_dir() if name == "data_path" else path.is_file()):
            raise ValueError(f"--{name.replace('_', '-')}: there is no {path}")
    return args


def read_policy(args: argparse.Namespace) -> Policy:
    """Return the site's policy with its configuration, which must be one.

    The site's own folder is a part of it, so that the server's is ignored and not refused.

    Args:
        args: the command's parsed arguments.

    Raises:
        ValueError: the policy or the configuration is wrong.
    """
    policy = Policy() if args.policy is None else Policy.read(args.policy)
    own = [*policy.configuration, *args.overrides]
    if args.data_path is not None:
        own.append(f"data.path={quoted(args.data_path.resolve())}")
    policy = Policy(own, policy.allow, policy.limits)
    composed(policy.configuration)
    return policy


def programs(args: argparse.Namespace, policy: Policy, folder: Path) -> list[Program]:
    """Return the SuperNode and the worker.

    Args:
        args: the command's parsed arguments.
        policy: the site's policy, which the worker reads from a file in ``folder``.
        folder: takes the files that the two read.
    """
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    secret = _written(folder / "secret", secrets.token_hex(32))
    config = _written(folder / "node.toml", toml(node_config(args)))
    policy.save(folder / "policy.yaml")
    options: list[str | Path] = ["--superlink", args.superlink, "--host", "127.0.0.1"]
    options += ["--port", str(port), "--node-config", config, "--isolation", "process"]
    options += ["--superexec-auth-secret-file", secret]
    if args.insecure:
        options += ["--insecure"]
    else:
        options += ["--root-certificates", args.certificate]
        options += ["--auth-supernode-private-key", args.key]
    worker = [sys.executable, "-m", "fedpeft.deployment.worker"]
    return [
        Program("supernode", ["flower-supernode", *options]),
        Program("worker", [*worker, address, secret, folder / "policy.yaml"]),
    ]


def node_config(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the client app reads of its node."""
    config: dict[str, Any] = {"partition-id": args.partition}
    for name in ("data_path", "state_folder"):
        if (path := getattr(args, name)) is not None:
            config[name.replace("_", "-")] = str(path.resolve())
    return config


def toml(values: dict[str, Any]) -> str:
    """Write one key a line, by JSON, because TOML has the same integers and strings."""
    return "".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in values.items())


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
