"""Every file of conf/strategy and conf/compression with three kinds of methods: runs or refusals.

LoRA shares everything, FedSA-LoRA keeps a part, FedTT+ shares other parameters in each round.
"""

from collections.abc import Callable

import pytest
import torch
from flwr.app import Context, Message

from fedpeft.client_app import app as client_app
from fedpeft.config import CONF
from fedpeft.methods.base import Role
from fedpeft.methods.lora import LoRA
from fedpeft.session import Session
from tests.conftest import Runner

STRATEGIES = sorted(path.stem for path in (CONF / "strategy").glob("*.yaml"))
COMPRESSIONS = sorted(path.stem for path in (CONF / "compression").glob("*.yaml"))
METHODS = ["lora", "fedsa_lora", "fedtt_plus"]
QUICK = [
    "local_steps=2",
    "batch_size=4",
    "evaluation.clients=never",
    "evaluation.every=9",
    "evaluation.interference=false",
]
# With the three clients of these tests.
REFUSED = {
    "krum": r"num_malicious=1 needs 2 x num_malicious \+ 3 = 5 clients a round or more, got 3",
    "multi_krum": r"num_malicious=1 needs .* = 5 clients a round or more, got 3",
    "trimmed_mean": r"beta=0.2 trims .* = 0 of 3 at each end",
}
# Of a method that aggregates by a rule of its own, these take the mean as it comes.
TAKES_ANY = {"fedavg", "fedprox", "local_only", "centralized"}


def finite(run: Runner) -> bool:
    return all(torch.isfinite(value).all() for value in run.saved().values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_rounds(strategy: str, method: str, run: Runner) -> None:
    given = [f"strategy={strategy}", f"method={method}", *QUICK]
    if strategy in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[strategy]):
            run(*given)
        given += ["num_clients=5", "partition=iid"]
    summary = run(*given)
    assert summary["refused"] == {} and len(run.lines()) == 3
    assert finite(run)
    sent = [run.recorder.of("train", round) for round in (1, 2)]
    clients = 1 if strategy == "centralized" else 5 if strategy in REFUSED else 3
    assert [len(exchanges) for exchanges in sent] == [clients, clients]
    assert not any("unchanged" in line for line in run.lines())
    if strategy != "local_only":
        assert summary["bytes"]["uplink_payload_bytes"] > 0
        start, end = (exchanges[0].down_state() for exchanges in sent)
        assert any(not torch.equal(start[n], end[n]) for n in start)


@pytest.mark.parametrize("method", ["lora", "fedtt_plus"])
@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "scaffold"])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_compressed(compression: str, strategy: str, method: str, run: Runner) -> None:
    given = [f"compression={compression}", f"strategy={strategy}", f"method={method}", *QUICK]
    assert run(*given)["refused"] == {}
    assert finite(run)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_methods_with_a_rule_of_their_own(strategy: str, opened: Callable[..., Session]) -> None:
    """A session does not begin with what would take their rule's place."""
    given = [f"strategy={strategy}", "method=flexlora", "num_clients=5", "partition=iid"]
    if strategy in TAKES_ANY:
        opened(*given)
    else:
        with pytest.raises(ValueError, match="but method FlexLoRA aggregates by a rule of its own"):
            opened(*given)


def test_nothing_shared(opened: Callable[..., Session], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoRA, "role", lambda self, name, round: Role.PERSONAL)
    with pytest.raises(ValueError, match="strategy FedAdam works on shared .* LoRA shares none"):
        opened("strategy=fedadam")
    opened("strategy=fedavg")


def test_a_round_that_changes_nothing_says_so(run: Runner) -> None:
    """Krum with a client that fails: the run goes on, its line tells."""

    def answer(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 3:
            raise RuntimeError("out of memory")
        return client_app(message=message, context=context)

    given = ["strategy=krum", "num_clients=5", "partition=iid", *QUICK]
    run(*given, answer=answer)
    assert [line.get("unchanged") for line in run.lines()] == [None, 1.0, 1.0]
    first, second = (run.recorder.of("train", r)[0].down_state() for r in (1, 2))
    assert all(torch.equal(first[n], second[n]) for n in first)
