"""Run all benchmarks one after another: python -m benchmarks FOLDER_OF_SST2."""

import subprocess
import sys

ALONE = ("layers", "clients_per_pass", "exchange", "deployment", "soak", "kills")
ON_SST2 = ("arithmetic", "round", "example_app", "against_pfl", "population", "startup", "memory")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("give the folder of SST-2, with its train and validation rows as parquet")
    for name in ALONE:
        run(name)
    for name in ON_SST2:
        run(name, sys.argv[1])


def run(name: str, *arguments: str) -> None:
    """Run one benchmark in a process of its own, so that its failure does not stop the others."""
    print(f"--- {name}", flush=True)
    code = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments]).returncode
    if code:
        print(f"{name} ended with status {code}", flush=True)


if __name__ == "__main__":
    main()
