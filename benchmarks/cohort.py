"""Clients in one pass against one by one: K of them a pass, 1 to 16, at several batch sizes.

    python -m benchmarks.cohort [--sizes 1,2,4,8,16] [--batches 1,4,16] [--steps 4] [overrides]
    python -m benchmarks.cohort --gpu TOKENIZER [overrides]

Sixteen clients take the same steps, K at a time; the ratio is the seconds of K = 1 over those of K,
so that above 1 together is faster. ``automatic`` is the K that fedpeft chooses. --gpu takes the
architecture of RoBERTa-base with random weights, rows of 64 tokens in batches of 16, and bfloat16;
TOKENIZER is a folder with RoBERTa's. There the share of the peak counts multiply-adds by
PyTorch's counter, against a large matrix product in the same run and the data sheet of Hopper.
"""

import argparse
import csv
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import REPEATS, interleaved, medians, ratio, save
from fedpeft.config import load as configuration
from fedpeft.data.batching import Batch
from fedpeft.engine.engine import Engine
from fedpeft.engine.passes import autocast, to_device
from fedpeft.engine.plan import Job, plan
from fedpeft.methods.base import Phase

CLIENTS = 16
HOPPER_TFLOPS = 989  # dense bfloat16, H100 and H200 SXM, NVIDIA's data sheets
COMMON = (
    f"num_clients={CLIENTS}",
    "partition=iid",
    "runtime=inprocess",
    "num_rounds=1000",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--sizes", default="1,2,4,8,16")
    parser.add_argument("--batches", default=None)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--gpu", metavar="TOKENIZER")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    sizes = [int(size) for size in args.sizes.split(",")]
    batches = [int(size) for size in (args.batches or ("16" if args.gpu else "1,4,16")).split(",")]
    with tempfile.TemporaryDirectory() as folder:
        more = on_gpu(args.gpu, Path(folder)) if args.gpu else ["data=docstrings"]
        rows = [
            compared(
                [*COMMON, *more, f"local_steps={args.steps}", *args.overrides],
                batch,
                sizes,
                args.repeats,
            )
            for batch in batches
        ]
    peak = {} if not args.gpu else {"matrix_product_tflops": product_tflops()}
    name = "cohort_gpu" if args.gpu else "cohort"
    save(
        name,
        {
            "clients": CLIENTS,
            "steps": args.steps,
            "overrides": args.overrides,
            **peak,
            "batches": rows,
        },
    )


def on_gpu(tokenizer: str, folder: Path) -> list[str]:
    """The preset, on rows of random words longer than 64 tokens."""
    words = Path(tokenizer, "tokenizer.json").read_text().split('"Ġ')[1:5000]
    words = [word.split('"')[0] for word in words]
    draws = random.Random(0)
    with (folder / "train.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for row in range(40 * CLIENTS * 16):
            writer.writerow([" ".join(draws.choices(words, k=80)), row % 2])
    return [
        "model=roberta_base",
        "model.random=true",
        f"model.tokenizer_path='{tokenizer}'",
        "model.dtype=bfloat16",
        "model.settings={hidden_dropout_prob:0.0,attention_probs_dropout_prob:0.0}",
        "precision=bf16",
        "data=table",
        f"data.path='{folder}'",
        "data.text=text",
        "data.label=label",
        "data.max_length=64",
    ]


def compared(overrides: list[str], batch: int, sizes: list[int], repeats: int) -> dict[str, Any]:
    """Seconds of all clients' steps by K, and what they gain over one by one."""
    given = configuration.load_config([*overrides, f"batch_size={batch}"])
    session = Engine(given)
    sides = {str(size): turn(session, size) for size in sizes}
    seconds = interleaved(sides, repeats)
    steps = CLIENTS * (given.local_steps or 1)
    found = {
        "batch": batch,
        "automatic": session.clients_per_pass(),
        "milliseconds_a_step_and_client": {
            k: float(f"{1e3 * s / steps:.4g}") for k, s in medians(seconds).items()
        },
        "times_one_by_one": {k: ratio(seconds["1"], seconds[k]) for k in sides if k != "1"},
    }
    if next(session.replica.model.parameters()).is_cuda:
        found["synchronisations_of_a_round"] = {
            str(size): synchronisations(turn(session, size)) for size in sizes
        }
        found["one_by_one_captured_milliseconds"] = captured_milliseconds(session)
        flops = step_flops(session)
        found["teraflop_a_step"] = float(f"{flops / 1e12:.4g}")
        found["tflops"] = {
            k: float(f"{flops * steps / s / 1e12:.4g}") for k, s in medians(seconds).items()
        }
    return found


def turn(session: Engine, size: int) -> Callable[[], float]:
    """All clients' training in groups of a size; every turn is a new round."""
    rounds = iter(range(1, 1000))

    def run() -> float:
        round = next(rounds)
        begun = time.perf_counter()
        for first in range(0, CLIENTS, size):
            clients = range(first, first + size)
            start = dict(session.replica.initial)
            jobs = [Job(session.replica.roles.at(round, client), start) for client in clients]
            for result in session.train(jobs, round):
                if isinstance(result, Exception):
                    raise result
        return time.perf_counter() - begun

    return run


def first_batch(session: Engine) -> Batch:
    """Return the first batch of client 0 in round 1."""
    rows, steps = session.rows.training(0)
    return plan(session.config, rows, steps, [1, 0], Phase()).steps[0][0]


def step_flops(session: Engine) -> int:
    """Floating-point operations of one client's forward and backward pass."""
    device = next(session.replica.model.parameters()).device
    batch = to_device(first_batch(session), device)
    session.replica.set_trainable(set(session.replica.roles.trained(1)))
    session.replica.model.train()
    with FlopCounterMode(display=False) as counter:
        with autocast(device, session.config.precision):
            loss = session.task.loss(session.task.forward(session.replica.model, batch), batch)
        loss.backward()
    session.replica.model.zero_grad()
    return counter.get_total_flops()


def synchronisations(run: Callable[[], float]) -> int:
    """Times that the host waits for the GPU in all clients' steps, loading and reading included."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def captured_milliseconds(session: Engine, times: int = 50) -> float:
    """A client's forward and backward pass as one CUDA graph, which fedpeft does not use."""
    model, device = session.replica.model, next(session.replica.model.parameters()).device
    batch = to_device(first_batch(session), device)
    session.replica.set_trainable(set(session.replica.roles.trained(1)))
    model.train()

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = session.task.loss(session.task.forward(model, batch), batch)
        loss.backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(times):
        graph.replay()
    torch.cuda.synchronize()
    model.zero_grad()
    return float(f"{1e3 * (time.perf_counter() - begun) / times:.4g}")


def product_tflops(size: int = 8192, times: int = 20) -> float:
    """Rate of a large bfloat16 matrix product on random numbers."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        _ = a @ b
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(times):
        _ = a @ b
    torch.cuda.synchronize()
    return round(2 * size**3 * times / (time.perf_counter() - begun) / 1e12, 1)


if __name__ == "__main__":
    main()
