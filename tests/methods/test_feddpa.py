"""FedDPA trains its two adapters in turns, never at once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from fedpeft.engine import engine as module
from fedpeft.engine.engine import Engine
from fedpeft.engine.plan import Job, plan
from fedpeft.methods.base import At
from fedpeft.methods.feddpa import ALONE, FedDPA
from fedpeft.state import Role, State
from tests.conftest import Runner

SGD = ("optimizer.name=sgd", "optimizer.max_grad_norm=null", "lr=0.05", "local_steps=1")
QUIET = "model.settings={hidden_dropout_prob:0,attention_probs_dropout_prob:0}"
A, B = ".lora_A.", ".lora_B."


def gradients(engine: Engine, values: State, setting: str, names: list[str]) -> State:
    """Return the gradients of client 0's first batch of a phase, by torch alone.

    Args:
        engine: holds the model.
        values: the parameters' values at which the gradients are taken.
        setting: the phase's setting.
        names: names of the parameters that train in the phase.
    """
    replica = engine.replica
    replica.load(values)
    replica.config.method.arrange(replica.model, setting)
    replica.set_trainable(set(names))
    replica.model.train()
    number = 1 if setting else 0
    path = [1, 0] + ([number] if number else [])
    (batch,) = plan(engine.config, *engine.rows.training(0), path).steps[0]
    loss = engine.task.loss(engine.task.forward(replica.model, batch), batch)
    parameters = [replica.model.get_parameter(name) for name in names]
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def random_start(engine: Engine) -> State:
    """Return values in which no factor is zero."""
    draws = torch.Generator().manual_seed(4)
    return {n: torch.randn(v.shape, generator=draws) / 8 for n, v in engine.replica.initial.items()}


def test_a_round_is_a_local_step_and_then_a_global_step(opened: Callable[..., Engine]) -> None:
    engine = opened("method=feddpa", QUIET, *SGD, "method.local_weight=0.3")
    start = random_start(engine)
    local = [name for name in start if ".own." in name]
    rest = [name for name in start if ".own." not in name]
    result = engine.train_client(Job(At(1, 0, 2), dict(start)))

    first = gradients(engine, start, "", local)
    between = start | {name: start[name] - 0.05 * first[name] for name in local}
    second = gradients(engine, between, ALONE, rest)
    expected = between | {name: between[name] - 0.05 * second[name] for name in rest}
    for name, value in expected.items():
        torch.testing.assert_close(result.after[name], value, rtol=1e-4, atol=1e-6)
    assert not torch.equal(expected[local[0]], start[local[0]])
    assert result.trained.steps == 1  # steps of the phase whose parameters are sent


def test_the_global_adapter_trains_at_full_scale_and_is_measured_mixed(
    opened: Callable[..., Engine],
) -> None:
    engine = opened("method=feddpa", "method.local_weight=0.3", "method.alpha=8")
    method, model = engine.config.method, engine.replica.model
    scales = {}
    for setting in (ALONE, ""):
        method.arrange(model, setting)
        layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
        scales[setting] = layer.scaling["shared"], layer.scaling["own"]
    assert scales[ALONE] == pytest.approx((2.0, 0.0))  # alpha / r = 8 / 4
    assert scales[""] == pytest.approx((1.4, 0.6))


def test_after_trains_the_local_adapter_in_the_last_round_alone() -> None:
    method = FedDPA(variant="after")
    local, shared = "x.lora_B.own.weight", "x.lora_B.shared.weight"
    for round, roles in {
        1: (Role.FROZEN, Role.SHARED),
        2: (Role.FROZEN, Role.SHARED),
        3: (Role.PERSONAL, Role.FROZEN),
    }.items():
        assert tuple(method.role(n, At(round, None, 3)) for n in (local, shared)) == roles
    with pytest.raises(ValueError, match="num_rounds must be >= 2, got 1"):
        method.check(1)
    with pytest.raises(ValueError, match="variant must be turns or after, got both"):
        FedDPA(variant="both")


def test_a_run_of_after(run: Runner) -> None:
    summary = run("method=feddpa", "method.variant=after", "num_rounds=3")
    assert summary["refused"] == {} and summary["selected_by"] == "client_validation_accuracy"
    sent = {round: list(run.recorder.of("train", round)[0].up_state()) for round in (1, 2, 3)}
    assert sent[1] == sent[2] and sent[1] and not any(".own." in name for name in sent[1])
    assert sent[3] == []
    lines = run.lines()
    assert lines[3]["client_test_loss"] != lines[2]["client_test_loss"]


def test_a_turn_trains_twice_the_steps_and_says_those_of_what_is_shared(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    train = module.train

    def counting(passes: Any, steps: Any, *rest: Any, **more: Any) -> Any:
        counts.append(len(steps))
        return train(passes, steps, *rest, **more)

    monkeypatch.setattr(module, "train", counting)
    run("method=feddpa", "local_steps=2", "num_rounds=1")
    (first, *_) = run.recorder.of("train", 1)
    assert counts == [2, 2] * 3
    assert first.up.content.metric_records["metrics"]["num-steps"] == 2
