"""One round of ten clients against a bare PyTorch loop that does the same steps in one process.

Both use the same model object, batches, optimizer, clipping and number of threads, and take turns;
the ratio of their medians is what fedpeft costs on top of the arithmetic. Prints and saves JSON:

    python benchmarks/round.py [--repeats 5] [--clients 10] [--steps 20] [overrides]
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedpeft import config as configuration
from fedpeft.client_app import app as client_app
from fedpeft.data.batching import Batch, training_batches
from fedpeft.runtime import InProcessGrid
from fedpeft.seeding import generator, torch_seed
from fedpeft.session import Session, open_session
from fedpeft.strategy import RoleStrategy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("results/round.json"))
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    overrides = configuration.join(
        [
            "runtime=inprocess",
            f"num_clients={args.clients}",
            f"local_steps={args.steps}",
            "num_rounds=1000",
            "partition=iid",
            *args.overrides,
        ]
    )
    result = measure(overrides, args.clients, args.repeats)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def measure(overrides: str, clients: int, repeats: int) -> dict[str, Any]:
    """Medians and their ratio; the first round of each warms up and is left out."""
    session = open_session(overrides, None)
    nodes = [{"partition-id": i, "num-partitions": clients} for i in range(clients)]
    grid = InProcessGrid(client_app, nodes)
    strategy = RoleStrategy(session, overrides)
    strategy.hosts.join(grid)
    loads = open_session.cache_info().misses
    ours, bare = [], []
    for round in range(1, repeats + 2):
        ours.append(timed(lambda r=round: fedpeft_round(strategy, grid, r)))
        bare.append(timed(lambda r=round: bare_round(session, clients, r)))
    ratios = [a / b for a, b in zip(ours[1:], bare[1:], strict=True)]
    return {
        "overrides": overrides,
        "threads": torch.get_num_threads(),
        "fedpeft_seconds": statistics.median(ours[1:]),
        "bare_seconds": statistics.median(bare[1:]),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "model_loads_after_the_first": open_session.cache_info().misses - loads,
    }


def timed(function: Any) -> float:
    """Seconds of one call."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def fedpeft_round(strategy: RoleStrategy, grid: InProcessGrid, round: int) -> None:
    """Configure, train on the clients, check and aggregate."""
    messages = strategy.configure_train(round, *strategy.packed(round), grid)
    replies = strategy.hosts.exchange(grid, messages, 3600)
    strategy.aggregate_train(round, replies)


def bare_round(session: Session, clients: int, round: int) -> None:
    """The same steps as one would write them without federation, and a mean of the results."""
    parameters = {n: p for n, p in session.model.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in parameters.items()}
    total = {n: torch.zeros_like(p) for n, p in start.items()}
    for client in range(clients):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(start[name])
        with torch_seed(session.config.seed, "dropout", round, client):
            bare_client(session.model, list(parameters.values()), batches(session, client, round))
        for name, parameter in parameters.items():
            total[name] += parameter.detach() / clients


def batches(session: Session, client: int, round: int) -> list[Batch]:
    """The batches that the client sees in fedpeft's round."""
    examples, config = session.client_examples(client)["train"], session.config
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
