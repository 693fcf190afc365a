"""Real data and weights, of the folder that FEDPEFT_TEST_DATA names; see CONTRIBUTING.md."""

import hashlib
import io
import json
from typing import Any

import pytest
from PIL import Image

from fedpeft.config.load import load_config
from fedpeft.data.rows.tables import values
from tests.conftest import SHARED, needs_shared

pytestmark = pytest.mark.slow
SIZES = {
    "sst2": (66_675, 674, 872),  # FedPETuning's
    "mrpc": (3_301, 367, 408),
    "copa": (360, 40, 100),
    "squad": (86_723, 876, 10_570),
    "medquad": (13_289, 1_477, 1_641),  # of 16,407
    "dolly": (12_158, 1_351, 1_502),  # of 15,011
}
GROUPS = {"sst2": 2, "mrpc": 2, "copa": 2, "squad": 442, "medquad": 15, "dolly": 8}  # in train
FEW = ["data.max_train_rows=60", "data.max_validation_rows=9", "data.max_test_rows=9"]


def task_of(name: str) -> Any:
    return load_config([f"data={name}", f"data.path={SHARED}/data/{name}"]).data


@needs_shared
@pytest.mark.parametrize("name", SIZES)
def test_splits(name: str) -> None:
    task = task_of(name)
    facts = task.fingerprint()
    assert tuple(facts["rows"].values()) == SIZES[name] and facts["skipped"] == {}
    groups, names = task.grouped(None)
    assert len(groups) == SIZES[name][0] and len(names) == GROUPS[name] == len(set(groups))
    if name == "sst2":
        assert task.label_names == ["negative", "positive"]


@needs_shared
def test_each_brain_image_once() -> None:
    """213 images are in both splits, some encoded anew, and train loses them."""
    task = task_of("brain_tumor")
    pixels: dict[str, list[bytes]] = {}
    for split, rows in task.tables.items():
        pixels[split] = []
        for value in values(rows, "image"):
            with Image.open(io.BytesIO(value["bytes"])) as image:
                shown = image.convert("RGB")
                pixels[split].append(hashlib.sha256(shown.tobytes()).digest())
    train, test = set(pixels["train"]), set(pixels["test"])
    assert (len(pixels["train"]), len(pixels["test"])) == (2_870, 394)
    assert len(train | test) == 2_870 and len(train & test) == 213
    facts = task.fingerprint()
    assert facts["rows"] == {"train": 2_300, "validation": 256, "test": 314}
    assert facts["skipped"] == {"is a repeat in train": 314, "is a repeat in test": 80}
    assert task.label_names == ["glioma", "meningioma", "no_tumor", "pituitary"]


@needs_shared
@pytest.mark.parametrize("name", ["medquad", "squad"])
def test_two_rounds_of_answers(run: Any, name: str) -> None:
    """Prompts are longer than the limit, so they are cut and counted."""
    data = [f"data={name}", f"data.path={SHARED}/data/{name}", *FEW, "partition=iid"]
    model = [f"model.path={SHARED}/models/stories260k", "method.rank=4", "lr=0.01"]
    summary = run(*model, *data, "data.max_length=96", "data.max_answer_length=16")
    first = load_config([f"data={name}"]).data.metrics[0]
    assert summary["refused"] == {} and summary["selected_by"] == "validation_loss"
    assert 0 <= summary["final"][f"test_{first}_generated"] <= 1
    assert summary["final"]["validation_loss"] < summary["initial"]["validation_loss"]
    assert summary["data"]["cut"]["train"]["cut_prompt"] > 0
    samples = [json.loads(s) for s in (run.run_dir / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 9 and all(sample["reference"] for sample in samples)


@needs_shared
def test_two_rounds_of_choices(run: Any) -> None:
    data = ["data=copa", f"data.path={SHARED}/data/copa", *FEW, "data.scoring=likelihood"]
    model = [f"model.path={SHARED}/models/stories260k", "method.rank=4", "lr=0.01"]
    summary = run(*model, *data, "partition=iid")
    assert summary["refused"] == {} and summary["selected_by"] == "validation_accuracy"
    assert summary["final"]["test_accuracy"] in [i / 9 for i in range(10)]
    assert summary["final"]["validation_loss"] != summary["initial"]["validation_loss"]


@needs_shared
def test_a_pretrained_decoder_classifies(run: Any) -> None:
    summary = run(f"model.path={SHARED}/models/stories260k", "method=scl", "method.rank=8")
    assert len(summary["initial_error"]) == 5
    # r (f + d) in each of five gated MLPs, and the head of four classes
    assert summary["parameters"]["sent_up"] == [5 * 8 * (172 + 64) + 4 * 64] * 2
    assert summary["refused"] == {}
