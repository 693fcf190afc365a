"""Run one side of a benchmark in a process of its own: python -m benchmarks.sides NAME JSON.

A side runs some rounds and prints how long each took and when it ended. Its start and its first
round do not count. All sides train MiniLM with LoRA of rank 8 on SST-2.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.measure import process, proportional_mebibytes

WARMUPS = 1  # rounds before the rounds that count
MARK = "SIDE "  # begins the line of output that holds the rounds


@dataclass(frozen=True)
class Rounds:
    """Rounds that count.

    Attributes:
        seconds: seconds that each round took.
        ended: time at which each round ended, by ``time.time``.
    """

    seconds: list[float]
    ended: list[float]

    @classmethod
    def between(cls, begun: Sequence[float], ended: Sequence[float]) -> "Rounds":
        """Return rounds from the times at which all began and ended; drop the warm-ups."""
        pairs = list(zip(begun, ended, strict=True))[WARMUPS:]
        return cls([b - a for a, b in pairs], [b for _, b in pairs])


def timed(round: Callable[[int], None], rounds: int) -> Rounds:
    """Time rounds 1, 2, ... of a loop in this process."""
    begun, ended = [], []
    for number in range(1, WARMUPS + rounds + 1):
        begun.append(time.time())
        round(number)
        ended.append(time.time())
    return Rounds.between(begun, ended)


def fedpeft(data: str, rounds: int, overrides: list[str]) -> Rounds:
    """Run fedpeft as its command does; no evaluation falls into the rounds that count.

    Args:
        data: folder of SST-2.
        rounds: rounds that count.
        overrides: overrides besides ``job``'s.

    Raises:
        RuntimeError: a client was left out.
    """
    from fedpeft.reporting.progress import Display
    from fedpeft.simulation.launch import run as run_here

    class Noted(Display):
        """Notes each round's seconds and end instead of showing it."""

        seconds: list[float] = []
        ended: list[float] = []

        def start(self, title: str, num_rounds: int) -> None:
            self.num_rounds = num_rounds

        def round_done(self, line: Any) -> None:
            if refused := line.get("refused"):
                raise RuntimeError(f"clients were left out: {refused}")
            self.seconds.append(line["seconds"])
            self.ended.append(time.time())

    with tempfile.TemporaryDirectory() as folder:
        run = [*job(data), *overrides, "evaluation.every=1000000", f"run_dir='{folder}/run'"]
        run.append(f"num_rounds={WARMUPS + rounds + 1}")
        noted = Noted()
        run_here(run, noted)
    counted = slice(1 + WARMUPS, -1)  # round 0 does not train
    return Rounds(noted.seconds[counted], noted.ended[counted])


def job(data: str) -> list[str]:
    """Return the overrides of all sides; evaluations use few rows, because they do not count."""
    few = ["data.max_validation_rows=64", "data.max_test_rows=64"]
    return ["data=sst2", f"data.path='{data}'", "method=lora", "partition=iid", *few]


def bare(
    data: str, rounds: int, overrides: list[str], threads: int = 1, part: int = 0, parts: int = 1
) -> Rounds:
    """Run a plain PyTorch loop over the same model and batches as fedpeft's, in one process.

    Args:
        data: folder of SST-2.
        rounds: rounds that count.
        overrides: overrides besides ``job``'s; the runtime's are ignored.
        threads: torch's threads.
        part: takes the steps of clients part, part + parts, ....
        parts: number of processes that share the clients.
    """
    from benchmarks.round import bare_round
    from fedpeft.config.overrides import join
    from fedpeft.engine.engine import open_engine

    settings = ["runtime=inprocess", f"runtime.threads={threads}", f"num_rounds={rounds + 10}"]
    chosen = [o for o in overrides if not o.startswith("runtime")]
    engine = open_engine(join([*job(data), *settings, *chosen]), None)
    clients = range(part, engine.config.num_clients, parts)
    return timed(lambda r: bare_round(engine, clients, r), rounds)


def bares(**settings: Any) -> Rounds:
    """Run two processes of ``bare`` that share the clients; return the slower one's rounds."""
    return halved("bare", settings | {"parts": 2})


def example(data: str, rounds: int, clients: int, steps: int = 1, batch_size: int = 16) -> Rounds:
    """Run the Flower app of ``example_run.py`` on two one-core Ray workers.

    Args:
        data: folder of SST-2.
        rounds: rounds that count.
        clients: number of clients; all of them take part in each round.
        steps: steps of each client in a round.
        batch_size: rows in a step.
    """
    from benchmarks.example_run import simulate

    config = {"data": data, "steps": steps, "batch-size": batch_size}
    return Rounds.between(*simulate(clients, WARMUPS + rounds, config, workers=2))


def script(
    data: str, rounds: int, clients: int, steps: int = 1, batch_size: int = 16, part: int = 0
) -> Rounds:
    """Run a script without federation or fedpeft, on rows that it tokenised once.

    Args:
        data: folder of SST-2.
        rounds: rounds that count.
        clients: number of clients.
        steps: steps of each client in a round.
        batch_size: rows in a step.
        part: 0 or 1, the half of the clients whose steps it takes.
    """
    import pyarrow.parquet
    import torch
    from transformers import AutoTokenizer, DataCollatorWithPadding

    from benchmarks.example_run import get_model, model_folder
    from benchmarks.example_run import steps as train

    torch.set_num_threads(1)
    tokenizer, model = AutoTokenizer.from_pretrained(model_folder()), get_model()
    table = pyarrow.parquet.read_table(f"{data}/train.parquet", columns=["sentence", "label"])
    encoded = tokenizer(table["sentence"].to_pylist(), truncation=True)
    rows = [
        {"input_ids": ids, "labels": label}
        for ids, label in zip(encoded["input_ids"], table["label"].to_pylist(), strict=True)
    ]
    del encoded, table
    collator = DataCollatorWithPadding(tokenizer)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    def round(number: int) -> None:
        for client in range(part, clients, 2):
            model.load_state_dict(start, strict=False)
            client_rows = rows[client::clients]
            loader = torch.utils.data.DataLoader(
                client_rows,  # type: ignore[arg-type]
                batch_size=batch_size,
                shuffle=True,
                collate_fn=collator,
            )
            train(model, loader, steps)

    return timed(round, rounds)


def scripts(**settings: Any) -> Rounds:
    """Run two processes of ``script`` that share the clients; return the slower one's rounds."""
    return halved("script", settings)


def halved(name: str, settings: Mapping[str, Any]) -> Rounds:
    """Run a side in two processes at once, each with a part; return the slower one's rounds."""
    running = []
    for part in range(2):
        command = [sys.executable, "-m", "benchmarks.sides", name]
        arguments = json.dumps({**settings, "part": part})
        running.append(subprocess.Popen([*command, arguments], stdout=subprocess.PIPE, text=True))
    results = [Rounds(**parsed(process.communicate()[0])) for process in running]
    return max(results, key=lambda rounds: sum(rounds.seconds))


def final_accuracy(data: str, overrides: list[str]) -> float:
    """Run fedpeft, and return the accuracy of its last model on all validation rows."""
    with tempfile.TemporaryDirectory() as folder:
        run = [*job(data), *overrides, "evaluation.every=1000000", f"run_dir='{folder}/run'"]
        run.append("data.max_validation_rows=null")
        command = [sys.executable, "-c", "from fedpeft.cli import main; main()", "run", "--json"]
        output = subprocess.run([*command, *run], capture_output=True, text=True, check=True).stdout
    return round(json.loads(output.splitlines()[-1])["final"]["validation_accuracy"], 4)


def pfl(**settings: Any) -> Rounds:
    """Run pfl-research in this process; torchrun may start several."""
    from benchmarks.pfl_run import simulate

    return simulate(**settings)


def run(
    name: str,
    settings: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
    every: float | None = None,
    launcher: Sequence[str] = ("-m",),
    size: Callable[[int], float] = proportional_mebibytes,
) -> tuple[Rounds, list[tuple[float, float]]]:
    """Run a side in a process of its own, and sample its memory.

    Args:
        name: the side's name.
        settings: the side's arguments.
        environment: see ``measure.process``.
        every: see ``measure.process``.
        launcher: stands before the module's name on the command line.
        size: see ``measure.process``.

    Returns:
        The rounds that count, and pairs of ``time.time`` and MiB.
    """
    arguments = [*launcher, "benchmarks.sides", name, json.dumps(settings)]
    output, samples = process(arguments, environment, every, size)
    return Rounds(**parsed(output)), samples


def memory(samples: Sequence[tuple[float, float]], rounds: Rounds) -> dict[str, float]:
    """Return the peak in MiB, and the median while the rounds that count run."""
    first, last = rounds.ended[0] - rounds.seconds[0], rounds.ended[-1]
    steady = [mebibytes for at, mebibytes in samples if first <= at <= last]
    return {"peak": max(m for _, m in samples), "steady": statistics.median(steady)}


def seconds(name: str, settings: Mapping[str, Any], **how: Any) -> float:
    """Return the median seconds of a side's rounds.

    Args:
        name: the side's name.
        settings: the side's arguments.
        how: further arguments of ``run``.
    """
    return statistics.median(run(name, settings, **how)[0].seconds)


def parsed(output: str) -> dict[str, Any]:
    """Return the result that a side printed, among all that libraries print."""
    lines = [line for line in output.splitlines() if line.startswith(MARK)]
    return json.loads(lines[-1].removeprefix(MARK))


def main() -> None:
    """Run one side."""
    sides: dict[str, Callable[..., Rounds]] = {
        side.__name__: side for side in (fedpeft, bare, bares, example, script, scripts, pfl)
    }
    rounds = sides[sys.argv[1]](**json.loads(sys.argv[2]))
    if os.environ.get("RANK", "0") == "0":  # only the first of torchrun's processes
        print(MARK + json.dumps(asdict(rounds)), flush=True)


if __name__ == "__main__":
    main()
