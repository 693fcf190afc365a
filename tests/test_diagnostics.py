"""Drift by hand; interference and initial errors are tested with the methods."""

import pytest
import torch

from fedpeft.server import diagnostics
from fedpeft.server.diagnostics import drift
from tests.conftest import Runner


def test_norms_and_cosine_over_all_parameters() -> None:
    before = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([[0.0]]), "rests": torch.ones(3)}
    states = [
        {"a": torch.tensor([4.0, 1.0]), "b": torch.tensor([[4.0]])},  # (3, 0, 4)
        {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([[10.0]])},  # (0, 0, 10)
    ]
    measures = drift([before] * len(states), states)
    assert measures["update_norm_mean"] == 7.5
    assert measures["update_norm_std"] == 2.5
    assert measures["update_cosine"] == pytest.approx(0.8, abs=1e-12)


def test_blocks_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    before = {"a": torch.randn(3, 5), "b": torch.randn(4)}
    states = [{name: torch.randn_like(v) for name, v in before.items()} for _ in range(3)]
    whole = drift([before] * len(states), states)
    monkeypatch.setattr(diagnostics, "BLOCK", 4)
    assert drift([before] * len(states), states) == pytest.approx(whole, rel=1e-12)


def test_fewer_than_two_updates_have_no_cosine() -> None:
    before = {"a": torch.tensor([1.0])}
    assert drift([before], [{"a": torch.tensor([3.0])}]) == {
        "update_norm_mean": 2.0,
        "update_norm_std": 0.0,
    }
    assert "update_cosine" not in drift([before] * 2, [before, {"a": torch.tensor([2.0])}])
    assert drift([before], [{}, {}]) == {}


def test_a_client_moves_from_its_own_block(run: Runner) -> None:
    """Entries that a client of a lower rank does not hold are no update of it."""
    run("method=hetlora", "method.ranks=[1,2,3]", "num_rounds=1")
    sent = run.recorder.of("train", 1)
    squares = [
        sum(float((e.up_state()[n] - v).square().sum()) for n, v in e.down_state().items())
        for e in sent
    ]
    norms = [square**0.5 for square in squares]
    assert run.lines()[1]["update_norm_mean"] == pytest.approx(sum(norms) / 3, rel=1e-5)
