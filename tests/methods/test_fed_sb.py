"""Fed-SB starts from the first gradient of full fine-tuning."""

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft.engine.engine import Engine
from fedpeft.engine.server_model import EngineModel
from fedpeft.methods.base import At
from fedpeft.methods.fed_sb import FedSB
from fedpeft.nn.cores import CoreAdapter
from fedpeft.state import Role, State
from tests.conftest import Runner

ONE = ("method=fed_sb", "method.start_batches=1", "method.start_batch_size=8", "lr=0.01")


def test_round_0_measures_the_start(run: Runner, opened: Callable[..., Engine]) -> None:
    given = (*ONE, "method.start_lr=0.05", "num_rounds=1")
    run(*given)
    engine = opened(*given)
    rows = engine.rows.examples("validation")
    engine.replica.load(engine.config.method.start(EngineModel(engine)))
    started = engine.evaluate(rows)["loss"]
    engine.replica.load()
    assert run.lines()[0]["validation_loss"] == pytest.approx(started, rel=1e-6)
    assert abs(started - engine.evaluate(rows)["loss"]) > 1e-3


def test_the_start_is_the_best_approximation_of_adamws_first_step(
    opened: Callable[..., Engine],
) -> None:
    engine = opened(*ONE)
    server, method = EngineModel(engine), engine.config.method
    started = method.start(server)
    (batch,) = islice(server.batches(8, "start"), 1)
    sites = [n for n, m in engine.replica.model.named_modules() if isinstance(m, CoreAdapter)]
    assert len(sites) == 4
    engine.replica.load()  # without the start, and in evaluation mode
    model = engine.replica.model.eval()
    weights = [model.get_parameter(f"{site}.base_layer.weight") for site in sites]
    for weight in weights:
        weight.requires_grad_(True)
    loss = engine.task.loss(engine.task.forward(model, batch), batch)
    for site, gradient in zip(sites, torch.autograd.grad(loss, weights), strict=True):
        u, s, v = torch.linalg.svd(-0.01 * gradient.double().sign())
        best = (u[:, :8] * s[:8]) @ v[:8]
        b, a = started[f"{site}.basis_out"], started[f"{site}.basis_in"]
        product = b @ started[f"{site}.core"][0] @ a
        torch.testing.assert_close(product.double(), best, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(a @ a.T, torch.eye(8), rtol=0, atol=1e-5)
        assert best.norm() > 0.03


def test_the_server_s_batches_are_of_validation_rows(opened: Callable[..., Engine]) -> None:
    """There are 40, so five batches of eight are all of them; test rows never train."""
    engine = opened("method=fed_sb")

    def texts(batch: Mapping[str, Any]) -> set[tuple[int, ...]]:
        return {tuple(token for token in row if token) for row in batch["input_ids"].tolist()}

    rows = {s: texts(engine.rows.examples(s).batch(np.arange(40))) for s in ("validation", "test")}
    batches = islice(EngineModel(engine).batches(8, "start"), 5)
    assert set().union(*map(texts, batches)) == rows["validation"] != rows["test"]


def test_the_first_gradient_is_that_of_all_batches(opened: Callable[..., Engine]) -> None:
    quiet = "model.settings={hidden_dropout_prob:0,attention_probs_dropout_prob:0}"

    def started(batches: int, size: int) -> State:
        sizes = (f"method.start_batches={batches}", f"method.start_batch_size={size}")
        engine = opened("method=fed_sb", *sizes, quiet)
        return engine.config.method.start(EngineModel(engine))

    four, one = started(4, 10), started(1, 40)
    cores = [name for name in one if name.endswith(".core")]
    assert len(cores) == 4
    for name in cores:
        torch.testing.assert_close(four[name], one[name], rtol=1e-2, atol=1e-6)


def test_bases_are_received_before_round_1_and_frozen_afterwards() -> None:
    method = FedSB()
    names = ("x.basis_in", "x.basis_out", "x.core", "classifier.weight")
    at_start = [method.role(name, At(0)) for name in names]
    assert at_start == [Role.RECEIVED] * 3 + [Role.FROZEN]
    later = [method.role(name, At(1)) for name in names]
    assert later == [Role.FROZEN] * 2 + [Role.SHARED] * 2


def test_clients_get_the_bases_and_send_the_cores(run: Runner) -> None:
    summary = run(*ONE)
    assert summary["refused"] == {}
    for exchange in run.recorder.of("train"):
        down, up = exchange.down_state(), exchange.up_state()
        assert sum(".basis_" in name for name in down) == 8
        assert up and not any(".basis_" in name for name in up)
    assert all(value < 1e-5 for value in summary["interference"])  # the mean of R is exact
    first = run.recorder.of("train", 1)[0].down_state()
    assert any(v.abs().max() > 0 for n, v in first.items() if n.endswith(".core"))


@pytest.mark.parametrize("init", ["svd", "orthogonal"])
def test_starts_that_every_client_computes_send_no_bases(init: str, run: Runner) -> None:
    run("method=fed_sb", f"method.init={init}")
    first = run.recorder.of("train", 1)[0].down_state()
    cores = [value for name, value in first.items() if name.endswith(".core")]
    assert len(cores) == 4 and not any(core.any() for core in cores)
    assert not any(".basis_" in name for name in first)


def test_wrong_values() -> None:
    with pytest.raises(ValueError, match="init must be one of gradient, svd, orthogonal, got x"):
        FedSB(init="x")
    with pytest.raises(ValueError, match="start_lr must be > 0, got 0"):
        FedSB(start_lr=0.0)
