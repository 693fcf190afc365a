"""SCAFFOLD by hand on one parabola a client, and on the wire."""

import pytest
import torch
from flwr.app import Context, Message
from torch import nn

from fedpeft.algorithms.scaffold import ControlTerm, Scaffold
from fedpeft.client.app import app as client_app
from fedpeft.methods.base import At, Round, Term
from fedpeft.state import State, split_prefixed, weighted_mean
from fedpeft.wire import pack
from tests.conftest import Answer, Runner, state_of

LR, STEPS = 0.1, 2


def one(value: float) -> State:
    return {"a": torch.tensor([value], dtype=torch.float64)}


def descend(term: Term, start: State, target: float) -> State:
    """Steps of SGD on (theta - target)^2 / 2."""
    parameter = nn.Parameter(start["a"].clone())
    for _ in range(STEPS):
        parameter.grad = parameter.detach() - target
        term.correct({"a": parameter})
        parameter.data -= LR * parameter.grad
    return {"a": parameter.detach()}


class Clients:
    """The clients of (theta - target)^2 / 2 and their server."""

    def __init__(self, *targets: float, algorithm: Scaffold | None = None) -> None:
        self.algorithm = algorithm or Scaffold()
        self.targets = targets
        self.kept: list[State] = [{} for _ in targets]
        self.memory: dict[str, State] = {}
        self.state = one(0.0)

    def round(self, *cohort: int) -> list[float]:
        states, extras = [], []
        down = self.algorithm.down(self.memory, self.state)
        for client in cohort:
            term = self.algorithm.term(self.state, down, self.kept[client])
            states.append(descend(term, self.state, self.targets[client]))
            more, self.kept[client] = term.finish(states[-1], STEPS, LR)
            extras.append(more)
        weights = [1 / len(cohort)] * len(cohort)
        share = len(cohort) / len(self.targets)
        ats = [At(1, client) for client in cohort]
        steps = [STEPS] * len(cohort)
        round = Round(1, ats, states, weights, self.state, steps, extras, share)
        mean = weighted_mean(states, weights)
        self.state = self.algorithm.server(mean, round, self.memory)
        return [state["a"].item() for state in states]

    def controls(self) -> list[float]:
        return [kept["a"].item() for kept in self.kept]

    def control(self) -> float:
        return self.memory["control"]["a"].item()


def test_two_rounds_by_hand() -> None:
    clients = Clients(1.0, 3.0)
    assert clients.round(0, 1) == pytest.approx([0.19, 0.57])  # controls are zero: plain SGD
    assert clients.controls() == pytest.approx([-0.95, -2.85])  # (0 - y) / (2 * 0.1)
    assert clients.control() == pytest.approx(-1.9)
    assert clients.state["a"].item() == pytest.approx(0.38)
    # gradients theta - 1 + 0.95 - 1.9 = theta - 1.95 and theta - 3 + 2.85 - 1.9 = theta - 2.05
    assert clients.round(0, 1) == pytest.approx([0.6783, 0.6973])
    assert clients.controls() == pytest.approx([0.95 - 1.4915, -0.95 - 1.5865])
    assert clients.control() == pytest.approx(-1.539)


def test_half_of_the_clients_move_the_control_by_half() -> None:
    clients = Clients(1.0, 3.0)
    clients.round(1)
    assert clients.control() == pytest.approx(-2.85 / 2)
    assert clients.state["a"].item() == pytest.approx(0.57)
    clients.round(0)
    known = [kept["a"].item() for kept in clients.kept]
    assert clients.control() == pytest.approx(sum(known) / 2)


def test_the_optimum_of_all_is_where_each_client_stays() -> None:
    clients = Clients(1.0, 3.0)
    for _ in range(60):
        clients.round(0, 1)
    assert clients.round(0, 1) == pytest.approx([2.0, 2.0], abs=1e-4)
    assert clients.controls() == pytest.approx([1.0, -1.0], abs=1e-3)


def test_server_lr() -> None:
    clients = Clients(1.0, 3.0, algorithm=Scaffold(server_lr=0.5))
    clients.round(0, 1)
    assert clients.state["a"].item() == pytest.approx(0.19)
    with pytest.raises(ValueError, match="server_lr must be > 0, got -1"):
        Scaffold(server_lr=-1.0)


def test_controls_of_names_that_rest_are_kept() -> None:
    term = ControlTerm(one(1.0), one(0.5), {"b": torch.ones(2)})
    change, kept = term.finish(one(0.0), 2, 0.25)
    assert change["a"].item() == pytest.approx(-0.5 + 1 / 0.5)
    assert set(kept) == {"a", "b"} and torch.equal(kept["b"], torch.ones(2))
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
    """With two of three clients a round; FedTT+ shares other factors in each."""
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
    shas = []
    for strategy in ("fedavg", "scaffold"):
        for rounds in (1, 2):
            given = [f"strategy={strategy}", "strategy.weights=uniform", f"num_rounds={rounds}"]
            shas.append(run(*given, *SGD)["shared_state_sha256"])
    assert shas[0] == shas[2] and shas[1] != shas[3]


def test_evaluation_carries_no_controls(run: Runner) -> None:
    run("strategy=scaffold", "evaluation.clients=always", "local_steps=1")
    for exchange in run.recorder.of("evaluate"):
        assert split_prefixed(exchange.down_state())[1] == {}


NAME = "strategy:classifier.bias"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.full((4,), float("nan")), f"{NAME} holds values that are not finite"),
        (torch.zeros(3), rf"{NAME} is torch.float32 \(3,\), expected torch.float32 \(4,\)"),
        (torch.zeros(4).double(), rf"{NAME} is torch.float64 \(4,\)"),
        (None, f"1 keys are missing, first {NAME}"),
    ],
)
def test_bad_controls_are_refused_on_both_sides(
    value: torch.Tensor | None, message: str, run: Runner
) -> None:
    def changed(state: State) -> State:
        rest = {n: v for n, v in state.items() if n != NAME}
        return rest if value is None else rest | {NAME: value}

    def up(message: Message, context: Context) -> Message:
        reply = client_app(message=message, context=context)
        return spoilt(reply) if message.metadata.message_type == "train" and own(context) else reply

    def down(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and own(context):
            spoilt(message)
        return client_app(message=message, context=context)

    def own(context: Context) -> bool:
        return context.node_config["partition-id"] == 1

    def spoilt(message: Message) -> Message:
        content = message.content
        content["arrays"], index = pack(changed(state_of(message)))
        content.config_records["config"]["index"] = index
        return message

    answers: list[Answer] = [up, down]
    for answer in answers:
        run("strategy=scaffold", "num_rounds=1", "evaluation.clients=never", answer=answer)
        refused = run.lines()[1]["refused"]
        assert list(refused)[0] == "1"
        with pytest.raises(ValueError, match=message):
            raise ValueError(refused["1"])
