"""Time a round against a bare PyTorch loop: with equal steps, and as a user would run both.

    python -m benchmarks.round FOLDER_OF_SST2 [--repeats 5] [--clients 10] [--steps 20]

Ten clients take twenty steps of sixteen rows (SST-2, MiniLM, LoRA of rank 8 on query and value).

- in_process: fedpeft in one process with two threads, against a bare loop in the same process over
  the same batches with as many threads.
- ray: two one-thread Ray workers, against two bare processes that stay alive and share the clients.
- user: fedpeft with batches of rows of like length in bfloat16, on two Ray workers and in process
  with two threads, against the bare loop in float32 over rows in any order, with two threads and
  as two processes.
- quality: fedpeft's accuracy on validation rows after --rounds rounds, for three seeds, with like
  lengths and bfloat16 (``fast``) and without (``plain``).
"""

import argparse
from collections.abc import Iterable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord
from torch import nn

from benchmarks.measure import REPEATS, interleaved, medians, ratio, save, spread
from benchmarks.sides import final_accuracy, job, seconds
from fedpeft.config.overrides import join
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
    parser.add_argument("--rounds", type=int, default=5, help="rounds until the accuracy is taken")
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


def in_process(job_overrides: list[str], repeats: int) -> dict[str, Any]:
    """Time both in this process, in turns; the first round of each warms up and does not count."""
    runtime = ["runtime=inprocess", "runtime.threads=2", "runtime.clients_per_pass=1"]
    overrides = join([*job_overrides, *runtime, "num_rounds=1000"])
    engine = open_engine(overrides, None)
    clients = engine.config.num_clients
    grid, strategy = InProcessGrid(clients), FederatedPEFT(overrides, engine)
    strategy.nodes.join(grid)
    loads, fedpeft_rounds, bare_rounds = open_engine.cache_info().misses, count(1), count(1)
    sides = {
        "fedpeft": lambda: fedpeft_round(strategy, grid, next(fedpeft_rounds)),
        "bare": lambda: bare_round(engine, range(clients), next(bare_rounds)),
    }
    timings = interleaved(sides, repeats)
    loads_after = open_engine.cache_info().misses - loads
    return summary(timings, [("fedpeft", "bare")]) | {"model_loads_after_the_first": loads_after}


def by_workers(data: str, size: list[str], repeats: int) -> dict[str, Any]:
    """Time two workers of one thread each, on Ray and bare.

    Args:
        data: folder of SST-2.
        size: overrides that say how many clients, steps and rows.
        repeats: processes of each side.
    """
    ray = [*size, "runtime=ray", "runtime.total_cpus=2", "runtime.clients_per_pass=1"]
    sides = {
        "fedpeft": partial(seconds, "fedpeft", {"data": data, "rounds": 2, "overrides": ray}),
        "bare": partial(seconds, "bares", {"data": data, "rounds": 2, "overrides": size}),
    }
    return summary(interleaved(sides, repeats, warmups=0), [("fedpeft", "bare")])


def as_a_user(data: str, size: list[str], repeats: int) -> dict[str, Any]:
    """Time fedpeft with its faster settings against bare float32; above 1, fedpeft is faster.

    Args:
        data: folder of SST-2.
        size: overrides that say how many clients, steps and rows.
        repeats: processes of each side.
    """
    ray = [*size, *FAST, "runtime=ray", "runtime.total_cpus=2"]
    one_process = [*size, *FAST, "runtime=inprocess", "runtime.threads=2"]
    settings: dict[str, Any] = {"data": data, "rounds": 2}
    plain = settings | {"overrides": [*size, *PLAIN]}
    sides = {
        "fedpeft_ray": partial(seconds, "fedpeft", settings | {"overrides": ray}),
        "fedpeft_in_process": partial(seconds, "fedpeft", settings | {"overrides": one_process}),
        "bare_two_threads": partial(seconds, "bare", plain | {"threads": 2}),
        "bare_two_processes": partial(seconds, "bares", plain),
    }
    fedpeft, bare = list(sides)[:2], list(sides)[2:]
    pairs = [(a, b) for a in bare for b in fedpeft]
    return summary(interleaved(sides, repeats, warmups=0), pairs)


def summary(timings: dict[str, list[float]], pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Return each side's median and range of seconds, and the ratios of pairs of sides."""
    return {
        "seconds_a_round": medians(timings),
        "range": {name: spread(values) for name, values in timings.items()},
        "ratios": {f"{a} / {b}": ratio(timings[a], timings[b]) for a, b in pairs},
    }


def quality(data: str, size: list[str], rounds: int) -> dict[str, Any]:
    """Measure the accuracy on validation rows with plain and with fast settings.

    Args:
        data: folder of SST-2.
        size: overrides that say how many clients, steps and rows.
        rounds: number of rounds before the measurement.

    Returns:
        One accuracy for each of SEEDS, under ``plain`` and ``fast``.
    """
    result: dict[str, Any] = {"rounds": rounds}
    for name, settings in (("plain", PLAIN), ("fast", FAST)):
        result[name] = [
            final_accuracy(data, [*size, *settings, f"seed={seed}", f"num_rounds={rounds}"])
            for seed in SEEDS
        ]
    return result


def fedpeft_round(strategy: FederatedPEFT, grid: InProcessGrid, round: int) -> None:
    """Run one round through Flower's strategy methods: configure, train, check and aggregate.

    Args:
        strategy: keeps the server's state.
        grid: a grid of the strategy's clients.
        round: 1, 2, ....
    """
    messages = strategy.configure_train(round, strategy.arrays(), ConfigRecord(), grid)
    strategy.aggregate_train(round, grid.send_and_receive(messages, timeout=3600))


def bare_round(engine: Engine, clients: Iterable[int], round: int) -> None:
    """Train clients one after another in a plain loop, and average the results.

    Args:
        engine: gives the model and the batches that fedpeft's clients see.
        clients: the clients' numbers.
        round: 1, 2, ....
    """
    clients = list(clients)
    parameters = {n: p for n, p in engine.replica.model.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in parameters.items()}
    total = {n: torch.zeros_like(p) for n, p in start.items()}
    for client in clients:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(start[name])
        with torch_seed(engine.config.seed, "dropout", round, client):
            bare_client(
                engine.replica.model, list(parameters.values()), batches(engine, client, round)
            )
        for name, parameter in parameters.items():
            total[name] += parameter.detach() / len(clients)


def batches(engine: Engine, client: int, round: int) -> list[Batch]:
    """Return the batches that a client sees in fedpeft's round.

    Args:
        engine: gives the configuration and the rows.
        client: the client's number.
        round: 1, 2, ....
    """
    examples, config = engine.rows.client_examples(client)["train"], engine.config
    rng = generator(config.seed, "batches", round, client)
    rows = training_batches(
        examples.lengths, config.batch_size, config.local_steps, None, rng, config.bucketing
    )
    return [examples.batch(r) for r in rows]


def bare_client(model: nn.Module, parameters: list[nn.Parameter], batches: list[Batch]) -> None:
    """Train by AdamW with clipping, as any script does.

    Args:
        model: trains in place.
        parameters: the model's parameters that train.
        batches: one batch for each step.
    """
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    model.train()
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = nn.functional.cross_entropy(logits, batch["labels"])
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
