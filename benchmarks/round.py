"""A round against a bare PyTorch loop: the same steps, and the same job as a user would run it.

    python -m benchmarks.round ../shared/data/sst2 [--repeats 5] [--clients 10] [--steps 20]

Ten clients take twenty steps of sixteen rows (SST-2, MiniLM, LoRA of rank 8 on query and value).

- in_process: fedpeft in one process with two threads against a bare loop in the same process over
  the same batches, with the same number of threads.
- ray: two one-thread Ray workers against two bare processes that stay alive and halve the clients.
- user: batches of rows of like length in bfloat16, on two Ray workers and in process with two
  threads, against the bare loop in float32 that pads each batch of rows in any order, with two
  threads and as two processes. ``quality`` is the accuracy on validation rows after --rounds
  rounds, for three seeds, of that job and of the same rounds in float32 without buckets.
"""

import argparse
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord
from torch import nn

from benchmarks.measure import REPEATS, interleaved, medians, ratio, save, spread
from benchmarks.sides import final_accuracy, job, seconds
from fedpeft.config import load as configuration
from fedpeft.data.batching import Batch, training_batches
from fedpeft.engine.engine import Engine, open_engine
from fedpeft.seeding import generator, torch_seed
from fedpeft.server.strategy import FederatedPEFT
from fedpeft.simulation.grid import InProcessGrid

SEEDS = (0, 1, 2)
PLAIN = ["bucketing=false", "precision=fp32"]
FAST = ["bucketing=true", "precision=bf16"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, help="folder of SST-2")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5, help="of the runs whose quality counts")
    args = parser.parse_args()
    data = str(args.data.resolve())
    size = [f"num_clients={args.clients}", f"local_steps={args.steps}", "batch_size=16"]
    result = {
        "clients": args.clients,
        "steps": args.steps,
        "in_process": in_process([*job(data), *size], args.repeats),
        "ray": by_workers(data, size, args.repeats),
        "user": as_a_user(data, size, args.repeats),
        "quality": quality(data, size, args.rounds),
    }
    save("round", result)


def in_process(given: list[str], repeats: int) -> dict[str, Any]:
    """Both in this process, in turn; the first round of each warms up and is left out."""
    more = [
        "runtime=inprocess",
        "runtime.threads=2",
        "runtime.clients_per_pass=1",
        "num_rounds=1000",
    ]
    overrides = configuration.join([*given, *more])
    session = open_engine(overrides, None)
    clients = session.config.num_clients
    grid, strategy = InProcessGrid(clients), FederatedPEFT(overrides, session)
    strategy.nodes.join(grid)
    loads, rounds = open_engine.cache_info().misses, iter(range(1, 1000))
    numbers: dict[str, int] = {}

    def ours() -> None:
        numbers["round"] = next(rounds)
        fedpeft_round(strategy, grid, numbers["round"])

    sides = {
        "fedpeft": ours,
        "bare": lambda: bare_round(session, range(clients), numbers["round"]),
    }
    taken = interleaved(sides, repeats)
    again = open_engine.cache_info().misses - loads
    return summary(taken, [("fedpeft", "bare")]) | {"model_loads_after_the_first": again}


def by_workers(data: str, size: list[str], repeats: int) -> dict[str, Any]:
    """Two workers of one thread each, on Ray and bare."""
    ray = [*size, "runtime=ray", "runtime.total_cpus=2", "runtime.clients_per_pass=1"]
    sides = {
        "fedpeft": partial(seconds, "fedpeft", {"data": data, "rounds": 2, "overrides": ray}),
        "bare": partial(seconds, "bares", {"data": data, "rounds": 2, "overrides": size}),
    }
    return summary(interleaved(sides, repeats, warmups=0), [("fedpeft", "bare")])


def as_a_user(data: str, size: list[str], repeats: int) -> dict[str, Any]:
    """What a user gains: bare over fedpeft, so that above 1 fedpeft is faster."""
    ray = [*size, *FAST, "runtime=ray", "runtime.total_cpus=2"]
    here = [*size, *FAST, "runtime=inprocess", "runtime.threads=2"]
    given: dict[str, Any] = {"data": data, "rounds": 2}
    plain = given | {"overrides": [*size, *PLAIN]}
    sides = {
        "fedpeft_ray": partial(seconds, "fedpeft", given | {"overrides": ray}),
        "fedpeft_in_process": partial(seconds, "fedpeft", given | {"overrides": here}),
        "bare_two_threads": partial(seconds, "bare", plain | {"threads": 2}),
        "bare_two_processes": partial(seconds, "bares", plain),
    }
    pairs = [(a, b) for a in list(sides)[2:] for b in list(sides)[:2]]
    return summary(interleaved(sides, repeats, warmups=0), pairs)


def summary(taken: dict[str, list[float]], pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Seconds a round, their spread, and ratios."""
    return {
        "seconds_a_round": medians(taken),
        "range": {name: spread(values) for name, values in taken.items()},
        "ratios": {f"{a} / {b}": ratio(taken[a], taken[b]) for a, b in pairs},
    }


def quality(data: str, size: list[str], rounds: int) -> dict[str, Any]:
    """Accuracy on validation rows after some rounds, by seed."""
    found: dict[str, Any] = {"rounds": rounds}
    for name, how in (("plain", PLAIN), ("fast", FAST)):
        found[name] = [
            final_accuracy(data, [*size, *how, f"seed={seed}", f"num_rounds={rounds}"])
            for seed in SEEDS
        ]
    return found


def fedpeft_round(strategy: FederatedPEFT, grid: InProcessGrid, round: int) -> None:
    """Configure, train on the clients, check and aggregate."""
    messages = strategy.configure_train(round, strategy.arrays(), ConfigRecord(), grid)
    strategy.aggregate_train(round, grid.send_and_receive(messages, timeout=3600))


def bare_round(session: Engine, clients: Iterable[int], round: int) -> None:
    """The same steps as one would write them without federation, and a mean of the results."""
    clients = list(clients)
    parameters = {n: p for n, p in session.replica.model.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in parameters.items()}
    total = {n: torch.zeros_like(p) for n, p in start.items()}
    for client in clients:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(start[name])
        with torch_seed(session.config.seed, "dropout", round, client):
            bare_client(
                session.replica.model, list(parameters.values()), batches(session, client, round)
            )
        for name, parameter in parameters.items():
            total[name] += parameter.detach() / len(clients)


def batches(session: Engine, client: int, round: int) -> list[Batch]:
    """The batches that the client sees in fedpeft's round."""
    examples, config = session.rows.client_examples(client)["train"], session.config
    rng = generator(config.seed, "batches", round, client)
    rows = training_batches(
        examples.lengths, config.batch_size, config.local_steps, None, rng, config.bucketing
    )
    return [examples.batch(r) for r in rows]


def bare_client(model: nn.Module, parameters: list[nn.Parameter], given: list[Batch]) -> None:
    """AdamW with clipping, as in any script."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    model.train()
    for batch in given:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = nn.functional.cross_entropy(logits, batch["labels"])
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
