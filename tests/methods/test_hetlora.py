"""HetLoRA's ranks shrink where a client's last components lose weight."""

from typing import Any

import pytest
import torch
from torch import nn

from fedpeft.config.load import load_config
from fedpeft.engine.engine import Engine
from fedpeft.engine.parameters import check_on_meta
from fedpeft.engine.plan import Job
from fedpeft.methods.base import At, Memory, Round
from fedpeft.methods.hetlora import HetLoRA, TailPenalty
from fedpeft.state import State, sha256
from tests.conftest import Runner

SITE = "x"
A, B = f"{SITE}.lora_A.default.weight", f"{SITE}.lora_B.default.weight"


def pair(tail: float) -> State:
    """Return factors of rank 4 whose last two components have products of norm ``tail``."""
    a, b = torch.zeros(4, 3), torch.zeros(5, 4)
    a[:2, 0], b[0, :2] = 1.0, 1.0
    a[2, 0], b[0, 2] = tail, 1.0
    return {A: a, B: b}


def round_of(method: HetLoRA, memory: Memory, tails: dict[int, float]) -> Round:
    ats = [At(1, client, 2, method.down(memory, At(1, client))) for client in tails]
    states = [pair(tail) for tail in tails.values()]
    weights = [1 / len(states)] * len(states)
    return Round(1, ats, states, weights, pair(0.5), memory=memory)


def test_a_rank_shrinks_if_the_tail_lost_weight() -> None:
    method, memory = HetLoRA(rank=4, prune=0.5), Memory()
    method.aggregate(round_of(method, memory, {0: 0.4, 1: 0.6, 2: 0.5}))
    ranks = [int(method.down(memory, At(2, client))["rank"]) for client in range(4)]
    assert ranks == [2, 4, 4, 4]  # the tail of client 0 alone is lighter than .5
    at = At(2, 0, memory=method.down(memory, At(2, 0)))
    assert tuple(method.block(A, (4, 3), at)) == (2, 3)
    assert tuple(method.block(B, (5, 4), at)) == (5, 2)


def test_one_component_always_stays() -> None:
    method = HetLoRA(rank=4, ranks=[1], prune=0.5)
    assert method.pruned(1) == 1 and method.pruned(3) == 1 and method.pruned(4) == 2
    memory = Memory()
    method.aggregate(round_of(method, memory, {0: 0.4}))
    assert int(method.down(memory, At(2, 0))["rank"]) == 1


def test_without_pruning_nothing_is_sent_or_remembered() -> None:
    method, memory = HetLoRA(rank=4), Memory()
    assert method.down(memory, At(1, 0)) == {}
    method.aggregate(round_of(method, memory, {0: 0.1}))
    assert memory == {}


def test_the_penalty_is_the_gradient_of_the_tails_norms() -> None:
    draws = torch.Generator().manual_seed(0)
    a = nn.Parameter(torch.randn(4, 3, generator=draws))
    b = nn.Parameter(torch.randn(5, 4, generator=draws))
    (0.3 * b[:, 1:3].norm() * a[1:3].norm()).backward()
    assert a.grad is not None and b.grad is not None
    expected = a.grad.clone(), b.grad.clone()
    a.grad.zero_()
    b.grad.zero_()
    TailPenalty(0.3, 1, 3).correct({A: a, B: b})
    torch.testing.assert_close((a.grad, b.grad), expected)


def test_equal_ranks_and_weights_by_examples_are_lora(run: Runner) -> None:
    run("method=lora")
    expected = sha256(run.saved())
    run("method=hetlora", "method.weighting=examples")
    assert sha256(run.saved()) == expected
    run("method=hetlora", "method.weighting=examples", "method.prune=0.5")
    assert sha256(run.saved()) != expected  # the penalty pulls


def test_ranks_shrink_in_a_run(run: Runner) -> None:
    """A client sends the block that the server told it to train, and later rounds send less."""
    run("method=hetlora", "method.prune=0.5", "method.penalty=1", "num_rounds=6", "lr=0.05")
    ranks: dict[int, list[int]] = {}
    for exchange in run.recorder.of("train"):
        down, up = exchange.down_state(), exchange.up_state()
        (rank,) = {v.shape[0] for n, v in up.items() if ".lora_A." in n}
        assert int(down["method:rank"]) == rank
        assert {v.shape[1] for n, v in down.items() if ".lora_B." in n} == {rank}
        ranks.setdefault(exchange.client, []).append(rank)
    assert all(by_round == sorted(by_round, reverse=True) for by_round in ranks.values())
    assert min(by_round[-1] for by_round in ranks.values()) < 4
    lines = run.lines()
    assert lines[6]["uplink_payload_bytes"] < lines[1]["uplink_payload_bytes"]


def test_moments_beyond_a_rank_that_shrank_are_gone(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW would train entries that the client no longer has."""
    jobs: list[Job] = []
    train = Engine.train_client

    def noting(engine: Engine, job: Job) -> Any:
        jobs.append(job)
        return train(engine, job)

    monkeypatch.setattr(Engine, "train_client", noting)
    shrinking = ("method=hetlora", "method.prune=0.5", "method.penalty=1", "lr=0.05")
    run(*shrinking, "num_rounds=6", "optimizer.keep_state=true")
    shrunk = [(int(j.at.memory["rank"]), j.moments) for j in jobs if j.at.memory["rank"] < 4]
    beyond = [
        value[rank:]
        for rank, moments in shrunk
        for key, value in moments.items()
        if key.startswith("exp_avg") and ".lora_A." in key
    ]
    assert beyond and not any(value.any() for value in beyond)


def test_wrong_values() -> None:
    with pytest.raises(ValueError, match=r"prune must be in \(0, 1\], got 0"):
        HetLoRA(prune=0.0)
    with pytest.raises(ValueError, match="penalty must be >= 0, got -1"):
        HetLoRA(penalty=-1.0)


def test_one_model_has_no_rank_that_shrinks() -> None:
    base = ["strategy=centralized", "method=hetlora", "method.rank=4"]
    check_on_meta(load_config([*base, "method.prune=1"]))
    with pytest.raises(ValueError, match="Centralized trains one whole model, but .* HetLoRA"):
        check_on_meta(load_config([*base, "method.prune=0.9"]))
