"""Compare clients trained together in one pass with clients trained one by one.

    python -m benchmarks.clients_per_pass [--sizes 1,2,4,8,16] [--batches 1,4,16] [--steps 4]
        [overrides]
    python -m benchmarks.clients_per_pass --gpu TOKENIZER [overrides]

Sixteen clients take the same steps with K clients per pass, for each K of --sizes and each batch
size. The ratio is the seconds of K = 1 over the seconds of K, so above 1 together is faster.
``automatic`` is the K that fedpeft chooses.

--gpu takes the architecture of RoBERTa-base with random weights, rows of 64 tokens in batches of
16, and bfloat16; TOKENIZER is a folder with RoBERTa's tokenizer. It also gives the rate of each K
in TFLOP/s, by PyTorch's counter, beside the rate of a large matrix product in the same run. The
peak in NVIDIA's data sheets of H100 and H200 SXM is 989 TFLOP/s in dense bfloat16.
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
from fedpeft.config.load import load_config
from fedpeft.data.batching import Batch
from fedpeft.engine.engine import Engine
from fedpeft.engine.passes import autocast, to_device
from fedpeft.engine.plan import Job, plan

CLIENTS = 16
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
        preset = on_gpu(args.gpu, Path(folder)) if args.gpu else ["data=docstrings"]
        overrides = [*COMMON, *preset, f"local_steps={args.steps}", *args.overrides]
        rows = [compared(overrides, batch, sizes, args.repeats) for batch in batches]
    result: dict[str, Any] = {"clients": CLIENTS, "steps": args.steps}
    result["overrides"] = args.overrides
    if args.gpu:
        result["matrix_product_tflops"] = product_tflops()
    save("clients_per_pass_gpu" if args.gpu else "clients_per_pass", result | {"batches": rows})


def on_gpu(tokenizer: str, folder: Path) -> list[str]:
    """Return the overrides of --gpu, and write its rows of random words, longer than 64 tokens.

    Args:
        tokenizer: folder with RoBERTa's tokenizer, whose words the rows consist of.
        folder: place for the rows.
    """
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
    """Time all clients' steps for each K.

    Args:
        overrides: the configuration but for the batch size.
        batch: rows of a client's batch.
        sizes: values of K; the first turn of each warms up.
        repeats: turns of each K that count.

    Returns:
        The time of a client's step and the ratio to one by one, by K; on a GPU also the rates.
    """
    config = load_config([*overrides, f"batch_size={batch}"])
    engine = Engine(config)
    sides = {str(size): turn(engine, size) for size in sizes}
    seconds = interleaved(sides, repeats)
    steps = CLIENTS * (config.local_steps or 1)
    result = {
        "batch": batch,
        "automatic": engine.clients_per_pass(),
        "milliseconds_a_step_and_client": {
            k: float(f"{1e3 * s / steps:.4g}") for k, s in medians(seconds).items()
        },
        "times_one_by_one": {k: ratio(seconds["1"], seconds[k]) for k in sides if k != "1"},
    }
    if next(engine.replica.model.parameters()).is_cuda:
        result["synchronisations_of_a_round"] = {
            str(size): synchronisations(turn(engine, size)) for size in sizes
        }
        result["one_by_one_captured_milliseconds"] = captured_milliseconds(engine)
        flops = step_flops(engine)
        result["teraflop_a_step"] = float(f"{flops / 1e12:.4g}")
        result["tflops"] = {
            k: float(f"{flops * steps / s / 1e12:.4g}") for k, s in medians(seconds).items()
        }
    return result


def turn(engine: Engine, size: int) -> Callable[[], float]:
    """Return a function that trains all clients for a round, ``size`` a pass, and its seconds.

    Each call is a new round.
    """
    rounds = iter(range(1, 1000))

    def run() -> float:
        round = next(rounds)
        begun = time.perf_counter()
        for first in range(0, CLIENTS, size):
            clients = range(first, first + size)
            start = dict(engine.replica.initial)
            jobs = [Job(engine.replica.roles.at(round, client), start) for client in clients]
            for result in engine.train(jobs):
                if isinstance(result, Exception):
                    raise result
        return time.perf_counter() - begun

    return run


def first_batch(engine: Engine) -> Batch:
    """Return the first batch of client 0 in round 1."""
    rows, steps = engine.rows.training(0)
    return plan(engine.config, rows, steps, [1, 0]).steps[0][0]


def step_flops(engine: Engine) -> int:
    """Count the floating-point operations of one client's forward and backward pass."""
    device = next(engine.replica.model.parameters()).device
    batch = to_device(first_batch(engine), device)
    engine.replica.set_trainable(set(engine.replica.roles.trained(1)))
    engine.replica.model.train()
    with FlopCounterMode(display=False) as counter:
        with autocast(device, engine.config.precision):
            loss = engine.task.loss(engine.task.forward(engine.replica.model, batch), batch)
        loss.backward()
    engine.replica.model.zero_grad()
    return counter.get_total_flops()


def synchronisations(run: Callable[[], float]) -> int:
    """Count how often the host waits for the GPU in a turn, loading and reading included."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def captured_milliseconds(engine: Engine, times: int = 50) -> float:
    """Time a client's forward and backward pass captured as one CUDA graph, without optimizer."""
    model, device = engine.replica.model, next(engine.replica.model.parameters()).device
    batch = to_device(first_batch(engine), device)
    engine.replica.set_trainable(set(engine.replica.roles.trained(1)))
    model.train()

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = engine.task.loss(engine.task.forward(model, batch), batch)
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
    """Measure the rate of a bfloat16 product of two square matrices of random numbers."""
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
