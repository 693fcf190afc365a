"""An exported folder, loaded by peft, by transformers or by fedpeft alone, gives the run's logits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedpeft.config.load import CONF
from fedpeft.export.load import load
from fedpeft.export.run import FinishedRun, open_run
from fedpeft.export.write import Written, export, logits, made_up
from fedpeft.simulation import launch
from tests.conftest import Runner, quiet, with_fields

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))


@pytest.fixture
def finished(base: list[str], tmp_path: Path) -> Callable[..., Path]:
    """``finished("method=scl", ...)`` gives the directory of a run of two rounds."""

    def run(*overrides: str) -> Path:
        folder = tmp_path / "run"
        launch.run(with_fields(base, [*overrides, f"run_dir={folder}"]), quiet())
        return folder

    return run


def by_others(folder: Path, form: str, checkpoint: Path, labels: int = 4) -> Any:
    """Load a folder as its card says, without fedpeft unless it is of fedpeft's own form."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification as Auto

    if form == "fedpeft":
        return load(folder)
    if form == "transformers":
        return Auto.from_pretrained(folder).eval()
    base = Auto.from_pretrained(checkpoint, num_labels=labels)
    return PeftModel.from_pretrained(base, str(folder)).eval()


if __name__ == "__main__":
    pass
