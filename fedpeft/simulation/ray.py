"""A grid whose messages are answered by Ray's worker processes, on one machine or several."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic
from typing import Any

import ray
from flwr.app import Message
from ray.exceptions import RayError, RayTaskError

from fedpeft.simulation.grid import LocalGrid
from fedpeft.simulation.machines import Machine, check_machines, rooms_of, this_machine
from fedpeft.simulation.travel import NodeConfig, brought_back, context_of, sent_along, unpacked
from fedpeft.wire import identify, sentence

WAIT_SECONDS = 1.0  # time that the server lets pass between two questions, see server/nodes.py
START_SECONDS = 60
Answer = Message | Exception
Files = Sequence[bytes | None]  # kept states that travel with the messages of a parcel
log = logging.getLogger(__name__)


class Worker:
    """A worker process; the engine's module keeps model and rows between messages."""

    def __init__(self) -> None:
        identify()

    def machine(self) -> Machine:
        """Return the machine on which Ray has started this worker."""
        return this_machine()

    def prepare(self, overrides: str) -> None:
        """Load model and rows; the server reports what is wrong with them."""
        from fedpeft.engine.engine import open_engine  # torch comes with it

        with suppress(Exception):
            engine = open_engine(overrides, None)
            engine.rows.by_client  # noqa: B018  # computed here
            engine.rows.examples("train")

    def answer(
        self, messages: Sequence[Message], configs: Sequence[NodeConfig], files: Files | None
    ) -> tuple[Sequence[Answer], Files]:
        """Answer the messages of a parcel.

        Args:
            messages: messages of one kind, round and configuration.
            configs: the configuration of each message's node.
            files: the clients' kept states; null if the nodes' state-folder is on this machine.

        Returns:
            The answers, and the states that the clients keep now and that are not in the nodes'
            state-folder.
        """
        if files is None:
            return self._answer(messages, configs), [None] * len(messages)
        with unpacked(messages, configs, files) as (here, kept):
            return self._answer(messages, here), kept()

    def _answer(self, messages: Sequence[Message], configs: Sequence[NodeConfig]) -> list[Answer]:
        from fedpeft.client.client import answer_all

        contexts = [context_of(m, c) for m, c in zip(messages, configs, strict=True)]
        return [_portable(answer) for answer in answer_all(messages, contexts)]


def _portable(answer: Answer) -> Answer:
    """Return an answer that another process can read, whatever class an error has."""
    return ValueError(sentence(answer)) if isinstance(answer, Exception) else answer


class RayGrid(LocalGrid):
    """Hands parcels to Ray's workers; whichever is free takes the next one.

    A worker gets its next parcel before it has answered the last one, unless few are left, but none
    before it runs, because Ray may wait for cores that others use. If a worker dies, another takes
    its place where a machine has room, and errors answer the parcel that it was working on. One
    that cannot start is given up.

    Args:
        num_clients: number of clients, one node each.
        num_cpus: cores of a worker.
        num_gpus: share of a GPU of a worker.
        total_cpus: cores that all workers may take; null for all.

    Raises:
        ValueError: Ray's machines have no room for one worker, or one of them has other code.
    """

    def __init__(
        self, num_clients: int, num_cpus: float, num_gpus: float, total_cpus: int | None = None
    ) -> None:
        super().__init__(num_clients)
        self._home = this_machine()
        count = min(num_clients, _room(num_cpus, num_gpus, total_cpus))
        check_machines(self._home, num_cpus, num_gpus)
        self._size = num_cpus, num_gpus
        self._kind: Any = ray.remote(Worker).options(num_cpus=num_cpus, num_gpus=num_gpus)
        self._starting: dict[Any, tuple[Any, float]] = {}  # worker and time, by Ray's future
        self._workers: list[Any] = [self._start() for _ in range(count)]
        self._machines: dict[Any, Machine] = {}  # machines of the workers that run
        self._lost = ""  # the reason for which the last worker was given up
        # Worker and parcel, by Ray's future of the answers.
        self._running: dict[Any, tuple[Any, list[Message]]] = {}

    def __enter__(self) -> "RayGrid":
        return self

    def __exit__(self, *_: object) -> None:
        # Ray may lose track of a worker killed as it starts, which lives on and keeps its cores.
        deadline = max((t for _, t in self._starting.values()), default=0) + START_SECONDS
        starting = list(self._starting)
        while starting and monotonic() < deadline and len(self._machines) < _rooms(*self._size):
            starting = ray.wait(starting, num_returns=len(starting), timeout=1)[1]
        for worker in self._workers:
            ray.kill(worker)

    def workers(self) -> list[Any]:
        """Return Ray's handles of the workers, also of those that are still starting."""
        return list(self._workers)

    def started(self) -> list[Any]:
        """Return Ray's handles of the workers that run."""
        return list(self._machines)

    def prepare(self, overrides: str) -> None:
        for worker in self._workers:
            worker.prepare.remote(overrides)

    def _start(self) -> Any:
        worker = self._kind.remote()
        self._starting[worker.machine.remote()] = worker, monotonic()
        return worker

    def _hand_out(self) -> None:
        while self._queue and not self._workers:
            self._refuse(self._queue.popleft(), ValueError(f"Ray has no worker left: {self._lost}"))
        while self._queue and self._machines:
            busy = [worker for worker, _ in self._running.values()]
            worker = min(self._machines, key=busy.count)
            if busy.count(worker) >= (2 if len(self._queue) > len(self._workers) else 1):
                return
            self._give(worker, self._queue.popleft())

    def _give(self, worker: Any, group: list[Message]) -> None:
        """Send a parcel to a worker, with the clients' kept states if it is on another machine."""
        configs, files = [self._config(message) for message in group], None
        try:
            if not self._is_here(worker):
                files = [sent_along(m, c) for m, c in zip(group, configs, strict=True)]
        except (OSError, ValueError, LookupError) as error:
            self._refuse(group, error)
            return
        self._running[worker.answer.remote(group, configs, files)] = worker, group

    def _config(self, message: Message) -> NodeConfig:
        return self.node_config(message.metadata.dst_node_id)

    def _is_here(self, worker: Any) -> bool:
        return self._machines[worker].node == self._home.node

    def _work(self) -> None:
        futures = [*self._running, *self._starting]
        if not futures:
            return
        ray.wait(futures, timeout=WAIT_SECONDS)
        for future in ray.wait(futures, num_returns=len(futures), timeout=0)[0]:
            if future in self._starting:
                self._started(future)
            elif future in self._running:  # else its worker was found dead
                self._ended(future)
        self._hand_out()

    def _started(self, future: Any) -> None:
        """Let a worker take parcels, unless it could not start or runs other code."""
        worker, _ = self._starting.pop(future)
        try:
            machine: Machine = ray.get(future)
            reason = None if machine.node == self._home.node else self._home.differs(machine)
        except RayError as error:
            self._give_up(worker, sentence(error))
            return
        if reason is None:
            self._machines[worker] = machine
        else:
            self._give_up(worker, reason)

    def _give_up(self, worker: Any, reason: str) -> None:
        log.warning("a worker cannot start, and others do its work: %s", reason)
        self._lost = reason
        self._workers.remove(worker)
        ray.kill(worker)

    def _ended(self, future: Any) -> None:
        """Take the answers of a parcel."""
        try:
            self._done(future, *ray.get(future))
        except RayTaskError as error:
            self._failed(future, ValueError(str(error.cause or error)))
        except RayError as error:
            self._replace(self._running[future][0], error)

    def _done(self, future: Any, answers: Sequence[Answer], files: Files) -> None:
        worker, group = self._running.pop(future)
        for message, answer, file in zip(group, answers, files, strict=True):
            try:
                brought_back(message, self._config(message), file)
            except OSError as error:
                self._reply(message, error)
                continue
            if isinstance(answer, Exception) and not self._is_here(worker):
                address = self._machines[worker].address
                answer = ValueError(f"on the machine {address}: {sentence(answer)}")
            self._reply(message, answer)

    def _failed(self, future: Any, error: Exception) -> None:
        count = len(self._running[future][1])
        self._done(future, [error] * count, [None] * count)

    def _refuse(self, group: Sequence[Message], error: Exception) -> None:
        for message in group:
            self._reply(message, error)

    def _replace(self, dead: Any, error: RayError) -> None:
        """Fail the parcel that a dead worker was working on; queue those behind it again."""
        first, *waiting = [f for f, (worker, _) in self._running.items() if worker is dead]
        reason = f"the worker that was at it died, perhaps for want of memory: {error}"
        self._failed(first, ValueError(reason))
        self._queue.extendleft(reversed([self._running.pop(future)[1] for future in waiting]))
        del self._machines[dead]
        ray.kill(dead)  # it may only be out of reach, and would keep its cores
        self._workers.remove(dead)
        self._lost = reason
        if len(self._workers) < _rooms(*self._size):  # else its machine is lost, too
            self._workers.append(self._start())


def _room(num_cpus: float, num_gpus: float, total_cpus: int | None) -> int:
    """Return how many workers Ray's machines can hold at once, within ``total_cpus`` cores."""
    room = _rooms(num_cpus, num_gpus)
    if room == 0:
        raise ValueError(
            f"Ray has no machine with runtime.num_cpus={num_cpus:g} cores and "
            f"runtime.num_gpus={num_gpus:g} GPUs"
        )
    return room if total_cpus is None else min(room, int(total_cpus / num_cpus))


def _rooms(num_cpus: float, num_gpus: float) -> int:
    return sum(rooms_of(node, num_cpus, num_gpus) for node in ray.nodes())
