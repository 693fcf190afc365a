"""A run ends early when validation rows say so, with the same bits however often it is resumed."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft.config.load import load_config
from fedpeft.data.batching import Examples
from fedpeft.engine.engine import Engine
from fedpeft.reporting.clients import read_clients
from fedpeft.reporting.progress import summary_text
from fedpeft.reporting.run_files import read_metrics
from fedpeft.server.run import Run
from fedpeft.server.selection import Selection
from fedpeft.server.strategy import FederatedPEFT
from fedpeft.simulation.launch import run as run_here
from tests.conftest import Runner, Stopping, without_time

# --- by lines ------------------------------------------------------------------------------------


def rounds_of(patience: int | None, sign: int, values: list[Any]) -> tuple[int, Selection]:
    """Add rounds until the run would end; return the last one's number and the selection.

    Args:
        patience: the selection's patience; null if no round ends the run early.
        sign: 1 if more is better, -1 if less.
        values: the measure by round; ``...`` for a round that is not evaluated.
    """
    selection = Selection("m", sign, patience)
    for number, value in enumerate(values):
        line = {"round": number} | ({} if value is ... else {"m": value})
        last = selection.is_last(line)
        selection.add(line)
        assert last == bool(selection.stopped)
        if last:
            return number, selection
    return len(values) - 1, selection


@pytest.mark.parametrize(
    ("patience", "sign", "values", "last", "best"),
    [
        (1, 1, [0.2, 0.9, 0.5, 0.95], 2, 1),
        (2, 1, [0.2, 0.9, 0.5, 0.95], 3, 3),
        (2, 1, [0.2, 0.9, 0.9, 0.9, 1.0], 3, 1),  # equal is not better
        (2, 1, [0.2, ..., 0.1, ..., 0.1, 0.1], 4, 0),  # evaluations count, not rounds
        (1, -1, [3.0, 2.0, 2.5, 1.0], 2, 1),
        (2, -1, [3.0, math.nan, None, 1.0], 2, 0),  # diverged is not better
        (None, 1, [0.9, 0.1, 0.1, 0.1, 0.1], 4, 0),
    ],
)
def test_the_run_ends_after_so_many_evaluations(
    patience: int | None, sign: int, values: list[Any], last: int, best: int
) -> None:
    number, selection = rounds_of(patience, sign, values)
    assert (number, selection.best["round"]) == (last, best)


def test_the_reason_names_what_was_measured() -> None:
    _, selection = rounds_of(2, 1, [0.25, 0.5, 0.125, 0.5])
    assert selection.stopped == (
        "in 2 evaluations m was not better than 0.5000 of round 1 (early_stopping.patience=2)"
    )
    _, selection = rounds_of(1, 1, [math.nan])
    assert selection.stopped == (
        "in 1 evaluation m was not a finite number (early_stopping.patience=1)"
    )


# --- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize("patience", [0, -1])
def test_patience_must_be_a_count(base: list[str], patience: int) -> None:
    message = f"early_stopping.patience must be >= 1 or null, got {patience}"
    with pytest.raises(ValueError, match=message):
        load_config([*base, f"early_stopping.patience={patience}"])


def test_somebody_must_measure(run: Runner) -> None:
    with pytest.raises(
        ValueError,
        match="early_stopping.patience=3 waits for client_validation_accuracy, which nobody "
        "measures with evaluation.clients=never: set it to auto",
    ):
        run("method=fedsa_lora", "early_stopping.patience=3", "evaluation.clients=never")
    assert not run.recorder.exchanges


def test_a_method_that_needs_its_last_round_does_not_end_early(run: Runner) -> None:
    """FedDPA-F trains the personal adapters in the last round alone."""
    with pytest.raises(ValueError, match="before its last round, which this FedDPA needs"):
        run("method=feddpa", "method.variant=after", "early_stopping.patience=1")
    assert not run.recorder.exchanges
    run("method=feddpa", "method.variant=turns", "early_stopping.patience=1", "num_rounds=1")


def test_clients_are_not_told(run: Runner) -> None:
    """It is the server's choice, and a site's policy need not allow it."""
    run("method.rank=4", "num_rounds=1", "early_stopping.patience=1")
    for sent in run.recorder.exchanges:
        assert "early_stopping" not in str(sent.down.content.config_records["config"])


# --- runs ----------------------------------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Accuracy is 0.2, 0.9 and then 0.5 at each place; note for each call if it is the last one."""
    calls: dict[int, int] = {}
    lasts: list[bool] = []

    def evaluate(engine: Engine, rows: Examples, workers: int = 1, last: bool = False) -> Any:
        place = id(rows)
        count = calls[place] = calls.get(place, 0) + 1
        lasts.append(last)
        return {"accuracy": (0.2, 0.9, 0.5)[min(count, 3) - 1], "loss": 1.0}

    monkeypatch.setattr(Engine, "evaluate", evaluate)
    return lasts


@pytest.mark.usefixtures("scripted")
def test_a_run_that_ends_early_says_so_and_keeps_the_best_state(run: Runner) -> None:
    run("method.rank=4", "num_rounds=1")
    after_one = run.saved()
    given = ["method.rank=4", "num_rounds=9", "checkpoint.every=7", "early_stopping.patience=2"]
    summary = run(*given)
    assert [line["round"] for line in run.lines()] == [0, 1, 2, 3]
    assert summary["final"]["round"] == 3 and summary["best"]["round"] == 1
    reason = (
        "in 2 evaluations validation_accuracy was not better than 0.9000 of round 1 "
        "(early_stopping.patience=2)"
    )
    assert summary["stopped_early"] == {"round": 3, "reason": reason}
    assert f"ended early after round 3: {reason}" in summary_text(summary)
    best = run.saved("best_shared_state")
    assert all(torch.equal(best[name], after_one[name]) for name in after_one)
    assert (run.run_dir / "checkpoints/round_00003.safetensors").exists()


@pytest.mark.usefixtures("scripted")
def test_a_run_whose_last_round_ends_its_patience_had_all_rounds(run: Runner) -> None:
    summary = run("method.rank=4", "num_rounds=2", "early_stopping.patience=1")
    assert summary["final"]["round"] == 2 and summary["stopped_early"] is None


def test_clients_measure_once_more_what_only_the_last_evaluation_measures(
    run: Runner, scripted: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task may generate text in the last evaluation alone, which an early end makes this one."""
    monkeypatch.setattr("fedpeft.data.tasks.base.Task.generates", lambda self, last: last)
    summary = run("method=fedsa_lora", "method.rank=4", "num_rounds=9", "early_stopping.patience=1")
    assert summary["final"]["round"] == 2
    # Three clients with two splits each, of which the test rows alone are asked for more.
    assert scripted == [False] * 18 + [False, True] * 3
    line, rows = run.lines()[-1], read_clients(run.run_dir)
    sent = [row["evaluation_uplink_bytes"] for row in rows if row["round"] == 2]
    assert sum(sent) == line["evaluation_uplink_bytes"]
    assert line["evaluation_uplink_bytes"] == 2 * run.lines()[0]["evaluation_uplink_bytes"]


def test_flower_like_apps_end_early_too(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """``FederatedPEFT.start`` does it, without a run directory."""
    ended: list[int] = []
    monkeypatch.setattr(Run, "round_done", lambda self, line: ended.append(line["round"]))
    monkeypatch.setattr(Run, "summarize", lambda self: {})
    monkeypatch.setattr(
        FederatedPEFT,
        "_evaluate",
        lambda self, grid, round: {"validation_accuracy": 1 / (round + 1)},
    )
    run("method.rank=4", "num_rounds=9", "early_stopping.patience=2")
    assert ended == [0, 1, 2]


# --- broken off and gone on with -----------------------------------------------------------------


@pytest.fixture
def launched(base: list[str], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``launched("a", stop=2)`` runs in folder ``a``; it is best after round 1 and ends after 3."""
    given = [*base, "method=fedsa_lora", "method.rank=4", "seed=1", "lr=0.02", "num_rounds=9"]

    def launch(folder: str, *overrides: str, stop: int = -1) -> dict[str, Any]:
        whole = [*given, "early_stopping.patience=2", *overrides, f"run_dir={tmp_path / folder}"]
        return run_here(whole, Stopping(stop))

    return launch


def test_the_counter_survives_a_resume(
    launched: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off while it waits, and again between its end and its summary."""
    whole = launched("whole")
    assert whole["stopped_early"]["round"] == 3 and whole["best"]["round"] == 1
    with pytest.raises(KeyboardInterrupt):
        launched("broken", stop=3)
    with monkeypatch.context() as patched:

        def killed(run: Run) -> dict[str, Any]:
            raise KeyboardInterrupt

        patched.setattr(Run, "summarize", killed)
        with pytest.raises(KeyboardInterrupt):
            launched("broken", "resume=true")
    monkeypatch.setattr(Engine, "train", lambda self, jobs: pytest.fail("it trains again"))
    resumed = launched("broken", "resume=true")
    assert without_time(resumed) == without_time(whole)
    lines = [without_time(read_metrics(tmp_path / name)) for name in ("whole", "broken")]
    assert lines[0] == lines[1] and len(lines[0]) == 4
