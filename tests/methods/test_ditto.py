"""Ditto: its two phases, its pull by hand, and the copies that stay on the clients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from torch import Tensor, nn

from fedpeft.client.app import app as client_app
from fedpeft.engine.engine import Engine
from fedpeft.engine.plan import Job
from fedpeft.methods.base import At
from fedpeft.methods.ditto import Ditto, is_personal, twin
from fedpeft.state import Role, State
from tests.conftest import Runner, newest
from tests.expected.architectures import tiny

# Full batches and no dropout: both phases, and plain LoRA, then see the same gradients.
PLAIN = [
    *("method.rank=4", "method.alpha=4", "frozen=head", "batch_size=1000", "local_steps=2"),
    *("optimizer.name=sgd", "optimizer.max_grad_norm=null", "lr=0.05", "bucketing=false"),
    "model.settings={hidden_dropout_prob: 0, attention_probs_dropout_prob: 0}",
]


def trained(engine: Engine, start: State, client: int = 0) -> State:
    """Train a client in round 1 and return all parameters that can change."""
    at = At(1, client, 2)
    term = engine.config.method.term(at, start, {})
    return engine.train_client(Job(at, start, (term,))).after


def norm(state: State, other: State) -> float:
    return float(sum((state[n] - other[n]).square().sum() for n in state)) ** 0.5


def test_two_steps_of_sgd_on_a_quadratic_by_hand() -> None:
    """Loss (v - 5)^2 / 2 from v = 1, w = 3, pull 2, rate .1: v is 1.8 and then 2.36."""
    name, other = "x.lora_A.personal.weight", "x.lora_A.global.weight"
    v, w = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([7.0]))
    start = {name: torch.tensor([1.0]), other: torch.tensor([3.0])}
    pull = Ditto(rank=4, pull=2.0).term(At(1), start, {})
    seen = []
    for _ in range(2):
        v.grad, w.grad = (v - 5).detach(), torch.zeros(1)
        pull.correct({name: v, other: w})
        v.data -= 0.1 * v.grad
        seen.append(float(v.detach()))
        assert float(w.grad) == 0
    assert seen == pytest.approx([1.8, 2.36])
    pull.correct({other: w})  # the global phase lacks v


def test_a_setting_turns_one_adapter_off() -> None:
    method = Ditto(rank=2, alpha=6.0)
    model = method.inject(tiny("bert"))
    layer: Any = model.get_submodule("bert.encoder.layer.0.attention.self.query")
    with torch.no_grad():
        layer.lora_B["global"].weight.normal_()
        layer.lora_B["personal"].weight.normal_()
    x = torch.eye(48)

    def change(setting: str) -> Tensor:
        method.arrange(model, setting)
        return (layer(x) - layer.base_layer(x)).T

    for adapter, settings in (("global", ["global"]), ("personal", ["personal", ""])):
        b, a = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
        for setting in settings:
            torch.testing.assert_close(change(setting), 3 * b @ a, rtol=1e-4, atol=1e-5)


def test_roles_and_phases() -> None:
    method, at = Ditto(rank=2), At(1, 0)
    model = method.inject(tiny("bert"))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    personal = {name for name in names if method.role(name, at) is Role.PERSONAL}
    assert personal == {n for n in names if "personal" in n} and len(personal) == 8
    assert {twin(n) for n in personal} == {n for n in names if ".global." in n}
    first, second = method.phases(at)
    assert {n for n in names if second.trains(n)} == personal
    assert {n for n in names if first.trains(n)} == set(names) - personal
    assert (first.setting, second.setting) == ("global", "personal")
    parameters = dict(model.named_parameters())
    for name in personal:
        assert torch.equal(parameters[name], parameters[twin(name)])


def test_without_pull_and_from_one_start_both_are_lora_s_local_training(
    opened: Callable[..., Engine],
) -> None:
    engine = opened("method=ditto", *PLAIN, "method.pull=0")
    after = trained(engine, engine.replica.initial)
    lora = opened("method=lora", *PLAIN)
    start = {
        name: engine.replica.initial[name.replace(".default.", ".global.")]
        for name in lora.replica.initial
        if "lora_" in name
    }
    plain = trained(lora, lora.replica.initial | start)
    assert norm({n: plain[n] for n in start}, start) > 0.01
    for name in start:
        for adapter in ("global", "personal"):
            value = after[name.replace(".default.", f".{adapter}.")]
            torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-6)


def test_a_large_pull_brings_the_copy_to_what_was_received(opened: Callable[..., Engine]) -> None:
    """With lr x pull = 1 every step ends at w - lr x gradient, wherever it began."""
    off = {}
    for pull in ("0", "20", "1"):
        engine = opened("method=ditto", *PLAIN, f"method.pull={pull}")
        torch.manual_seed(0)
        start = dict(engine.replica.initial)
        for name in start:
            if is_personal(name):
                start[name] = start[name] + 0.1 * torch.randn_like(start[name])
        received = {n: start[twin(n)] for n in start if is_personal(n)}
        off[pull] = norm(received, trained(engine, start))
        moved = norm({n: start[n] for n in start if ".global." in n}, trained(engine, start))
        assert moved > 0.01  # towards the received value, not the value that phase 1 trained
    assert off["20"] < 0.05 * off["0"]
    # without a gradient, two steps leave (1 - .05)^2 of the distance
    assert off["1"] == pytest.approx(0.95**2 * off["0"], rel=0.05)


def test_personal_copies_differ_and_are_never_sent(run: Runner) -> None:
    copies: dict[int, State] = {}

    def answer(message: Message, context: Context) -> Message:
        reply = client_app(message=message, context=context)  # type: ignore[call-arg]
        config = message.content.config_records.get("config")
        if config is not None:
            client = int(context.node_config["partition-id"])
            copies[client] = newest(context, message).personal
        return reply

    summary = run("method=ditto", "method.rank=4", answer=answer)
    assert len(run.recorder.of("train")) == 6
    for sent in run.recorder.of("train") + run.recorder.of("evaluate"):
        assert not any(is_personal(name) for name in sent.up_state() | sent.down_state())
    assert all(any(".global." in n for n in s.up_state()) for s in run.recorder.of("train"))
    assert not any(is_personal(name) for name in run.saved())
    assert len(copies) == 3 and all(len(state) == 8 for state in copies.values())
    assert min(norm(copies[a], copies[b]) for a, b in ((0, 1), (0, 2), (1, 2))) > 0.01
    assert "client_test_accuracy" in summary["final"]


def test_clients_are_measured_with_the_personal_copy(opened: Callable[..., Engine]) -> None:
    engine = opened("method=ditto", *PLAIN)
    rows = engine.rows.client_examples(0)["validation"]

    def loss(adapter: str) -> float:
        """Measure the loss of the model in which one adapter has a large B."""
        ends = f".lora_B.{adapter}.weight"
        changed = {n: v + 1.0 for n, v in engine.replica.initial.items() if n.endswith(ends)}
        engine.replica.load(changed)
        return engine.evaluate(rows)["loss"]

    engine.replica.load()
    assert loss("global") == engine.evaluate(rows)["loss"]
    base = loss("global")
    assert abs(loss("personal") - base) > 1e-3


def test_the_pull_is_checked() -> None:
    with pytest.raises(ValueError, match="pull must be >= 0, got -0.1"):
        Ditto(pull=-0.1)
