"""Every file of conf/method with every file of conf/strategy: two rounds, or the refusal.

Which pairs are refused stands here by name; what the others come to, in ``server_rules``.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message

from fedpeft.client.app import app as client_app
from fedpeft.compression.base import Compression
from fedpeft.config.load import load_config
from fedpeft.config.schema import Config
from fedpeft.engine.engine import Engine
from fedpeft.methods.base import At
from fedpeft.methods.lora import LoRA
from fedpeft.state import Role, State
from tests.conftest import TINY, Runner
from tests.pairs import (
    CLIENTS,
    COHORT,
    LR,
    SMALL,
    Pair,
    Training,
    changed,
    made,
    names_in,
    small,
    with_method,
)
from tests.server_rules import RULES, Array, Given
from tests.test_runs import HEAD, PERSONAL, SENT, names_of

METHODS, STRATEGIES, COMPRESSIONS = map(names_in, ("method", "strategy", "compression"))
# The classes of the methods that aggregate by a rule of their own; all others take the mean.
OWN_RULE = {
    "fedex_lora": "FedExLoRA",
    "fedrot_lora": "FedRotLoRA",
    "fedsvd": "FedSVD",
    "flexlora": "FlexLoRA",
    "flora": "FLoRA",
    "hetlora": "HetLoRA",
    "lora_fair": "LoRAFair",
    "ravan": "Ravan",
    "slora": "SLoRA",
}
# The classes of the strategies that replace or correct the mean; all others take it as it comes.
OF_THE_MEAN = {
    "fedadagrad": "FedAdagrad",
    "fedadam": "FedAdam",
    "fedavgm": "FedAvgM",
    "fednova": "FedNova",
    "fedyogi": "FedYogi",
    "krum": "Krum",
    "median": "Median",
    "multi_krum": "Krum",
    "norm_clipping": "NormClipping",
    "scaffold": "Scaffold",
    "trimmed_mean": "TrimmedMean",
}
# What the file's own numbers ask for, and others that go with three clients.
MALICIOUS = (
    "strategy.num_malicious=1 needs 2 x num_malicious + 3 = 5 clients a round or more, got 3"
)
TRIMS = "strategy.beta=0.2 trims floor(beta x clients per round) = 0 of 3 at each end: "
TOO_FEW = {
    "krum": MALICIOUS,
    "multi_krum": MALICIOUS,
    "trimmed_mean": TRIMS + "need beta x clients per round >= 1",
}
ALL = {"median", *TOO_FEW}  # a round has all clients, or there would be no middle
FIELDS: dict[str, dict[str, Any]] = {
    "krum": {"num_malicious": 0},
    "multi_krum": {"num_malicious": 0, "num_selected": 2},
    "trimmed_mean": {"beta": 0.34},
    "norm_clipping": {"max_norm": 0.01},  # so strong that they are seen
    "fedprox": {"proximal_mu": 10.0},
}


def refusal(method: str, strategy: str) -> str | None:
    """Why a pair makes no sense."""
    if (method, strategy) == ("fed_sb", "local_only"):
        return (
            "strategy LocalOnly sends nothing, but method FedSB starts from values that the server "
            "sets and sends: choose a start of the method that every client has by itself"
        )
    if method not in OWN_RULE or strategy not in OF_THE_MEAN:
        return None
    return (
        f"strategy {OF_THE_MEAN[strategy]} stands on the mean of whole states, but method "
        f"{OWN_RULE[method]} aggregates by a rule of its own: use strategy=fedavg or fedprox"
    )


@pytest.fixture(scope="module")
def tiny(base: list[str]) -> Config:
    return load_config([*base, *SMALL])


Paired = Callable[..., Pair]


@pytest.fixture
def pairs(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Paired]:
    """``pairs(method)`` gives ``pair(strategy, field=...)``, all of them on one model."""
    served: list[Engine] = []
    # torch's own formats a stack for each kind of device that is not there: a fifth of a pair
    monkeypatch.setattr(torch, "manual_seed", torch.default_generator.manual_seed)
    monkeypatch.setattr("fedpeft.client.client.open_engine", lambda *_: served[-1])

    def of(method: str) -> Paired:
        session = small(with_method(tiny, method, TINY.get(method, [])))

        def pair(strategy: str, rounds: int = 2, /, **fields: Any) -> Pair:
            given: dict[str, Any] = {
                "strategy": replace(made("strategy", strategy), **FIELDS.get(strategy, {})),
                "clients_per_round": CLIENTS if strategy in ALL else COHORT,
            }
            served.append(changed(session, **given | fields))
            for part in (served[-1].config.strategy, served[-1].config.compression):
                part.check(served[-1].replica._setting())
            return Pair(served[-1], rounds)

        return pair

    return of


@contextmanager
def named(method: str, strategy: str) -> Iterator[None]:
    """Any error names the pair."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"method={method} strategy={strategy}")
        raise


def equal(a: State, b: State, names: list[str] | None = None) -> bool:
    return all(torch.equal(a[name], b[name]) for name in (a if names is None else names))


def test_every_strategy_has_a_rule() -> None:
    assert {*RULES, "local_only"} == set(STRATEGIES) and set(OWN_RULE) <= set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_every_pair(method: str, pairs: Callable[[str], Paired]) -> None:
    pair = pairs(method)
    plain = pair("fedavg")
    for strategy in STRATEGIES:
        with named(method, strategy):
            reason = refusal(method, strategy)
            if reason or strategy in TOO_FEW:
                with pytest.raises(ValueError) as refused:
                    pair(strategy, strategy=made("strategy", strategy))
                assert str(refused.value) == (reason or TOO_FEW[strategy])
            if not reason:
                found = pair(strategy)
                check_messages(found, method, strategy)
                check_first_round(found, plain, strategy)
                check_kept(found, method, strategy)
                check_values(found, method, strategy)
    with named(method, "fedprox"):
        alone = {"local_steps": 3, "clients_per_round": 1}
        nearer(pair("fedprox", 1, **alone), pair("fedavg", 1, **alone))


def check_messages(pair: Pair, method: str, strategy: str) -> None:
    """Who sends what, and what comes down is what the server has; controls only with SCAFFOLD."""
    config, model, alone = pair.session.config, pair.session.replica.model, strategy == "local_only"
    for start, trainings, patterns in zip(pair.values, pair.rounds, SENT[method], strict=False):
        up, down = ([] if alone else names_of(model, pattern) for pattern in patterns)
        if strategy == "centralized" and method in PERSONAL:
            up = down = pair.session.replica.roles.names
        assert len(trainings) == (1 if strategy == "centralized" else config.cohort_size())
        for training in trainings.values():
            assert list(training.sent) == up
            assert list(training.received) == down
            assert not exact(pair.session) or equal(training.received, start)
            controls = up if strategy == "scaffold" else []
            assert list(training.controls) == list(training.changes) == controls
            check_work(pair.session, training, strategy)


def exact(session: Engine) -> bool:
    """Whether what is sent arrives as it was."""
    return session.config.compression == Compression()


def check_work(session: Engine, training: Training, strategy: str) -> None:
    """One step on its own rows; where all are in one place, as many as the cohort's together."""
    rows = [len(session.rows.client_examples(client)["train"]) for client in range(CLIENTS)]
    assert len(set(rows)) == CLIENTS
    if strategy == "centralized":
        phases = len(session.config.method.phases(At(1, 0, 2)))  # each trains something shared
        assert (training.rows, training.steps) == (sum(rows), COHORT * phases)
    else:
        phases = len(session.config.method.phases(At(1, 0, 2)))
        assert training.rows in rows
        assert training.steps == (phases if strategy == "local_only" else 1)
    trained = {**training.sent, **training.kept}
    assert trained and all(torch.isfinite(value).all() for value in trained.values())


def check_first_round(pair: Pair, plain: Pair, strategy: str) -> None:
    """No strategy changes the first step, wherever what it trains is kept; all at once do more."""
    comparable = exact(pair.session) or strategy != "local_only"  # what is kept is whole
    if strategy != "centralized" and comparable:
        for client, other in plain.rounds[0].items():
            found, expected = (t.sent | t.kept for t in (pair.rounds[0][client], other))
            assert found.keys() == expected.keys() and equal(found, expected)


def check_kept(pair: Pair, method: str, strategy: str) -> None:
    """What is personal goes on where it ended: AdamW's first step is no longer than lr."""
    own = names_of(pair.session.replica.model, PERSONAL.get(method, "^$"))
    if strategy == "centralized":
        own = []
    if strategy == "local_only":
        own += [name for name in pair.values[0] if re.search(SENT[method][1][0], name)]
    first, second = pair.rounds
    for training in second.values():
        more = set(training.kept) - set(own)
        assert set(own) <= set(training.kept) and (not more or strategy == "local_only")
    both = first.keys() & second.keys()
    assert both
    for client in both if strategy != "centralized" else ():
        before, after = first[client].kept, second[client].kept
        steps = [float((after[n] - before[n]).abs().max()) for n in own if n in before]
        assert max(steps, default=0.0) <= 1.001 * LR


def nearer(held: Pair, free: Pair) -> None:
    """FedProx leads back; to see it takes a step, and for LoRA's A, that has B at zero, two."""
    for client, other in free.rounds[0].items():
        ways = [moved(training) for training in (held.rounds[0][client], other)]
        assert ways[0] < 0.99 * ways[1]


def moved(training: Training) -> float:
    names = list(training.sent)
    return float(np.linalg.norm(flat(training.sent, names) - flat(training.received, names)))


def check_values(pair: Pair, method: str, strategy: str) -> None:
    """What the server makes of it; of methods with a rule of their own, the head."""
    names, first = pair.session.replica.roles.names, pair.values[0]
    idle = equal(first, pair.values[-1])
    assert idle == (strategy == "local_only")
    moments = np.zeros((3, len(flat(first, names))))  # the first, the second, SCAFFOLD's c
    for start, end, trainings in zip(pair.values, pair.values[1:], pair.rounds, strict=False):
        replies = list(trainings.values())
        shared = list(replies[0].sent)
        if method in OWN_RULE:
            shared = [name for name in shared if re.search(HEAD, name)]
        else:
            assert equal(start, end, [name for name in names if name not in shared])
        if shared:
            at = np.concatenate([np.full(start[n].numel(), n in shared) for n in names])
            given = given_to(pair.session, replies, shared, moments[:, at])
            step = RULES[strategy](given) - given.start
            found = flat(end, shared) - flat(start, shared)
            np.testing.assert_allclose(found, step, rtol=1e-4, atol=1e-6)
            control = next_control(replies, given, moments[2, at], exact(pair.session))
            moments[:, at] = given.m, given.v, control


def given_to(session: Engine, replies: list[Training], shared: list[str], moments: Array) -> Given:
    """A round's at the server."""
    rows = np.array([reply.rows for reply in replies])
    states = np.stack([flat(reply.sent, shared) for reply in replies])
    start, fields = flat(replies[0].received, shared), asdict(session.config.strategy)
    return Given(fields, start, states, rows / rows.sum(), moments[0], moments[1])


def next_control(replies: list[Training], given: Given, control: Array, exact: bool) -> Array:
    """c came down; up went the change of c_i, -c + (x - y) / (K lr)."""
    names = list(replies[0].controls)
    if not names:
        return control
    for reply, state in zip(replies, given.states, strict=True):
        np.testing.assert_allclose(flat(reply.controls, names), control, rtol=1e-5, atol=1e-6)
        change = (given.start - state) / LR - control
        if exact:
            np.testing.assert_allclose(flat(reply.changes, names), change, rtol=1e-4, atol=1e-4)
    mean = np.mean([flat(reply.changes, names) for reply in replies], axis=0)
    return control + COHORT / CLIENTS * mean


def flat(state: State, names: list[str]) -> Array:
    """The numbers of named parameters in a row."""
    return torch.cat([state[name].double().reshape(-1) for name in names]).numpy()


@pytest.mark.parametrize("method", ["rolora", "slora", "fedtt_plus"])
def test_who_is_alone_keeps_all_that_it_trained(
    method: str, pairs: Callable[[str], Paired]
) -> None:
    """Also what rests in the second round."""
    first, second = pairs(method)("local_only", clients_per_round=CLIENTS).rounds
    assert all(set(first[c].kept) <= set(second[c].kept) for c in range(CLIENTS))


@pytest.mark.parametrize("method", ["lora", "fedtt_plus"])
def test_every_compression(method: str, pairs: Callable[[str], Paired]) -> None:
    pair = pairs(method)
    for name in COMPRESSIONS:
        for strategy in ("fedavg", "fedadam", "scaffold"):
            with named(method, f"{strategy} compression={name}"):
                found = pair(strategy, compression=made("compression", name))
                check_messages(found, method, strategy)
                check_values(found, method, strategy)


def test_nothing_shared(
    pairs: Callable[[str], Paired],
    opened: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LoRA, "role", lambda self, name, at: Role.PERSONAL)
    pair = pairs("lora")
    for strategy in STRATEGIES:
        with named("lora", strategy):
            if strategy == "centralized":  # one model has nothing personal
                sent = pair(strategy).rounds[0][0].sent
                assert list(sent) == pair(strategy).session.replica.roles.names
                continue
            if strategy not in OF_THE_MEAN:
                assert all(training.sent == {} for training in pair(strategy).rounds[0].values())
                continue
            with pytest.raises(ValueError) as refused:
                pair(strategy)
            assert str(refused.value) == (
                f"strategy {OF_THE_MEAN[strategy]} works on shared parameters, but method LoRA "
                "shares none here: use strategy=fedavg"
            )
    with pytest.raises(ValueError, match="strategy FedAdam works on shared parameters"):
        opened("strategy=fedadam")  # an engine does not begin


def test_a_round_that_changes_nothing_says_so(run: Runner) -> None:
    """Krum with a client that fails: the run goes on, its line tells."""

    def answer(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 3:
            raise RuntimeError("out of memory")
        return client_app(message=message, context=context)

    given = ["num_clients=5", "partition=iid", "evaluation.clients=never", "evaluation.every=9"]
    run("strategy=krum", *given, "local_steps=1", answer=answer)
    assert [line.get("unchanged") for line in run.lines()] == [None, 1.0, 1.0]
    first, second = (run.recorder.of("train", r)[0].down_state() for r in (1, 2))
    assert equal(first, second)
