"""Ten clients of 20 steps: fedpeft and pfl-research, each as its documentation recommends.

SST-2, MiniLM, LoRA of rank 8 on query and value, AdamW, clipping, batch 16, FedAvg over all
clients; both with float32 and with bfloat16 autocast. On two cores both run as one process of two
threads and as two processes of one thread (pfl's by torchrun, fedpeft's Ray workers). The sides
take turns. In its turn a side runs some rounds in a process of its own; start-up does not count:

    python -m benchmarks.against_pfl FOLDER_OF_SST2 [--repeats 5] [--clients 10] [--steps 20]

pfl is no dependency of fedpeft, so install it first: pip install pfl==0.6.0.
"""

import argparse
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.measure import REPEATS, interleaved, medians, ratio, save, spread
from benchmarks.sides import seconds

PRECISIONS = ("fp32", "bf16")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, help="folder of SST-2")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--rounds", type=int, default=2, help="measured rounds of each process")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sides", nargs="+", help="names of the sides to run (default: all)")
    args = parser.parse_args()
    if find_spec("pfl") is None:
        print("pfl is not installed (pip install pfl==0.6.0), so there is nothing to compare with")
        return
    timings = interleaved(_sides(args), args.repeats, warmups=0)
    settings = {key: getattr(args, key) for key in ("repeats", "rounds", "clients", "steps")}
    settings |= {"batch_size": 16, "pfl": version("pfl")}
    results = {
        "seconds_a_round": medians(timings),
        "range": {name: spread(values) for name, values in timings.items()},
        "ratios": _ratios(timings),
    }
    save("against_pfl", settings | results)


def _sides(args: Any) -> dict[str, Any]:
    """Return a turn of both frameworks in both precisions, with threads and with processes."""
    job = {"data": str(args.data.resolve()), "rounds": args.rounds}
    sides: dict[str, Any] = {}
    for precision in PRECISIONS:
        pfl = job | {"clients": args.clients, "steps": args.steps, "precision": precision}
        sides[f"pfl_threads_{precision}"] = partial(seconds, "pfl", pfl | {"threads": 2})
        sides[f"pfl_processes_{precision}"] = partial(seconds, "pfl", pfl, launcher=TORCHRUN)
        size = [f"num_clients={args.clients}", f"local_steps={args.steps}"]
        for kind, runtime in (
            ("threads", ["runtime=inprocess", "runtime.threads=2"]),
            ("processes", ["runtime=ray", "runtime.total_cpus=2"]),
        ):
            fedpeft = job | {"overrides": [*size, f"precision={precision}", *runtime]}
            sides[f"fedpeft_{kind}_{precision}"] = partial(seconds, "fedpeft", fedpeft)
    return {name: side for name, side in sides.items() if name in (args.sides or sides)}


def _ratios(timings: dict[str, list[float]]) -> dict[str, Any]:
    """Return the ratio of every pfl side to every fedpeft side; above 1, fedpeft is faster."""
    ratios: dict[str, Any] = {}
    for pfl in (name for name in timings if name.startswith("pfl_")):
        for fedpeft in (name for name in timings if name.startswith("fedpeft_")):
            ratios[f"{pfl} / {fedpeft}"] = ratio(timings[pfl], timings[fedpeft])
    return ratios


if __name__ == "__main__":
    main()
