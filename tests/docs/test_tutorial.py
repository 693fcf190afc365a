"""The tutorial's commands run one after another, from a run to its answers."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.documents import blocks, page

pytestmark = pytest.mark.slow
TUTORIAL = "docs/tutorial.md"


def test_the_tutorial(
    fedpeft: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands = [
        words[1:] + (["runtime=inprocess"] if words[1] == "run" else [])
        for block in blocks(TUTORIAL)
        if block.language == "bash" and block.reason is None
        for words in block.commands
    ]
    assert [words[0] for words in commands] == [
        *("run", "show", "show", "export", "evaluate", "predict", "run")
    ]
    # The page's three rounds of each method, and all rows, would take three times as long.
    few = ["data.max_validation_rows=100", "data.max_test_rows=100"]
    commands[0] += ["num_rounds=2", *few]
    commands[4] += few
    commands[-1] += ["num_rounds=1", *few]
    texts = "Draw a scatter plot with axes and a legend.\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(texts))
    printed = [fedpeft(*words) for words in commands]
    assert texts.strip() in page(TUTORIAL)
    run = json.loads((tmp_path / "runs/first/summary.json").read_text())
    for name in ("client_test_accuracy", "client_test_baseline", "test_accuracy"):
        assert f"{name}: {run['final'][name]:.4f}" in printed[0]
        assert f"\n{name}: " in page(TUTORIAL)
    assert f"shared_state_sha256: {run['shared_state_sha256']}\n" in printed[0]
    listed = set(file_names(page(TUTORIAL)))
    assert listed <= {path.name for path in (tmp_path / "runs/first").iterdir()}
    assert "10th percentile" in printed[1] and json.loads(printed[2])["round"] == 1
    assert f"test_accuracy: {run['final']['test_accuracy']:.4f}\n" in printed[4]
    answer = json.loads(printed[5])
    assert answer["label"] == "matplotlib" and answer["probabilities"]["matplotlib"] > 0.3
    other = json.loads((tmp_path / "runs/second/summary.json").read_text())
    share = 2 * other["bytes"]["uplink_bytes"] / run["bytes"]["uplink_bytes"]
    assert 0.45 < share < 0.55  # half of the bytes


def file_names(text: str) -> list[str]:
    """Return the names in the table of the run's files."""
    rows = text.partition("| file | content |")[2].partition("\n\n")[0].splitlines()[2:]
    return [name.strip(" `/") for row in rows for name in row.split("|")[1].split(",")]
