"""Every file of conf/method with every file of conf/strategy: two rounds, or the refusal.

Which pairs are refused stands here by name; what the others come to, in ``expected.servers``.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message

from fedpeft.client.app import app as client_app
from fedpeft.compression.base import Compression
from fedpeft.config.load import load_config
from fedpeft.config.optimization import Optimization
from fedpeft.config.schema import Config
from fedpeft.engine.engine import Engine
from fedpeft.methods.base import At
from fedpeft.methods.lora import LoRA
from fedpeft.state import Role, State
from tests.conftest import Runner
from tests.expected.methods import HEAD, PERSONAL, SENT, TINY, names_of
from tests.expected.servers import RULES, Array, Given
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
    """Return the sentence by which a pair is refused; null if it makes sense."""
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


@pytest.fixture(scope="module")
def engine_of(tiny: Config) -> Callable[[str], Engine]:
    """``engine_of(method)`` gives one engine for all pairs of a method."""
    return cache(lambda method: small(with_method(tiny, method, TINY.get(method, []))))


def optimizer_of(strategy: str) -> Optimization:
    return Optimization("sgd" if strategy == "scaffold" else "adamw")


@pytest.fixture(scope="module")
def pair(engine_of: Callable[[str], Engine]) -> Iterator[Paired]:
    """``pair(method, strategy, rounds, field=...)`` runs the rounds of a pair.

    SCAFFOLD's clients take SGD's steps, all others' AdamW's, unless the field ``optimizer`` is set.
    """

    def run(method: str, strategy: str, rounds: int = 2, /, **fields: Any) -> Pair:
        options: dict[str, Any] = {
            "strategy": replace(made("strategy", strategy), **FIELDS.get(strategy, {})),
            "clients_per_round": CLIENTS if strategy in ALL else COHORT,
            "optimizer": optimizer_of(strategy),
        }
        engine = changed(engine_of(method), **options | fields)
        engine.replica.roles.check()
        return Pair(engine, rounds)

    with pytest.MonkeyPatch.context() as patch:
        # torch's own formats a stack for every kind of absent device: a fifth of a pair's time
        patch.setattr(torch, "manual_seed", torch.default_generator.manual_seed)
        yield run


@pytest.fixture(scope="module")
def plain(pair: Paired) -> Paired:
    """``plain(method, optimizer)`` gives the method's rounds with FedAvg."""
    return cache(lambda method, optimizer: pair(method, "fedavg", optimizer=optimizer))


def equal(a: State, b: State, names: list[str] | None = None) -> bool:
    return all(torch.equal(a[name], b[name]) for name in (a if names is None else names))


def test_every_strategy_has_a_rule() -> None:
    assert {*RULES, "local_only"} == set(STRATEGIES) and set(OWN_RULE) <= set(METHODS)


PAIRS = [(method, strategy) for method in METHODS for strategy in STRATEGIES]


@pytest.mark.matrix
@pytest.mark.parametrize(("method", "strategy"), [p for p in PAIRS if not refusal(*p)])
def test_a_pair(method: str, strategy: str, pair: Paired, plain: Paired) -> None:
    rounds = pair(method, strategy)
    check_messages(rounds, method, strategy)
    check_first_round(rounds, plain(method, optimizer_of(strategy)), strategy)
    check_kept(rounds, method, strategy)
    check_values(rounds, method, strategy)


@pytest.mark.parametrize(("method", "strategy"), [p for p in PAIRS if refusal(*p)])
def test_a_refused_pair(method: str, strategy: str, pair: Paired) -> None:
    with pytest.raises(ValueError) as refused:
        pair(method, strategy)
    assert str(refused.value) == refusal(method, strategy)


@pytest.mark.parametrize("strategy", TOO_FEW)
def test_too_few_clients(strategy: str, pair: Paired) -> None:
    with pytest.raises(ValueError) as refused:
        pair("lora", strategy, strategy=made("strategy", strategy))
    assert str(refused.value) == TOO_FEW[strategy]


@pytest.mark.matrix
@pytest.mark.parametrize("method", METHODS)
def test_fedprox_leads_back(method: str, pair: Paired) -> None:
    """The pull acts from the second step on, and on LoRA's A from the third, because B is zero."""
    alone = {"local_steps": 3, "clients_per_round": 1}
    held, free = (pair(method, name, 1, **alone) for name in ("fedprox", "fedavg"))
    for client, other in free.rounds[0].items():
        assert moved(held.rounds[0][client]) < 0.99 * moved(other)


def check_messages(pair: Pair, method: str, strategy: str) -> None:
    """Check that clients send what they should, and that they get what the server has.

    Control variates are sent with SCAFFOLD alone.
    """
    config, model, alone = pair.engine.config, pair.engine.replica.model, strategy == "local_only"
    for start, trainings, patterns in zip(pair.values, pair.rounds, SENT[method], strict=False):
        up, down = ([] if alone else names_of(model, pattern) for pattern in patterns)
        if strategy == "centralized" and method in PERSONAL:
            up = down = pair.engine.replica.roles.names
        assert len(trainings) == (1 if strategy == "centralized" else config.cohort_size())
        for training in trainings.values():
            assert list(training.sent) == up
            assert list(training.received) == down
            assert not exact(pair.engine) or equal(training.received, start)
            controls = up if strategy == "scaffold" else []
            assert list(training.controls) == list(training.changes) == controls
            check_work(pair.engine, training, strategy)


def exact(engine: Engine) -> bool:
    """Tell if what is sent arrives as it was."""
    return engine.config.compression == Compression()


def check_work(engine: Engine, training: Training, strategy: str) -> None:
    """One step on its own rows; where all are in one place, as many as the cohort's together."""
    rows = [len(engine.rows.client_examples(client)["train"]) for client in range(CLIENTS)]
    assert len(set(rows)) == CLIENTS
    phases = len(engine.config.method.phases(At(1, 0, 2)))
    if strategy == "centralized":  # each phase trains something shared
        assert (training.rows, training.steps) == (sum(rows), COHORT * phases)
    else:
        assert training.rows in rows
        assert training.steps == (phases if strategy == "local_only" else 1)
    trained = {**training.sent, **training.kept}
    assert trained and all(torch.isfinite(value).all() for value in trained.values())


def check_first_round(pair: Pair, plain: Pair, strategy: str) -> None:
    """No strategy changes the first step, wherever what it trains is kept; all at once do more."""
    comparable = exact(pair.engine) or strategy != "local_only"  # what is kept is whole
    if strategy != "centralized" and comparable:
        for client, other in plain.rounds[0].items():
            ours, expected = (t.sent | t.kept for t in (pair.rounds[0][client], other))
            assert ours.keys() == expected.keys() and equal(ours, expected)


def check_kept(pair: Pair, method: str, strategy: str) -> None:
    """Check that personal values go on where they ended: AdamW's first step is at most lr."""
    own = names_of(pair.engine.replica.model, PERSONAL.get(method, "^$"))
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


def moved(training: Training) -> float:
    names = list(training.sent)
    return float(np.linalg.norm(flat(training.sent, names) - flat(training.received, names)))


def check_values(pair: Pair, method: str, strategy: str) -> None:
    """Compare the server's values with its rule; for methods with a rule of their own, the head."""
    names, first = pair.engine.replica.roles.names, pair.values[0]
    idle = equal(first, pair.values[-1])
    assert idle == (strategy == "local_only")
    moments = np.zeros((3, len(flat(first, names))))  # the first, the second, SCAFFOLD's c
    moments[1] = getattr(pair.engine.config.strategy, "tau", 0.0) ** 2
    for start, end, trainings in zip(pair.values, pair.values[1:], pair.rounds, strict=False):
        replies = list(trainings.values())
        shared = list(replies[0].sent)
        if method in OWN_RULE:
            shared = [name for name in shared if re.search(HEAD, name)]
        else:
            assert equal(start, end, [name for name in names if name not in shared])
        if shared:
            at = np.concatenate([np.full(start[n].numel(), n in shared) for n in names])
            given = given_to(pair.engine, replies, shared, moments[:, at])
            step = RULES[strategy](given) - given.start
            moved = flat(end, shared) - flat(start, shared)
            np.testing.assert_allclose(moved, step, rtol=1e-4, atol=1e-6)
            control = next_control(replies, given, moments[2, at], exact(pair.engine))
            moments[:, at] = given.m, given.v, control


def given_to(engine: Engine, replies: list[Training], shared: list[str], moments: Array) -> Given:
    """A round's at the server."""
    rows = np.array([reply.rows for reply in replies])
    states = np.stack([flat(reply.sent, shared) for reply in replies])
    start, fields = flat(replies[0].received, shared), asdict(engine.config.strategy)
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
def test_who_is_alone_keeps_all_that_it_trained(method: str, pair: Paired) -> None:
    """Parameters that rest in the second round stay kept, too."""
    first, second = pair(method, "local_only", clients_per_round=CLIENTS).rounds
    assert all(set(first[c].kept) <= set(second[c].kept) for c in range(CLIENTS))


@pytest.mark.matrix
@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "scaffold"])
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("method", ["lora", "fedtt_plus"])
def test_every_compression(method: str, compression: str, strategy: str, pair: Paired) -> None:
    rounds = pair(method, strategy, compression=made("compression", compression))
    check_messages(rounds, method, strategy)
    check_values(rounds, method, strategy)


@pytest.fixture
def sharing_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoRA, "role", lambda self, name, at: Role.PERSONAL)


@pytest.mark.usefixtures("sharing_nothing")
@pytest.mark.parametrize("strategy", sorted({*STRATEGIES} - {*OF_THE_MEAN, "centralized"}))
def test_nothing_shared(strategy: str, pair: Paired) -> None:
    assert all(training.sent == {} for training in pair("lora", strategy).rounds[0].values())


@pytest.mark.usefixtures("sharing_nothing")
def test_one_model_has_nothing_personal(pair: Paired) -> None:
    rounds = pair("lora", "centralized")
    assert list(rounds.rounds[0][0].sent) == rounds.engine.replica.roles.names


@pytest.mark.usefixtures("sharing_nothing")
@pytest.mark.parametrize("strategy", OF_THE_MEAN)
def test_strategies_of_the_mean_want_something_shared(strategy: str, pair: Paired) -> None:
    with pytest.raises(ValueError) as refused:
        pair("lora", strategy)
    assert str(refused.value) == (
        f"strategy {OF_THE_MEAN[strategy]} works on shared parameters, but method LoRA "
        "shares none here: use strategy=fedavg"
    )


@pytest.mark.usefixtures("sharing_nothing")
def test_an_engine_of_nothing_shared_does_not_begin(opened: Callable[..., Engine]) -> None:
    with pytest.raises(ValueError, match="strategy FedAdam works on shared parameters"):
        opened("strategy=fedadam")


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
