"""Real data and weights: those that stand beside the project, and the embedded default."""

from pathlib import Path
from typing import Any

import pytest

from fedpeft.config import load

SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the folder shared/ with real data is not beside the project"
)
pytestmark = pytest.mark.slow


@needs_shared
def test_sst2_has_fedpetunings_splits() -> None:
    task = load(["data=sst2", f"data.path={SHARED}/data/sst2"]).data
    sizes = {split: len(rows) for split, rows in task.splits.items()}
    assert sizes == {"train": 66_675, "validation": 674, "test": 872}
    assert task.label_names == ["negative", "positive"]


@needs_shared
def test_a_pretrained_decoder_classifies(run: Any) -> None:
    summary = run(f"model.path={SHARED}/models/stories260k", "method=scl", "method.rank=8")
    assert len(summary["initial_error"]) == 5
    # r (f + d) in each of five gated MLPs, and the head of four classes
    assert summary["parameters"]["sent_up"] == [5 * 8 * (172 + 64) + 4 * 64] * 2
    assert summary["refused"] == {}


def test_the_embedded_default_trains(run: Any) -> None:
    summary = run(
        "model=minilm",
        "model.path=null",
        "data=docstrings",
        "data.path=null",
        "data.max_validation_rows=60",
        "data.max_test_rows=60",
        "method=scl",
        "method.rank=64",
        "num_rounds=1",
    )
    errors = list(summary["initial_error"].values())
    assert len(errors) == 6 and all(0.9 < error < 1 for error in errors)
    assert summary["data"]["rows"] == {"train": 8000, "validation": 60, "test": 60}
    assert summary["weights_sha256"] == load([]).model.sha256
    assert summary["initial"]["validation_loss"] != summary["final"]["validation_loss"]
