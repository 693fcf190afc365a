"""From the command to the end of the first client's first step, in seconds.

``fedpeft run`` (SST-2, MiniLM, LoRA of rank 8, ten clients) on Ray and in one process, which first
evaluates the initial model, as the others do not, on all validation rows or on few; a bare script,
which imports torch, transformers and PEFT, loads the model, tokenises a batch and takes a step; and
a Flower app as public examples are. The sides take turns, with warm caches; apart from them the
first start of fedpeft, with empty caches of its own and of ``datasets``:

    python -m benchmarks.startup ../shared/data/sst2 [--repeats 5]

A module that every Python process imports at its start has torch tell the time after a step, also
in Ray's workers; the commands are those of a user. What the imports alone take is told by name.
"""

import argparse
import inspect
import json
import os
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.example_run import model_folder
from benchmarks.measure import QUIET, REPEATS, interleaved, medians, process, ratio, save, spread
from benchmarks.sides import job

CALL = "import sys; from fedpeft.cli import main; main()"
RUN = ["num_clients=10", "num_rounds=1", "local_steps=1", "evaluation.every=1000000"]
WHOLE = ["data.max_validation_rows=null", "data.max_test_rows=null"]  # as a user evaluates
RAY, INPROCESS = ["runtime=ray", "runtime.total_cpus=2"], ["runtime=inprocess"]
KINDS = {
    "ray": [*RAY, *WHOLE],
    "ray_few_rows": RAY,
    "in_process": [*INPROCESS, *WHOLE],
    "in_process_few_rows": INPROCESS,
}
IMPORTS = ("torch", "transformers", "peft", "datasets", "flwr.serverapp", "ray")
SCRIPT = """
import sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from peft import LoraConfig, get_peft_model
import pyarrow.parquet
torch.set_num_threads(1)
data, folder = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
targets = ["query", "value"]
lora = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=targets)
model = get_peft_model(model, lora).train()
rows = pyarrow.parquet.read_table(data + "/train.parquet").slice(0, 16)
batch = tokenizer(rows["sentence"].to_pylist(), padding=True, return_tensors="pt")
parameters = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=3e-3)
model(**batch, labels=torch.tensor(rows["label"].to_pylist())).loss.backward()
optimizer.step()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, help="folder of SST-2")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    args = parser.parse_args()
    data = str(args.data.resolve())
    with tempfile.TemporaryDirectory() as cache:
        warm = {"FEDPEFT_CACHE": f"{cache}/fedpeft", "HF_DATASETS_CACHE": f"{cache}/datasets"}
        taken = interleaved(_sides(data, warm), args.repeats)  # the turn before fills the caches
    first = interleaved(_first(data), args.repeats, warmups=0)
    bare = taken["script"]
    ratios = {f"{n} / script": ratio(own, bare) for n, own in taken.items() if own is not bare}
    result = {
        "seconds": medians(taken),
        "range": {name: spread(own) for name, own in taken.items()},
        "ratios": ratios,
        "first_start": medians(first),
        "first_start_range": {name: spread(own) for name, own in first.items()},
        "imports": imports(args.repeats),
    }
    save("startup", {"repeats": args.repeats} | result)


def _sides(data: str, caches: dict[str, str]) -> dict[str, Any]:
    example = json.dumps({"data": data, "rounds": 0, "clients": 10})
    others = {
        "script": ["-c", SCRIPT, data, model_folder()],
        "example": ["-m", "benchmarks.sides", "example", example],
    }
    sides = {name: partial(first_step, command, caches) for name, command in others.items()}
    ours = {f"fedpeft_{kind}": partial(started, data, kind, caches) for kind in KINDS}
    return ours | sides


def _first(data: str) -> dict[str, Any]:
    def start(kind: str) -> float:
        with tempfile.TemporaryDirectory() as cache:
            empty = {"FEDPEFT_CACHE": f"{cache}/fedpeft", "HF_DATASETS_CACHE": f"{cache}/datasets"}
            return started(data, kind, empty)

    return {f"fedpeft_{kind}": partial(start, kind) for kind in ("ray", "in_process")}


def started(data: str, kind: str, caches: dict[str, str]) -> float:
    """Seconds of ``fedpeft run``."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*job(data), *RUN, *KINDS[kind], f"run_dir='{folder}/run'"]
        return first_step(["-c", CALL, "run", *overrides], caches)


def first_step(command: Sequence[str], caches: dict[str, str]) -> float:
    """Seconds from starting a Python process to the first step in it or in one below it."""
    with tempfile.TemporaryDirectory() as folder:
        body = inspect.getsource(tell_first_step)
        (Path(folder) / "sitecustomize.py").write_text(f"{body}\n\ntell_first_step()\n")
        path = os.pathsep.join([folder, QUIET["PYTHONPATH"]])
        begun = time.time()
        process(command, {"PYTHONPATH": path, "FIRST_STEP": f"{folder}/step", **caches})
        return float((Path(folder) / "step").read_text()) - begun


def tell_first_step() -> None:
    """Writes the time of an optimizer's first step into $FIRST_STEP, unless it is there."""
    import importlib.util
    import os
    import sys
    import time
    from contextlib import suppress

    class Watch:
        """Finds one module, as the others would, and adds to what importing it does."""

        def find_spec(self, name, path=None, target=None):  # noqa: ANN001
            if name != "torch.optim.optimizer":
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            assert spec is not None and spec.loader is not None
            load = spec.loader.exec_module

            def exec_module(module) -> None:  # noqa: ANN001
                load(module)
                module.register_optimizer_step_post_hook(note)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
            return spec

    def note(*_) -> None:
        with suppress(FileExistsError), open(os.environ["FIRST_STEP"], "x") as file:
            file.write(str(time.time()))

    sys.meta_path.insert(0, Watch())  # type: ignore[arg-type]


def imports(repeats: int) -> dict[str, float]:
    """Median seconds of Python's start, and of each import after those before it."""
    tell = "print(time.time())"
    code = f"import sys, time; {tell}\nfor name in sys.argv[1:]: __import__(name); {tell}"
    taken: dict[str, list[float]] = {name: [] for name in ("python", *IMPORTS)}
    for _ in range(repeats):
        begun = time.time()
        output, _ = process(["-c", code, *IMPORTS])
        for name, ended in zip(taken, map(float, output.split()), strict=True):
            taken[name].append(ended - begun)
            begun = ended
    return medians(taken)


if __name__ == "__main__":
    main()
