"""The reported round is chosen on validation rows; test rows never choose."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from fedpeft.config.load import load_config
from fedpeft.config.schema import Checkpointing
from fedpeft.data.batching import Examples
from fedpeft.engine.engine import Engine
from fedpeft.reporting.run_directory import RunDirectory
from fedpeft.server.run import Run
from fedpeft.server.strategy import FederatedPEFT
from tests.conftest import Runner, quiet

# By round: validation would choose round 1, test round 2, and the losses round 0.
VALIDATION = (0.2, 0.9, 0.5)
TEST = (0.1, 0.3, 0.95)


@pytest.fixture
def selecting(opened: Callable[..., Engine], tmp_path: Path) -> Callable[..., Run]:
    """``selecting("method=lora")`` gives a run whose lines a test writes by hand."""

    def make(*overrides: str) -> Run:
        directory = RunDirectory(str(tmp_path / "run"), OmegaConf.create({}))
        display = quiet()
        display.start("x", 5)
        strategy = FederatedPEFT("", opened(*overrides))
        return Run(strategy, directory, Checkpointing(), display)

    return make


def select(run: Run, lines: list[dict[str, Any]]) -> None:
    run.strategy.observer = run
    for line in lines:
        run.strategy.down.state = {"w": torch.tensor([float(line["round"])])}
        run.strategy.report(line | {"seconds": 0.0})


def test_less_may_be_better(selecting: Callable[..., Run]) -> None:
    run = selecting("data.less_is_better=[accuracy]")
    select(run, [{"round": r, "validation_accuracy": VALIDATION[r]} for r in (1, 0, 2)])
    assert run.selection.best["round"] == 0
    signs = [run.engine.task.sign(n) for n in ("accuracy", "f1_macro", "loss", "baseline")]
    assert signs == [-1, 1, -1, -1]  # the baseline is an accuracy


def test_only_metrics_of_the_task_have_a_direction() -> None:
    says = "data.less_is_better must be of accuracy, f1_macro, got mse"
    with pytest.raises(ValueError, match=says):
        load_config(["data=sst2", "data.metrics=[accuracy,f1_macro]", "data.less_is_better=[mse]"])


def test_validation_chooses(selecting: Callable[..., Run]) -> None:
    run = selecting()
    assert run.selection.name == "validation_accuracy"
    select(
        run,
        [
            {
                "round": r,
                "validation_accuracy": VALIDATION[r],
                "test_accuracy": TEST[r],
                "client_validation_accuracy": TEST[r],
                "client_test_accuracy": TEST[r],
                "validation_loss": r,
            }
            for r in range(3)
        ],
    )
    assert run.selection.best["round"] == 1 and run.best_state["w"].item() == 1.0


def test_the_clients_validation_chooses_where_parameters_are_personal(
    selecting: Callable[..., Run],
) -> None:
    run = selecting("method=fedsa_lora")
    assert run.selection.name == "client_validation_accuracy"
    select(
        run,
        [
            {
                "round": r,
                "client_validation_accuracy": VALIDATION[r],
                "client_test_accuracy": TEST[r],
                "validation_accuracy": TEST[r],
            }
            for r in range(3)
        ],
    )
    assert run.selection.best["round"] == 1 and run.best_state["w"].item() == 1.0


def test_the_earlier_of_equals_and_rounds_without_a_value(selecting: Callable[..., Run]) -> None:
    run = selecting()
    values = [None, 0.5, 0.7, None, 0.7, 0.6]
    select(
        run,
        [
            {"round": r} | ({} if v is None else {"validation_accuracy": v})
            for r, v in enumerate(values)
        ],
    )
    assert run.selection.best["round"] == 2 and run.best_state["w"].item() == 2.0


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put accuracies by round in place of measured ones, and note the splits that are measured."""
    measured: list[str] = []

    def evaluate(engine: Engine, examples: Examples, *_: Any, **__: Any) -> dict[str, float]:
        # 40 rows each; the table's first test row stands only there
        split = "test" if examples is engine.rows.examples("test") else "validation"
        measured.append(split)
        round = measured.count("validation") - 1
        script = VALIDATION if split == "validation" else TEST
        return {"accuracy": script[min(round, 2)], "loss": 1.0}

    monkeypatch.setattr(Engine, "evaluate", evaluate)
    return measured


def test_a_run_tests_only_its_last_and_its_best_round(run: Runner, scripted: list[str]) -> None:
    run("num_rounds=1", "seed=4")
    after_one = run.saved()
    scripted.clear()
    summary = run("seed=4")
    assert scripted == ["validation"] * 3 + ["test"] * 2
    assert summary["selected_by"] == "validation_accuracy"
    assert summary["best"]["round"] == 1 and summary["best"]["validation_accuracy"] == 0.9
    assert summary["final"]["round"] == 2 and summary["final"]["validation_accuracy"] == 0.5
    assert not any("test_accuracy" in line for line in run.lines())
    best = run.saved("best_shared_state")
    assert all(torch.equal(best[name], after_one[name]) for name in after_one)
    assert any(not torch.equal(best[name], value) for name, value in run.saved().items())


def test_the_best_state_s_test_numbers_are_those_of_that_state(run: Runner) -> None:
    """In a real run, the best round's state scores what the summary says when it is loaded."""
    summary = run("num_rounds=3", "lr=0.02", "local_steps=10", "seed=4")
    engine = Engine(load_config([*run.base, "method.rank=4", "seed=4"]))
    for name, key in (("best_shared_state", "best"), ("shared_state", "final")):
        engine.replica.load(run.saved(name))
        metrics = engine.evaluate(engine.rows.examples("test"))
        assert summary[key]["test_loss"] == metrics["loss"]
        assert summary[key]["test_accuracy"] == metrics["accuracy"]
    best = max(run.lines(), key=lambda line: line["validation_accuracy"])
    assert summary["best"]["round"] == best["round"] != 3


def test_when_no_training_helps_the_initial_state_is_the_best(
    run: Runner, opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def evaluate(engine: Engine, examples: Examples, *_: Any, **__: Any) -> dict[str, float]:
        calls.append(1)
        return {"accuracy": 1 / len(calls), "loss": 1.0}

    monkeypatch.setattr(Engine, "evaluate", evaluate)
    summary = run("method.rank=4")
    assert summary["best"]["round"] == 0
    initial = opened("method.rank=4").replica.initial
    best = run.saved("best_shared_state")
    assert best.keys() == initial.keys()
    assert all(torch.equal(best[name], initial[name]) for name in initial)


def test_personal_runs_choose_by_the_clients(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients measure validation and test in turns; test rows would choose another round."""
    count = 0

    def evaluate(engine: Engine, examples: Examples, *_: Any, **__: Any) -> dict[str, float]:
        nonlocal count
        round, of_round = divmod(count, 6)  # three clients, two splits
        count += 1
        return {"accuracy": (VALIDATION, TEST)[of_round % 2][round], "loss": 1.0}

    monkeypatch.setattr(Engine, "evaluate", evaluate)
    summary = run("method=fedsa_lora")
    assert count == 18
    assert summary["best"]["round"] == 1
    assert summary["best"]["client_validation_accuracy"] == pytest.approx(0.9)
    assert summary["best"]["client_test_accuracy"] == pytest.approx(0.3)
    assert summary["final"]["client_test_accuracy"] == pytest.approx(0.95)
