"""Each client alone, all data in one place, and the proximal term between them."""

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
    """(client, round, trainable values before, and after) of each training."""
    seen: list[tuple[int, int, State, State]] = []
    train_client = Engine.train_client

    def watch(session: Engine, job: Job, round: int) -> Result:
        result = train_client(session, job, round)
        seen.append((job.client, round, dict(job.start), result.after))
        return result

    monkeypatch.setattr(Engine, "train_client", watch)
    return seen


def equal(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("method", ["lora", "fedsa_lora"])
def test_local_only_sends_nothing_and_goes_on_where_it_stopped(
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
    assert "test_accuracy" not in summary["final"]  # there is no model of all


def test_centralized_trains_one_model_on_all_rows(
    run: Runner, opened: Any, trained: list[tuple[int, int, State, State]]
) -> None:
    summary = run("strategy=centralized", "evaluation.clients=always", "clients_per_round=2")
    session = opened("strategy=centralized")
    own = [session.rows.client_examples(client) for client in range(3)]
    rows = np.concatenate([examples["train"].rows for examples in own])
    assert len(np.unique(rows)) == len(rows)
    sent = run.recorder.of("train")
    assert [(e.client, e.round) for e in sent] == [(0, 1), (0, 2)]
    for exchange in sent:
        metrics = exchange.up.content.metric_records["metrics"]
        assert metrics["num-examples"] == len(rows)
        assert metrics["num-steps"] == 2 * 2  # local_steps of each of the cohort's two
    assert np.array_equal(session.rows.training(0)[0].rows, rows)
    assert equal(trained[1][2], trained[0][3])
    asked = run.recorder.of("evaluate")  # measured on each client's own rows
    assert [e.client for e in asked] == [0, 1, 2] * 3
    for exchange in asked:
        metrics = exchange.up.content.metric_records["metrics"]
        assert metrics["validation-num-examples"] == len(own[exchange.client]["validation"])
    assert {"test_accuracy", "client_test_accuracy"} <= summary["final"].keys()


@pytest.mark.parametrize(("method", "epochs"), [("fedsa_lora", 2), ("feddpa", 1)])
def test_centralized_has_nothing_personal(
    method: str, epochs: int, run: Runner, opened: Any
) -> None:
    """Clients are measured with the one model; it takes the mean cohort's share of the epochs."""
    given = [f"method={method}", "strategy=centralized", "evaluation.clients=always"]
    given += ["clients_per_round=1", "local_steps=null", f"local_epochs={epochs}"]
    summary = run(*given)
    session = opened(*given)
    assert not session.replica.roles.has_personal
    rows = len(session.rows.training(0)[0])
    for exchange in run.recorder.of("train"):
        steps = exchange.up.content.metric_records["metrics"]["num-steps"]
        phases = len(session.config.method.phases(At(1, 0, 2)))  # each takes so many steps
        assert steps == phases * round(-(-rows // 8) * epochs / 3)
    assert summary["final"]["client_test_loss"] == pytest.approx(client_loss(session, run.saved()))


def client_loss(session: Engine, state: State) -> float:
    """Of one model on the clients' test rows."""
    session.replica.load(state)
    own = [session.rows.client_examples(client)["test"] for client in range(3)]
    losses = [session.evaluate(examples)["loss"] for examples in own]
    return float(np.average(losses, weights=[len(examples) for examples in own]))


@pytest.mark.parametrize("method", ["flora", "fedex_lora", "fedsvd", "lora", "fedtt_plus"])
def test_clients_measure_what_the_server_has(method: str, run: Runner, opened: Any) -> None:
    """Also what it set in the last round, which no training would ever send."""
    given = [f"method={method}", "num_rounds=1", "evaluation.clients=always", "lr=0.03"]
    summary = run(*given)
    session = opened(*given)
    assert summary["final"]["client_test_loss"] == pytest.approx(client_loss(session, run.saved()))
    assert summary["final"]["client_test_loss"] != summary["initial"]["client_validation_loss"]


def test_sparse_rounds_alone_are_refused(run: Runner) -> None:
    with pytest.raises(ValueError, match="sparse_rounds must be < num_rounds=2, .* got 2"):
        run("method=slora", "method.sparse_rounds=2")


def test_clients_measure_lora_after_the_sparse_rounds(run: Runner, opened: Any) -> None:
    given = ["method=slora", "evaluation.clients=always"]
    run(*given)
    session = opened(*given)
    at = run.recorder.of("evaluate", 2)[0].down_state()
    assert any(at[name].any() for name in at if ".lora_B." in name)
    line = run.lines()[1]
    assert line["client_test_loss"] == pytest.approx(client_loss(session, at))


def test_fedprox_by_hand() -> None:
    """Gradient 1 at theta = 3, received 1, mu = 0.5: 1 + 0.5 * 2."""
    parameter, other = nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([7.0]))
    parameter.grad, other.grad = torch.tensor([1.0]), torch.tensor([1.0])
    term = FedProx(proximal_mu=0.5).term({"a": torch.tensor([1.0])}, {}, {})
    term.correct({"a": parameter, "personal": other})
    assert (parameter.grad.item(), other.grad.item()) == (2.0, 1.0)
    assert term.finish({}, 1, 0.1) == ({}, {})
    with pytest.raises(ValueError, match="proximal_mu must be > 0, got 0"):
        FedProx(proximal_mu=0.0)


def test_fedprox_keeps_clients_nearer(run: Runner) -> None:
    def moved(*overrides: str) -> float:
        run("num_rounds=1", "local_steps=8", "optimizer.name=sgd", "lr=0.5", *overrides)
        return run.lines()[1]["update_norm_mean"]

    free = moved()
    assert moved("strategy=fedprox", "strategy.proximal_mu=1e-6") == pytest.approx(free, rel=1e-3)
    assert moved("strategy=fedprox", "strategy.proximal_mu=1.0") < 0.8 * free
