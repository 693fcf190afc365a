"""SCAFFOLD by hand, with one parabola a client, and in runs."""

import re

import pytest
import torch
from flwr.app import Context, Message
from torch import nn

from fedpeft.algorithms.scaffold import ControlTerm, Scaffold
from fedpeft.client.app import app as client_app
from fedpeft.methods.base import At, Round, Term
from fedpeft.state import State, split_prefixed, weighted_mean
from fedpeft.wire import pack
from tests.conftest import Runner, state_of

LR, STEPS = 0.1, 2


def one(value: float) -> State:
    return {"a": torch.tensor([value], dtype=torch.float64)}


def descend(term: Term, start: State, target: float) -> State:
    """Take ``STEPS`` steps of SGD on (theta - target)^2 / 2.

    Args:
        term: corrects the gradients.
        start: theta before the first step.
        target: the client's optimum.
    """
    parameter = nn.Parameter(start["a"].clone())
    for _ in range(STEPS):
        parameter.grad = parameter.detach() - target
        term.correct({"a": parameter})
        parameter.data -= LR * parameter.grad
    return {"a": parameter.detach()}


class Clients:
    """A server and clients, each with the loss (theta - target)^2 / 2.

    Args:
        targets: one target a client.
        algorithm: ``Scaffold()`` by default.
    """

    def __init__(self, *targets: float, algorithm: Scaffold | None = None) -> None:
        self.algorithm = algorithm or Scaffold()
        self.targets = targets
        self.controls: list[State] = [{} for _ in targets]
        self.memory: dict[str, State] = {}
        self.state = one(0.0)

    def round(self, *cohort: int) -> list[float]:
        """Train a cohort, aggregate, and return theta of each client after training."""
        states, extras = [], []
        down = self.algorithm.down(self.memory, self.state)
        for client in cohort:
            term = self.algorithm.term(self.state, down, self.controls[client])
            states.append(descend(term, self.state, self.targets[client]))
            change, self.controls[client] = term.finish(states[-1], STEPS, LR)
            extras.append(change)
        weights = [1 / len(cohort)] * len(cohort)
        share = len(cohort) / len(self.targets)
        ats = [At(1, client) for client in cohort]
        steps = [STEPS] * len(cohort)
        round = Round(1, ats, states, weights, self.state, steps, extras, share)
        mean = weighted_mean(states, weights)
        self.state = self.algorithm.server(mean, round, self.memory)
        return [state["a"].item() for state in states]

    def client_controls(self) -> list[float]:
        return [control["a"].item() for control in self.controls]

    def server_control(self) -> float:
        return self.memory["control"]["a"].item()


def test_two_rounds_by_hand() -> None:
    clients = Clients(1.0, 3.0)
    assert clients.round(0, 1) == pytest.approx([0.19, 0.57])  # controls are zero: plain SGD
    assert clients.client_controls() == pytest.approx([-0.95, -2.85])  # (0 - y) / (2 * 0.1)
    assert clients.server_control() == pytest.approx(-1.9)
    assert clients.state["a"].item() == pytest.approx(0.38)
    # gradients theta - 1 + 0.95 - 1.9 = theta - 1.95 and theta - 3 + 2.85 - 1.9 = theta - 2.05
    assert clients.round(0, 1) == pytest.approx([0.6783, 0.6973])
    assert clients.client_controls() == pytest.approx([0.95 - 1.4915, -0.95 - 1.5865])
    assert clients.server_control() == pytest.approx(-1.539)


def test_half_of_the_clients_move_the_control_by_half() -> None:
    clients = Clients(1.0, 3.0)
    clients.round(1)
    assert clients.server_control() == pytest.approx(-2.85 / 2)
    assert clients.state["a"].item() == pytest.approx(0.57)
    clients.round(0)
    assert clients.server_control() == pytest.approx(sum(clients.client_controls()) / 2)


def test_the_optimum_of_all_is_where_each_client_stays() -> None:
    clients = Clients(1.0, 3.0)
    for _ in range(60):
        clients.round(0, 1)
    assert clients.round(0, 1) == pytest.approx([2.0, 2.0], abs=1e-4)
    assert clients.client_controls() == pytest.approx([1.0, -1.0], abs=1e-3)


def test_server_lr() -> None:
    clients = Clients(1.0, 3.0, algorithm=Scaffold(server_lr=0.5))
    clients.round(0, 1)
    assert clients.state["a"].item() == pytest.approx(0.19)
    with pytest.raises(ValueError, match="server_lr must be > 0, got -1"):
        Scaffold(server_lr=-1.0)


def test_a_parameter_that_does_not_train_leaves_its_control() -> None:
    term = ControlTerm(one(1.0), one(0.5), {"b": torch.ones(2)})
    change, controls = term.finish(one(0.0), 2, 0.25)
    assert change["a"].item() == pytest.approx(-0.5 + 1 / 0.5)
    assert set(controls) == {"a", "b"} and torch.equal(controls["b"], torch.ones(2))
    memory = {"control": {"b": torch.ones(2)}}
    round = Round(1, [At(1, 0)], [one(0.0)], [1.0], one(1.0), [2], [change])
    Scaffold().server(one(0.0), round, memory)
    assert set(memory["control"]) == {"a", "b"}
    assert Scaffold().down(memory, {"b": torch.zeros(2)}).keys() == {"b"}


def test_frozen_gradients_are_left_alone() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    ControlTerm({"a": torch.zeros(1)}, {"a": torch.ones(1)}, {}).correct({"a": parameter})
    assert parameter.grad is None


# --- in runs -------------------------------------------------------------------------------------

SGD = ["optimizer.name=sgd", "optimizer.max_grad_norm=null", "lr=0.1", "evaluation.clients=never"]


@pytest.mark.parametrize("method", ["lora", "fedtt_plus"])
def test_the_control_is_the_mean_of_all_clients_controls(method: str, run: Runner) -> None:
    """Two of three clients train in a round, and FedTT+ shares other factors in each."""
    run(f"method={method}", "strategy=scaffold", "clients_per_round=2", "num_rounds=4", *SGD)
    total: State = {}
    for round in range(1, 5):
        sent = run.recorder.of("train", round)
        assert len(sent) == 2
        for exchange in sent:
            state, control = split_prefixed(exchange.down_state())
            assert control.keys() == split_prefixed(exchange.up_state())[0].keys() <= state.keys()
            for name, value in control.items():
                expected = total.get(name, torch.zeros_like(value)) / 3
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
        for exchange in sent:
            _, change = split_prefixed(exchange.up_state())
            total |= {n: total.get(n, torch.zeros_like(v)) + v for n, v in change.items()}
    assert any(value.abs().max() > 1e-4 for value in total.values())


def test_the_first_round_is_fedavg_s_and_the_second_is_not(run: Runner) -> None:
    def digest(strategy: str, rounds: int) -> str:
        overrides = [f"strategy={strategy}", "strategy.weights=uniform", f"num_rounds={rounds}"]
        return run(*overrides, *SGD)["shared_state_sha256"]

    assert digest("fedavg", 1) == digest("scaffold", 1)
    assert digest("fedavg", 2) != digest("scaffold", 2)


def test_evaluation_carries_no_controls(run: Runner) -> None:
    run("strategy=scaffold", "optimizer.name=sgd", "evaluation.clients=always", "local_steps=1")
    for exchange in run.recorder.of("evaluate"):
        assert split_prefixed(exchange.down_state())[1] == {}


NAME = "strategy:classifier.bias"


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (torch.full((4,), float("nan")), f"{NAME} holds values that are not finite"),
        (torch.zeros(3), rf"{NAME} is torch.float32 \(3,\), expected torch.float32 \(4,\)"),
        (torch.zeros(4).double(), rf"{NAME} is torch.float64 \(4,\)"),
        (None, f"1 keys are missing, first {NAME}"),
    ],
)
def test_bad_controls_are_refused_on_both_sides(
    value: torch.Tensor | None, error: str, direction: str, run: Runner
) -> None:
    def spoil(message: Message) -> None:
        """Set the control in a message to ``value``, or remove it."""
        state = {n: v for n, v in state_of(message).items() if n != NAME}
        content = message.content
        content["arrays"], index = pack(state if value is None else state | {NAME: value})
        content.config_records["config"]["index"] = index

    def answer(message: Message, context: Context) -> Message:
        spoils = message.metadata.message_type == "train"
        spoils = spoils and context.node_config["partition-id"] == 1
        if spoils and direction == "down":
            spoil(message)
        reply = client_app(message=message, context=context)
        if spoils and direction == "up":
            spoil(reply)
        return reply

    # clients of equal messages share their content, so client 2 gets what client 1 got
    one = "runtime.min_replies=1"
    run("strategy=scaffold", "num_rounds=1", *SGD, one, answer=answer)
    refused = run.lines()[1]["refused"]
    assert list(refused)[0] == "1"
    assert re.search(error, refused["1"])
