"""Time the start: the seconds from the command to the end of the first client's first step.

The sides take turns, with warm caches (SST-2, MiniLM, LoRA of rank 8, ten clients):

- fedpeft: ``fedpeft run`` on Ray and in one process. It first evaluates the initial model, which
  the other sides do not, on all validation rows or on few.
- script: imports torch, transformers and PEFT, loads the model, tokenises a batch and takes a step.
- example: the Flower app of ``example_run.py``.

The first start of fedpeft is measured apart, with empty caches of its own and of ``datasets``, and
so is each import:

    python -m benchmarks.startup FOLDER_OF_SST2 [--repeats 5]

The commands are a user's. A module that every Python process imports at its start lets torch
write the time after a step, also in Ray's workers.
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
        timings = interleaved(_sides(data, warm), args.repeats)  # the warm-up fills the caches
    first = interleaved(_first(data), args.repeats, warmups=0)
    script = timings["script"]
    result = {
        "seconds": medians(timings),
        "range": {name: spread(values) for name, values in timings.items()},
        "ratios": {
            f"{n} / script": ratio(values, script) for n, values in timings.items() if n != "script"
        },
        "first_start": medians(first),
        "first_start_range": {name: spread(values) for name, values in first.items()},
        "imports": imports(args.repeats),
    }
    save("startup", {"repeats": args.repeats} | result)


def _sides(data: str, caches: dict[str, str]) -> dict[str, Any]:
    """Return one start of each side with the caches that the environment variables name."""
    script = ["-c", SCRIPT, data, model_folder()]
    settings = json.dumps({"data": data, "rounds": 0, "clients": 10})
    example = ["-m", "benchmarks.sides", "example", settings]
    fedpeft = {f"fedpeft_{kind}": partial(started, data, kind, caches) for kind in KINDS}
    return fedpeft | {
        "script": partial(first_step, script, caches),
        "example": partial(first_step, example, caches),
    }


def _first(data: str) -> dict[str, Any]:
    """Return starts of fedpeft, on Ray and in one process, each with new, empty caches."""

    def start(kind: str) -> float:
        with tempfile.TemporaryDirectory() as cache:
            empty = {"FEDPEFT_CACHE": f"{cache}/fedpeft", "HF_DATASETS_CACHE": f"{cache}/datasets"}
            return started(data, kind, empty)

    return {f"fedpeft_{kind}": partial(start, kind) for kind in ("ray", "in_process")}


def started(data: str, kind: str, caches: dict[str, str]) -> float:
    """Return the seconds of ``fedpeft run`` to its first step.

    Args:
        data: folder of SST-2.
        kind: a key of ``KINDS``.
        caches: environment variables that name the caches.
    """
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*job(data), *RUN, *KINDS[kind], f"run_dir='{folder}/run'"]
        return first_step(["-c", CALL, "run", *overrides], caches)


def first_step(command: Sequence[str], caches: dict[str, str]) -> float:
    """Return the seconds from a Python process's start to the first step in it or below it."""
    with tempfile.TemporaryDirectory() as folder:
        body = inspect.getsource(tell_first_step)
        (Path(folder) / "sitecustomize.py").write_text(f"{body}\n\ntell_first_step()\n")
        path = os.pathsep.join([folder, QUIET["PYTHONPATH"]])
        begun = time.time()
        process(command, {"PYTHONPATH": path, "FIRST_STEP": f"{folder}/step", **caches})
        return float((Path(folder) / "step").read_text()) - begun


def tell_first_step() -> None:
    """Write the time of an optimizer's first step into $FIRST_STEP, unless it is there."""
    import importlib.util
    import os
    import sys
    import time
    from contextlib import suppress

    class Watch:
        """Finds ``torch.optim.optimizer`` as Python would, and adds a hook once it is loaded."""

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
    """Return the median seconds of Python's start, and of each import after the ones before."""
    tell = "print(time.time())"
    code = f"import sys, time; {tell}\nfor name in sys.argv[1:]: __import__(name); {tell}"
    seconds: dict[str, list[float]] = {name: [] for name in ("python", *IMPORTS)}
    for _ in range(repeats):
        begun = time.time()
        output, _ = process(["-c", code, *IMPORTS])
        for name, ended in zip(seconds, map(float, output.split()), strict=True):
            seconds[name].append(ended - begun)
            begun = ended
    return medians(seconds)


if __name__ == "__main__":
    main()
