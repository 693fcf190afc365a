"""Bounds on federated training: each client alone, all data in one place; and FedProx."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedpeft.algorithms.fedprox import FedProx
from fedpeft.engine.engine import Engine, Result
from fedpeft.engine.plan import Job
from fedpeft.methods.base import At
from fedpeft.state import State
from tests.conftest import Runner


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, State, State]]:
    """Client, round, trainable values before and after of each training of the run."""
    seen: list[tuple[int, int, State, State]] = []
    train_client = Engine.train_client

    def watch(engine: Engine, job: Job) -> Result:
        result = train_client(engine, job)
        seen.append((job.client, job.at.round, dict(job.start), result.after))
        return result

    monkeypatch.setattr(Engine, "train_client", watch)
    return seen


def equal(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("method", ["lora", "fedsa_lora"])
def test_local_only_sends_nothing_and_goes_on_from_the_last_round(
    method: str, run: Runner, trained: list[tuple[int, int, State, State]]
) -> None:
    summary = run(f"method={method}", "strategy=local_only")
    for exchange in run.recorder.of("train"):
        assert exchange.up_state() == {} == exchange.down_state()
    assert summary["bytes"]["uplink_payload_bytes"] == 0
    assert summary["bytes"]["downlink_payload_bytes"] == 0
    assert summary["parameters"]["sent_up"] == summary["parameters"]["sent_down"] == [0, 0]
    assert summary["parameters"]["trained"][0] > 0
    ends = {client: after for client, round, _, after in trained if round == 1}
    starts = {client: before for client, round, before, _ in trained if round == 2}
    assert all(equal(starts[client], ends[client]) for client in (0, 1, 2))
    assert not equal(ends[0], ends[1])
    assert 0 <= summary["final"]["client_test_accuracy"] <= 1
    assert "test_accuracy" not in summary["final"]  # because there is no common model


def test_centralized_trains_one_model_on_all_rows(
    run: Runner, opened: Any, trained: list[tuple[int, int, State, State]]
) -> None:
    summary = run("strategy=centralized", "evaluation.clients=always", "clients_per_round=2")
    engine = opened("strategy=centralized")
    by_client = [engine.rows.client_examples(client) for client in range(3)]
    rows = np.concatenate([examples["train"].rows for examples in by_client])
    assert len(np.unique(rows)) == len(rows)
    sent = run.recorder.of("train")
    assert [(e.client, e.round) for e in sent] == [(0, 1), (0, 2)]
    for exchange in sent:
        metrics = exchange.up.content.metric_records["metrics"]
        assert metrics["num-examples"] == len(rows)
        assert metrics["num-steps"] == 2 * 2  # local_steps=2 of each of two clients a round
    assert np.array_equal(engine.rows.training(0)[0].rows, rows)
    assert equal(trained[1][2], trained[0][3])
    evaluations = run.recorder.of("evaluate")
    assert [e.client for e in evaluations] == [0, 1, 2] * 3
    for exchange in evaluations:
        metrics = exchange.up.content.metric_records["metrics"]
        assert metrics["validation-num-examples"] == len(by_client[exchange.client]["validation"])
    assert {"test_accuracy", "client_test_accuracy"} <= summary["final"].keys()


@pytest.mark.parametrize(("method", "epochs"), [("fedsa_lora", 2), ("feddpa", 1)])
def test_centralized_has_nothing_personal(
    method: str, epochs: int, run: Runner, opened: Any
) -> None:
    """All clients evaluate the one model, and a round takes one of three clients' epochs."""
    overrides = [f"method={method}", "strategy=centralized", "evaluation.clients=always"]
    overrides += ["clients_per_round=1", "local_steps=null", f"local_epochs={epochs}"]
    summary = run(*overrides)
    engine = opened(*overrides)
    assert not engine.replica.roles.has_personal
    rows = len(engine.rows.training(0)[0])
    for exchange in run.recorder.of("train"):
        steps = exchange.up.content.metric_records["metrics"]["num-steps"]
        phases = len(engine.config.method.phases(At(1, 0, 2)))
        assert steps == phases * round(-(-rows // 8) * epochs / 3)
    assert summary["final"]["client_test_loss"] == pytest.approx(client_loss(engine, run.saved()))


def client_loss(engine: Engine, state: State) -> float:
    """Return one model's mean loss on the clients' test rows."""
    engine.replica.load(state)
    by_client = [engine.rows.client_examples(client)["test"] for client in range(3)]
    losses = [engine.evaluate(examples)["loss"] for examples in by_client]
    return float(np.average(losses, weights=[len(examples) for examples in by_client]))


@pytest.mark.parametrize("method", ["flora", "fedex_lora", "fedsvd", "lora", "fedtt_plus"])
def test_clients_evaluate_the_server_s_model(method: str, run: Runner, opened: Any) -> None:
    """They also receive values that the server set in the last round, which no training gets."""
    overrides = [f"method={method}", "num_rounds=1", "evaluation.clients=always", "lr=0.03"]
    summary = run(*overrides)
    loss = client_loss(opened(*overrides), run.saved())
    assert summary["final"]["client_test_loss"] == pytest.approx(loss)
    assert summary["final"]["client_test_loss"] != summary["initial"]["client_validation_loss"]


def test_sparse_rounds_alone_are_refused(run: Runner) -> None:
    with pytest.raises(ValueError, match="sparse_rounds must be < num_rounds=2, .* got 2"):
        run("method=slora", "method.sparse_rounds=2")


def test_clients_evaluate_lora_after_the_sparse_rounds(run: Runner, opened: Any) -> None:
    overrides = ["method=slora", "evaluation.clients=always"]
    run(*overrides)
    state = run.recorder.of("evaluate", 2)[0].down_state()
    assert any(state[name].any() for name in state if ".lora_B." in name)
    loss = client_loss(opened(*overrides), state)
    assert run.lines()[1]["client_test_loss"] == pytest.approx(loss)


def test_fedprox_by_hand() -> None:
    """At theta = 3, received as 1, mu = 0.5 makes a gradient of 1 one of 1 + 0.5 * 2."""
    parameter, personal = nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([7.0]))
    parameter.grad, personal.grad = torch.tensor([1.0]), torch.tensor([1.0])
    term = FedProx(proximal_mu=0.5).term({"a": torch.tensor([1.0])}, {}, {})
    term.correct({"a": parameter, "personal": personal})
    assert (parameter.grad.item(), personal.grad.item()) == (2.0, 1.0)
    assert term.finish({}, 1, 0.1) == ({}, {})


def test_proximal_mu_outside_its_rule() -> None:
    with pytest.raises(ValueError, match="proximal_mu must be > 0, got 0"):
        FedProx(proximal_mu=0.0)


def test_fedprox_keeps_clients_nearer(run: Runner) -> None:
    def update_norm(*overrides: str) -> float:
        run("num_rounds=1", "local_steps=8", "optimizer.name=sgd", "lr=0.5", *overrides)
        return run.lines()[1]["update_norm_mean"]

    free = update_norm()
    weak = update_norm("strategy=fedprox", "strategy.proximal_mu=1e-6")
    assert weak == pytest.approx(free, rel=1e-3)
    assert update_norm("strategy=fedprox", "strategy.proximal_mu=1.0") < 0.8 * free
