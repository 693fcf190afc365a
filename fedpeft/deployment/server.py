"""``fedpeft server``: the SuperLink with its database, the gateway for sites, and the ServerApp."""

import argparse
import logging
import os
import secrets
import sys
from pathlib import Path

from fedpeft.deployment.keys import write_certificate
from fedpeft.deployment.node import toml
from fedpeft.deployment.processes import Processes, Program


def main(arguments: list[str]) -> None:
    """Run the server's programs until the process is ended.

    Raises:
        ValueError: an argument is wrong.
    """
    args = parse(arguments)
    os.umask(0o077)  # keys and states are this user's alone
    logging.basicConfig(level=logging.INFO, format="%(asctime)s fedpeft server: %(message)s")
    logging.info(
        "sites reach it at %s:%s; submit runs here, with FLWR_HOME=%s, to the SuperLink local",
        *(args.host, args.port, args.folder / "cli"),
    )
    processes = Processes(args.folder)
    try:
        processes.keep(programs(args))
    finally:
        processes.stop()


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the arguments, checked.

    Raises:
        ValueError: a file is not there.
    """
    parser = argparse.ArgumentParser(prog="fedpeft server", description=__doc__)
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="the database, secrets and Flower's files")
    add("--certificate", type=Path, required=True, help="certificate to show to sites, PEM")
    add("--key", type=Path, required=True, help="its private key, PEM")
    add("--host", default="0.0.0.0", help="address for sites (default: all of this machine)")
    add("--port", type=int, default=9092, help="port for sites (default: 9092)")
    add("--control-port", type=int, default=8000, help="port on 127.0.0.1 for operators")
    args = parser.parse_args(arguments)
    for name in ("certificate", "key"):
        if not (path := getattr(args, name)).is_file():
            raise ValueError(f"--{name}: there is no {path}")
    args.folder = args.folder.absolute()
    return args


def programs(args: argparse.Namespace) -> list[Program]:
    """Return the SuperLink, the program that starts ServerApps, and the gateway."""
    args.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chmod(args.folder, 0o700)  # keys lie in it
    # Operators and the gateway reach the SuperLink by a certificate for this machine alone.
    trust, key = write_certificate(args.folder)
    secret = args.folder / "secret"
    secret.write_text(secrets.token_hex(32))
    address = f"127.0.0.1:{args.control_port}"
    connection = toml({"address": address, "root-certificates": str(trust)})
    (args.folder / "cli").mkdir(exist_ok=True)
    (args.folder / "cli" / "config.toml").write_text(
        f'[superlink]\ndefault = "local"\n\n[superlink.local]\n{connection}'
    )
    superlink: list[str | Path] = ["flower-superlink", "--host", "127.0.0.1"]
    superlink += ["--port", str(args.control_port), "--isolation", "process"]
    superlink += ["--enable-supernode-auth", "--superexec-auth-secret-file", secret]
    superlink += ["--ssl-ca-certfile", trust, "--ssl-certfile", trust, "--ssl-keyfile", key]
    superlink += ["--database", args.folder / "state.db"]
    superexec: list[str | Path] = ["flower-superexec", "--runtime-api-address", address]
    superexec += ["--root-certificates", trust, "--superexec-auth-secret-file", secret]
    gateway: list[str | Path] = [sys.executable, "-m", "fedpeft.deployment.gateway"]
    gateway += ["--host", args.host, "--port", str(args.port), "--certificate", args.certificate]
    gateway += ["--key", args.key, "--superlink", f"https://{address}"]
    gateway += ["--superlink-certificate", trust]
    return [
        Program("superlink", superlink),
        Program("superexec", superexec),
        Program("gateway", gateway),
    ]
