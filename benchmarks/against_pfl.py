"""Ten clients of 20 steps: fedpeft and pfl-research, each as its documentation recommends.

SST-2, MiniLM, LoRA of rank 8 on query and value, AdamW, clipping, batch 16, FedAvg over all
clients; both with float32 and with bfloat16 autocast. On two cores both run as one process of two
threads and as two processes of one thread (pfl's by torchrun, fedpeft's Ray workers). The sides
take turns, each some rounds in a process of its own, start-up not counted:

    python -m benchmarks.against_pfl ../shared/data/sst2 [--repeats 5] [--clients 10] [--steps 20]

pfl is no dependency of fedpeft: pip install pfl==0.6.0 where this is to run.
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
    parser.add_argument("--rounds", type=int, default=2, help="that count, of each process")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sides", nargs="+", help="some of them")
    args = parser.parse_args()
    if find_spec("pfl") is None:
        print("pfl is not installed (pip install pfl==0.6.0), so there is nothing to compare with")
        return
    taken = interleaved(_sides(args), args.repeats, warmups=0)
    keys = ("repeats", "rounds", "clients", "steps")
    result = {key: getattr(args, key) for key in keys}
    result |= {"batch_size": 16, "pfl": version("pfl"), "seconds_a_round": medians(taken)}
    result["range"] = {name: spread(values) for name, values in taken.items()}
    save("against_pfl", result | {"ratios": _ratios(taken)})


def _sides(args: Any) -> dict[str, Any]:
    """Both frameworks in both precisions, by threads and by processes."""
    job = {"data": str(args.data.resolve()), "rounds": args.rounds}
    theirs = job | {"clients": args.clients, "steps": args.steps}
    sides: dict[str, Any] = {}
    for precision in PRECISIONS:
        given = theirs | {"precision": precision}
        sides[f"pfl_threads_{precision}"] = partial(seconds, "pfl", given | {"threads": 2})
        sides[f"pfl_processes_{precision}"] = partial(seconds, "pfl", given, launcher=TORCHRUN)
        base = [f"num_clients={args.clients}", f"local_steps={args.steps}"]
        for kind, own in (
            ("threads", ["runtime=inprocess", "runtime.threads=2"]),
            ("processes", ["runtime=ray", "runtime.total_cpus=2"]),
        ):
            overrides = [*base, f"precision={precision}", *own]
            settings = job | {"overrides": overrides}
            sides[f"fedpeft_{kind}_{precision}"] = partial(seconds, "fedpeft", settings)
    return {name: side for name, side in sides.items() if name in (args.sides or sides)}


def _ratios(taken: dict[str, list[float]]) -> dict[str, Any]:
    """pfl over fedpeft: by precision, each as processes and threads, and each at its best."""
    found: dict[str, Any] = {}
    for theirs in (name for name in taken if name.startswith("pfl_")):
        for ours in (name for name in taken if name.startswith("fedpeft_")):
            found[f"{theirs} / {ours}"] = ratio(taken[theirs], taken[ours])
    return found


if __name__ == "__main__":
    main()
