"""Run long with nodes that fail, see that nothing is lost, and record the memory.

    python -m benchmarks.soak [--rounds 200] [--kills 20]

Twenty clients keep personal parameters, and the server a memory. In each round six of them fail, or
are gone and return under another id, or (every fifth round) never answer. The round's number says
who and how. Then the same run is killed by SIGKILL at random moments, and goes on each time.
``rss`` is the server's resident memory in MiB a tenth of the way and at the end, unbroken. The
program fails if the killed run differs in a bit of its result or in a round's members.
"""

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from flwr.app import Context, Message
from rich.console import Console

from benchmarks.measure import QUIET, save
from fedpeft.client.client import answer_all
from fedpeft.reporting.progress import Display
from fedpeft.reporting.run_files import read_metrics
from fedpeft.server.app import serve
from fedpeft.simulation.grid import InProcessGrid

CLIENTS, DISTURBED = 20, 6
KINDS = ("fails", "gone", "late")
MEMBERS = ("cohort", "refused", "weights")  # keys of a line
ANOTHER = 1000  # added to the id of a node that returns
OVERRIDES = [
    *("method=fedsa_lora", "method.rank=4", "strategy=fedadam", f"num_clients={CLIENTS}"),
    *("model=minilm", "model.random=true", "model.architecture.num_hidden_layers=2"),
    *("data=docstrings", "data.rows_per_label=100", "data.max_length=16", "partition=iid"),
    *("local_steps=1", "batch_size=4", "evaluation.every=1000000", "evaluation.max_client_rows=2"),
    *("runtime=inprocess", "runtime.clients_per_pass=1", "runtime.round_timeout=6"),
    "runtime.join_timeout=2",
]


def disturbed(round: int) -> dict[int, str]:
    """Return the clients that do not take part in a round as they should, and how."""
    draws = np.random.default_rng([7, round])
    clients = draws.permutation(CLIENTS)[:DISTURBED]
    kinds = KINDS if round % 5 == 0 else KINDS[:2]
    return {int(client): str(draws.choice(kinds)) for client in clients}


class Unreliable(InProcessGrid):
    """Nodes that fail, go and return.

    Args:
        lines: the run's metrics.jsonl, whose length is the round that comes.
    """

    def __init__(self, lines: Path) -> None:
        super().__init__(CLIENTS, self._answered)
        self.lines, self.state_folder = lines, lines.parent / "clients"

    def kinds(self, ago: int = 0) -> dict[int, str]:
        """Return who is disturbed in this round, or so many rounds ago; nobody in round 0."""
        round = len(self.lines.read_bytes().splitlines()) if self.lines.exists() else 0
        return disturbed(round - ago) if round > ago else {}

    def get_node_ids(self) -> list[int]:
        """Return the nodes that are here; a node that was gone a round before has a new id."""
        now, before = self.kinds(), self.kinds(ago=1)
        return [
            client + 1 + (ANOTHER if before.get(client) == "gone" else 0)
            for client in range(CLIENTS)
            if now.get(client) != "gone"
        ]

    def node_config(self, node: int) -> dict[str, Any]:
        """Return the configuration of a node, whatever its id is now."""
        return super().node_config(_client(node) + 1)

    def push_messages(self, messages: Any) -> list[str]:
        """Queue messages, except for nodes that never answer in this round."""
        ids, kinds = super().push_messages(messages), self.kinds()
        heard = [p for p in self._queue if kinds.get(_receiver(p[0])) != "late"]
        self._queue.clear()
        self._queue.extend(heard)
        return ids

    def _answered(
        self, messages: Sequence[Message], contexts: Sequence[Context]
    ) -> Sequence[Message | Exception]:
        if self.kinds().get(_receiver(messages[0])) == "fails":
            raise RuntimeError("no power")
        return answer_all(messages, contexts)


def _client(node: int) -> int:
    return (node - 1) % ANOTHER


def _receiver(message: Message) -> int:
    return _client(message.metadata.dst_node_id)


def drive(folder: Path, rounds: int) -> None:
    """Begin the run, or go on with it."""
    display = Display(Console(file=io.StringIO()))
    given = [f"num_rounds={rounds}", f"run_dir={folder}", "resume=true"]
    serve(Unreliable(folder / "metrics.jsonl"), [*OVERRIDES, *given], display)


def soak(folder: Path, rounds: int, kills: int) -> dict[str, Any]:
    """Run once unbroken and once with kills, and compare.

    Args:
        folder: takes both runs' directories.
        rounds: number of rounds of each run.
        kills: number of kills, each after another round.
    """
    whole, rss = begun(folder / "whole", rounds), dict[str, int]()
    while whole.poll() is None:
        if number_of_lines(folder / "whole") in (rounds // 10, rounds):
            memory = psutil.Process(whole.pid).memory_info().rss >> 20
            rss.setdefault(str(number_of_lines(folder / "whole")), memory)
        time.sleep(0.05)
    draws, at = random.Random(3), []
    for target in sorted(draws.sample(range(1, rounds), kills)):
        process = begun(folder / "killed", rounds)
        while process.poll() is None and number_of_lines(folder / "killed") <= target:
            time.sleep(0.01)
        time.sleep(0.3 * draws.random())
        process.kill()
        process.wait()
        at.append(number_of_lines(folder / "killed") - 1)
    assert begun(folder / "killed", rounds).wait() == 0
    compare(folder / "whole", folder / "killed")
    lines = read_metrics(folder / "whole")
    return {
        "rounds": rounds,
        "clients": CLIENTS,
        "killed_after_rounds": at,
        "rss": rss,
        "clients_left_out": sum(len(line.get("refused", {})) for line in lines),
        "overrides": " ".join(OVERRIDES),
        "sha256": read_summary(folder / "whole")["shared_state_sha256"],
    }


def begun(folder: Path, rounds: int) -> "subprocess.Popen[bytes]":
    """Start a process that runs, or goes on."""
    command = [sys.executable, "-m", "benchmarks.soak", "--rounds", str(rounds), "--drive", folder]
    return subprocess.Popen(command, env=os.environ | QUIET)


def number_of_lines(folder: Path) -> int:
    """Return how many rounds are over."""
    path = folder / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def compare(whole: Path, killed: Path) -> None:
    """Compare two runs' results, and the members of each round.

    Raises:
        SystemExit: the runs differ.
    """
    for key in ("shared_state_sha256", "final", "best", "refused"):
        if (one := read_summary(whole)[key]) != (other := read_summary(killed)[key]):
            sys.exit(f"{key} differs: {one} and {other}")
    for one, other in zip(read_metrics(whole), read_metrics(killed), strict=True):
        for key in MEMBERS:
            if one.get(key) != other.get(key):
                sys.exit(f"round {one['round']}: {key} differs")
        expected = set(disturbed(one["round"])) if one["round"] else set()
        if (out := {int(client) for client in one.get("refused", {})}) != expected:
            sys.exit(f"round {one['round']}: {expected} were disturbed, but {out} left out")


def read_summary(folder: Path) -> dict[str, Any]:
    """Read a run's summary."""
    return json.loads((folder / "summary.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.drive:
        drive(args.drive, args.rounds)
        return
    with tempfile.TemporaryDirectory() as name:
        save("soak", soak(Path(name), args.rounds, args.kills))


if __name__ == "__main__":
    main()
