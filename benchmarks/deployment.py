"""Measure a round on real processes against the same round in one process.

    python -m benchmarks.deployment [--rounds 6]

MiniLM with LoRA, three clients of four steps, and each client evaluates in each round: six
messages. A server and three nodes run on this machine over TLS, by an operator's commands.
``seconds`` are the seconds in the rounds' lines, without the first rounds, in which models load.
``polling`` is what Flower's polling takes on average. A SuperNode without a message asks every 3 s,
so the last of three sees a message after 2.25 s; it sends a reply within 0.5 s; twice a round.
"""

import argparse
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import save, spread
from fedpeft.deployment.processes import BIN
from fedpeft.reporting.run_files import read_metrics

NODES = 3
ASK_SECONDS, REPLY_SECONDS = 3.0, 0.5  # sleep in flwr.supernode.start_client_internal
OVERRIDES = (
    *("method=lora", "model=minilm", "data=docstrings", "local_steps=4"),
    *("evaluation.clients=always", "evaluation.max_client_rows=16", "data.max_validation_rows=16"),
    *("runtime.clients_per_pass=1", "runtime.min_replies=1.0"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for side, words in (
            ("in process", ["run", f"num_clients={NODES}", "runtime=inprocess"]),
            ("nodes", ["deploy", "trial"]),
        ):
            run_dir = Path(name) / side.replace(" ", "_")
            more = [f"num_rounds={args.rounds}", f"run_dir={run_dir}"]
            subprocess.run([BIN / "fedpeft", *words, *OVERRIDES, *more], check=True)
            seconds[side] = [line["seconds"] for line in read_metrics(run_dir)[2:]]
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    result: dict[str, Any] = {
        "rounds": args.rounds,
        "overrides": " ".join(OVERRIDES),
        "seconds": medians,
        "ranges": {side: spread(values) for side, values in seconds.items()},
        "more": round(medians["nodes"] - medians["in process"], 3),
        "polling": 2 * (ASK_SECONDS * NODES / (NODES + 1) + REPLY_SECONDS / 2),
    }
    save("deployment", result)


if __name__ == "__main__":
    main()
