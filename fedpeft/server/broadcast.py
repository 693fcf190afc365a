"""The server's values, and what goes down to the clients in a round."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from uuid import uuid4

from flwr.app import ArrayRecord, Message, MessageType, RecordDict

from fedpeft.engine.engine import Engine
from fedpeft.engine.server_model import EngineModel
from fedpeft.methods.base import At, Memory
from fedpeft.protocol import ToClient
from fedpeft.seeding import generator
from fedpeft.server.checkpoint import Checkpoint
from fedpeft.server.generations import Generations
from fedpeft.server.seen import Seen
from fedpeft.state import METHOD, STRATEGY, State, payload_bytes, prefixed, sha256, split_prefixed
from fedpeft.wire import from_named_arrays, pack, wire_bytes


class Broadcast(NamedTuple):
    """Everything that goes down in one round, encoded once.

    Attributes:
        wire: parameters as they are sent, wire.
        received: every parameter that can change, full, as clients of whole parameters have it.
        extras: the strategy's additions to messages to train, wire.
    """

    wire: State
    received: State
    extras: State


@dataclass(frozen=True)
class Packed:
    """A state that several clients get.

    Attributes:
        group: names these clients to the grid.
        arrays: one array for each dtype.
        index: names, dtypes and shapes.
        payload: bytes of the arrays alone.
    """

    group: str
    arrays: ArrayRecord
    index: bytes
    payload: int


class Broadcaster:
    """Holds what the server knows from round to round, and encodes what goes down.

    Args:
        engine: the server's engine.
        overrides: the configuration as the clients get it.

    Attributes:
        state: every parameter that the server has set so far, full.
        memory: the strategy's memory, which lasts from round to round.
        method_memory: the method's memory, which lasts from round to round.
        best_method_memory: the method's memory after the best round so far.
        run: the run's name, under which clients keep their states.
        generations: each client's generation, now and at rounds that the run may go back to.
    """

    def __init__(self, engine: Engine, overrides: str) -> None:
        self.engine, self.overrides = engine, overrides
        self.config, self.replica, self.roles = engine.config, engine.replica, engine.replica.roles
        self.state: State = {}
        self.memory: Memory = {}
        self.method_memory: Memory = {}
        self.best_method_memory: Memory = {}
        self.run = uuid4().hex[:16]
        self.generations = Generations()
        self._broadcasts: dict[int, Broadcast] = {}  # the last one, by its round
        self._begun = False

    def restore(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Take over the last checkpoint, and remember what the others count on."""
        last = checkpoints[-1]
        self.state, self.run, self._begun = dict(last.state), last.run, True
        self.memory, self.method_memory = last.memory, last.method_memory
        self.best_method_memory = last.best_method_memory
        self.generations.accepted, self.generations.best = last.accepted, last.best_accepted
        self.generations.checkpoints = [checkpoint.accepted for checkpoint in checkpoints]
        self._broadcasts.clear()

    def note_best(self) -> None:
        """Remember what a model of the round that has just ended is put together from."""
        self.generations.best = self.generations.accepted
        self.best_method_memory = self.method_memory

    def begin(self) -> None:
        """Let the method set its start, once, before anything is sent or measured."""
        if self.config.method.starts and not self._begun:
            self.state = self.config.method.start(EngineModel(self.engine)) | self.state
        self._begun = True

    def update(self, after: State) -> None:
        """Take over new values, full."""
        self.state.update(after)
        self._broadcasts.clear()

    def accept(
        self,
        number: int,
        after: State,
        memory: Memory,
        method_memory: Memory,
        kept: Sequence[int],
    ) -> None:
        """Take over an aggregated round.

        Args:
            number: the round's number.
            after: new values, full.
            memory: the strategy's memory after the round.
            method_memory: the method's memory after the round.
            kept: clients that keep their state of this round.
        """
        self.update(after)
        self.memory, self.method_memory = memory, method_memory
        self.generations.accept(number, kept)

    def load(self, arrays: ArrayRecord) -> None:
        """Take over parameters that the caller has set, by name.

        Raises:
            ValueError: a name is no parameter of the method, or a shape differs.
        """
        state = from_named_arrays(arrays)
        for name, value in state.items():
            initial = self.replica.initial.get(name)
            if initial is None or initial.shape != value.shape:
                raise ValueError(f"{name} {tuple(value.shape)} is no parameter of this method")
        self.update(state)

    @property
    def values(self) -> State:
        """Current values of all that can change, full."""
        return self.replica.initial | self.state

    def broadcast(self, round: int) -> Broadcast:
        """Encode what goes down in a round, once."""
        if round not in self._broadcasts:
            values, codec = self.values, self.config.compression.down
            down = {name: values[name] for name in self.roles.down(round)}
            shared = {name: values[name] for name in self.roles.shared(round)}
            extras = prefixed(self.config.strategy.down(self.memory, shared), STRATEGY)
            whole, draws = down | extras, generator(self.config.seed, "compression down", round)
            wire, extras = split_prefixed(codec.encode(whole, whole, draws), STRATEGY)
            received = values | codec.decode(wire, down)
            self._broadcasts = {round: Broadcast(wire, received, extras)}
        return self._broadcasts[round]

    def at(self, round: int, client: int) -> At:
        """Return a client's ``At``, with what the method sends it."""
        at = self.roles.at(round, client)
        return at._replace(memory=self.config.method.down(self.method_memory, at))

    def messages(
        self, kind: str, round: int, nodes: Mapping[int, int], seen: Seen, last: bool = False
    ) -> dict[int, Message]:
        """Return a message for each client; one content for all that train the same blocks.

        Args:
            kind: ``MessageType.TRAIN`` or ``MessageType.EVALUATE``.
            round: round of the messages.
            nodes: node id by client.
            seen: takes the bytes.
            last: the run's last evaluation, although ``round`` does not say so.
        """
        broadcast = self.broadcast(round)
        extras = broadcast.extras if kind == MessageType.TRAIN else {}
        packed: dict[object, Packed] = {}
        contents: dict[tuple[str, ToClient], tuple[RecordDict, int]] = {}
        messages: dict[int, Message] = {}
        prefix = "" if kind == MessageType.TRAIN else "evaluation_"
        for client, node in nodes.items():
            at = self.at(round, client)
            state = self.replica.blocks(broadcast.wire, at)
            key = self._key(state, at)
            if key not in packed:
                whole = state | prefixed(extras, STRATEGY) | prefixed(dict(at.memory), METHOD)
                group = f"{kind}/{round}/{len(packed)}"  # they may train in one pass
                packed[key] = Packed(group, *pack(whole), payload_bytes(whole))
            same = packed[key]
            generation, oldest, best = self.generations.told(client)
            told = ToClient(
                self.overrides, self.run, round, same.index, generation, oldest, best, last
            )
            whose = same.group, told
            if whose not in contents:
                content = told.content(same.arrays)
                contents[whose] = content, wire_bytes(content)
            content, size = contents[whose]
            seen.count(prefix + "downlink_bytes", size, client)
            seen.count(prefix + "downlink_payload_bytes", same.payload, client)
            messages[client] = Message(content, node, kind, group_id=same.group)
        return messages

    def _key(self, state: State, at: At) -> object:
        """Return a key that is equal for clients that get the same content."""
        return tuple(value.shape for value in state.values()), sha256(dict(at.memory))
