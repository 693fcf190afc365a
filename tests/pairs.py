"""Two rounds of one method with one strategy in this process, noted.

One model serves all pairs of a method: nothing is measured and nothing saved.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message
from hydra.utils import instantiate
from omegaconf import OmegaConf

from fedpeft.client.client import answer_all
from fedpeft.client.store import Store
from fedpeft.config.compose import CONF
from fedpeft.config.schema import Config
from fedpeft.engine.engine import Engine
from fedpeft.engine.roles import Roles
from fedpeft.server.strategy import FederatedPEFT
from fedpeft.simulation.grid import InProcessGrid
from fedpeft.state import STRATEGY, State, prefixed, split_prefixed, zeros
from tests.conftest import Recorder, Sent
from tests.grids import one_by_one

CLIENTS, COHORT, LR = 3, 2, 0.01
SMALL = [
    f"num_clients={CLIENTS}",
    f"clients_per_round={COHORT}",
    f"lr={LR}",
    "local_steps=1",
    "batch_size=2",
    "evaluation.interference=false",
    "model.random=true",
    "model.settings.num_hidden_layers=1",
]


def names_in(group: str) -> list[str]:
    """Names of the files in a folder of conf/."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@cache
def made(group: str, name: str) -> Any:
    """Build what a YAML file stands for, without Hydra, which takes longer than a pair."""
    momentum = {"momentum": 0.0}  # a strategy's file may point to it
    parts = {"optimizer": momentum, group: OmegaConf.load(CONF / group / f"{name}.yaml")}
    tree: Any = OmegaConf.create(parts)
    return instantiate(tree[group], _convert_="all")


def with_method(config: Config, name: str, fields: Sequence[str] = ()) -> Config:
    """Return a configuration with the method of a file in conf/method, and its compression.

    Args:
        config: the configuration that is copied.
        name: the file's name, without its ending.
        fields: changes of the method, such as ``method.rank=4``.
    """
    tree: Any = OmegaConf.load(CONF / "method" / f"{name}.yaml")
    tree = OmegaConf.merge(tree, OmegaConf.from_dotlist(list(fields)))
    chosen = {k: v for entry in tree.get("defaults", []) for k, v in entry.items()}
    compression = made("compression", chosen.get("override /compression", "none"))
    method = instantiate(tree.method, _convert_="all")
    personal = config.personal or tree.get("personal")
    return replace(config, method=method, compression=compression, personal=personal)


def small(config: Config) -> Engine:
    """An engine whose clients hold 40, 20 and 10 rows; to draw them loads Flower's data sets."""
    engine = Engine(config)
    engine.rows.by_client = np.split(np.arange(70), (40, 60))
    return engine


def changed(engine: Engine, **fields: Any) -> Engine:
    """The same model and rows under another configuration."""
    other = copy.copy(engine)
    other.rows = copy.copy(engine.rows)
    other.replica = copy.copy(engine.replica)
    config = replace(engine.config, **fields)
    other.config = other.rows.config = other.replica.config = config
    engine.replica.set_trainable(set(engine.replica.roles.names))  # which Roles reads
    other.replica.roles = Roles(config, engine.replica.model)
    other._passes, other._together = {}, {}
    return other


@dataclass
class Training:
    """One client in one round.

    Attributes:
        received: parameters that the client got.
        controls: the strategy's extras beside ``received``.
        sent: parameters as they arrived at the server.
        changes: the strategy's extras beside ``sent``.
        kept: the state that stays with the client.
        rows: number of the client's rows.
        steps: number of steps that the client took.
    """

    received: State
    controls: State
    sent: State
    changes: State
    kept: State
    rows: int
    steps: int


class Pair:
    """The rounds of one engine.

    Attributes:
        rounds: the trainings of each round, by client.
        values: values of all that can change, before the first round and after each.
    """

    def __init__(self, engine: Engine, rounds: int = 2) -> None:
        self.engine = engine
        self.rounds: list[dict[int, Training]] = []
        self.recorder = Recorder(self._answer)
        self.grid = InProcessGrid(CLIENTS, one_by_one(self.recorder))
        self.server = FederatedPEFT("", engine)
        self.server.nodes.join(self.grid)
        self.server.down.begin()
        self.values = [self.server.values]
        self.kept: dict[int, State] = {}
        for round in range(1, rounds + 1):
            self._round(round)

    def _answer(self, message: Message, context: Context) -> Message:
        (reply,) = answer_all([message], [context], self.engine)
        if isinstance(reply, Exception):
            raise reply
        client = self.recorder.client
        store = Store(self.grid.state_folder / self.server.down.run / f"client_{client}")
        if store.generations:
            self.kept[client] = split_prefixed(store.load(store.generations[-1]))[0]
        return reply

    def _round(self, round: int) -> None:
        """Run a round as a run does, without its measures."""
        server = self.server
        messages = server.configure_train(round, server.arrays(), ConfigRecord(), self.grid)
        server.aggregate_train(round, self.grid.send_and_receive(messages))
        assert server.seen.refused == {} and "unchanged" not in server.seen.metrics
        exchanges = self.recorder.of("train", round)
        self.rounds.append({exchange.client: self._read(exchange) for exchange in exchanges})
        self.values.append(server.values)

    def _read(self, exchange: Sent) -> Training:
        config, shared = self.engine.config, self.engine.replica.shared(exchange.round)
        down = {
            name: self.engine.replica.initial[name]
            for name in self.engine.replica.roles.down(exchange.round)
        }
        down |= prefixed(config.strategy.down({}, shared), STRATEGY)
        received, controls = split_prefixed(
            config.compression.down.decode(exchange.down_state(), down)
        )
        start = {name: received[name] for name in shared}
        start |= prefixed(zeros(config.strategy.up(shared)), STRATEGY)
        arrived = config.compression.up.decode(exchange.up_state(), start)
        metrics: dict[str, Any] = dict(exchange.up.content.metric_records["metrics"])
        counts = metrics["num-examples"], metrics["num-steps"]
        kept = self.kept.get(exchange.client, {})
        return Training(received, controls, *split_prefixed(arrived), kept, *counts)
