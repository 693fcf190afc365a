"""FederatedPEFT is a Flower strategy: Flower's own start runs it, in anybody's ServerApp."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from flwr.serverapp.strategy import Strategy

from fedpeft.config.load import join
from fedpeft.engine.engine import open_engine
from fedpeft.server.strategy import FederatedPEFT
from fedpeft.simulation.grid import InProcessGrid, one_by_one
from fedpeft.state import sha256
from tests.conftest import TINY, Runner

EXAMPLE = Path(__file__).parent.parent / "docs" / "flower_app.py"


@pytest.mark.parametrize("method", ["lora", "fedsa_lora", "fedtt_plus", "fed_sb"])
def test_flowers_start_gives_the_same_state_as_ours(method: str, run: Runner) -> None:
    expected = run(f"method={method}")["shared_state_sha256"]
    overrides = join([*run.base, f"method={method}", *TINY.get(method, [])])
    open_engine.cache_clear()
    strategy, grid = FederatedPEFT(overrides), InProcessGrid(3)
    result = Strategy.start(strategy, grid, strategy.initial_arrays(), num_rounds=2)
    assert sha256(strategy.state) == expected
    assert result.train_metrics_clientapp.keys() == {1, 2}
    personal = method == "fedsa_lora"
    assert bool(result.evaluate_metrics_clientapp) is personal
    assert set(result.arrays) == set(strategy.state)


def test_arrays_of_somebody_else_are_the_start(run: Runner) -> None:
    overrides = join([*run.base, *TINY["lora"]])
    open_engine.cache_clear()
    first = FederatedPEFT(overrides)
    first.start(InProcessGrid(3), num_rounds=1)
    second = FederatedPEFT(overrides)
    second.start(InProcessGrid(3), first.arrays(), num_rounds=0)
    assert sha256(second.state) == sha256(first.state)
    assert second.values.keys() == first.values.keys()
    unknown = first.arrays()
    unknown["nobody.weight"] = next(iter(unknown.values()))
    with pytest.raises(ValueError, match=r"nobody.weight .* is no parameter of this method"):
        second.start(InProcessGrid(3), unknown, num_rounds=0)


def test_the_example_of_the_documentation(run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("flower_app", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    overrides = join([*run.base, *TINY["lora"]])
    open_engine.cache_clear()
    context = Context(1, 0, {}, RecordDict(), {"overrides": overrides})
    example.server(InProcessGrid(3, one_by_one(example.client)), context)
    # A and B of four modules at rank 4, and the head
    assert capsys.readouterr().out.endswith(f"rounds: {2 * 2 * 4 * 64 + 132}\n")
