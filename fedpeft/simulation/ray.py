"""A Flower grid whose nodes are processes of Ray."""

from collections.abc import Iterable
from typing import Any

import ray
from flwr.app import Error, Message
from ray.exceptions import RayError, RayTaskError

from fedpeft.simulation.launch import SIMULATED, LocalGrid, answer, context_of, identify, in_time

WAIT_SECONDS = 0.2
START_SECONDS = 60


class Worker:
    """What a worker process holds; the app's modules keep model and rows between messages."""

    def __init__(self) -> None:
        identify()

    def answer(self, message: Message) -> Message:
        """A node's reply."""
        from fedpeft.client.app import app

        return answer(app, message, context_of(message.metadata.dst_node_id, {SIMULATED: True}))


class RayGrid(LocalGrid):
    """As many nodes as there are workers, of which whichever is free takes the next message.

    A worker gets its next message before it has answered the last one, unless few are left. Where
    one dies another takes its place, and the message that it was at is answered by an error.

    Args:
        most: workers; fewer where Ray's machines have no room for so many.
        num_cpus: cores of each.
        num_gpus: share of a GPU of each.

    Raises:
        ValueError: there is room for none.
    """

    def __init__(self, most: int, num_cpus: float, num_gpus: float) -> None:
        count = min(most, _room(num_cpus, num_gpus))
        super().__init__(count)
        self._kind: Any = ray.remote(Worker).options(num_cpus=num_cpus, num_gpus=num_gpus)
        self._started: list[Any] = []  # Ray's futures
        self._workers: list[Any] = [self._start() for _ in range(count)]
        self._running: dict[Any, tuple[Any, Message]] = {}  # by Ray's future: worker, message
        self._replies: dict[str, Message] = {}

    def __enter__(self) -> "RayGrid":
        return self

    def __exit__(self, *_: object) -> None:
        # Ray may lose track of one killed as it starts, which lives on and keeps its cores.
        ray.wait(self._started, num_returns=len(self._started), timeout=START_SECONDS)
        for worker in self._workers:
            ray.kill(worker)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queues messages, in the order in which workers are to take them."""
        self._replies = in_time(self._replies)
        ids = super().push_messages(messages)
        self._hand_out()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies that have come; none after a short wait."""
        wanted = set(message_ids)
        if not wanted & self._replies.keys():
            self._collect()
        return [self._replies.pop(i) for i in wanted & self._replies.keys()]

    def _start(self) -> Any:
        worker = self._kind.remote()
        self._started.append(worker.__ray_ready__.remote())
        return worker

    def _hand_out(self) -> None:
        while self._queue:
            busy = [worker for worker, _ in self._running.values()]
            worker = min(self._workers, key=busy.count)
            if busy.count(worker) >= (2 if len(self._queue) > len(self._workers) else 1):
                return
            message = self._queue.pop(next(iter(self._queue)))
            self._running[worker.answer.remote(message)] = (worker, message)

    def _collect(self) -> None:
        futures = list(self._running)
        if not futures:
            return
        ray.wait(futures, timeout=WAIT_SECONDS)
        for future in ray.wait(futures, num_returns=len(futures), timeout=0)[0]:
            if future not in self._running:  # of a worker that was found dead
                continue
            try:
                self._done(future, ray.get(future))
            except RayTaskError as error:
                self._failed(future, str(error))
            except RayError as error:
                self._replace(self._running[future][0], error)
        self._hand_out()

    def _done(self, future: Any, reply: Message) -> None:
        _, message = self._running.pop(future)
        self._replies[message.metadata.message_id] = reply

    def _failed(self, future: Any, reason: str) -> None:
        self._done(future, Message(Error(code=0, reason=reason), reply_to=self._running[future][1]))

    def _replace(self, dead: Any, error: RayError) -> None:
        """The message that a dead worker was at fails; what waited behind it goes to another."""
        first, *others = [f for f, (worker, _) in self._running.items() if worker is dead]
        self._failed(first, f"the worker that was at it died, perhaps for want of memory: {error}")
        again = [self._running.pop(future)[1] for future in others]
        self._queue = {m.metadata.message_id: m for m in again} | self._queue
        ray.kill(dead)  # it may only be out of reach, and would keep its cores
        self._workers[self._workers.index(dead)] = self._start()


def _room(num_cpus: float, num_gpus: float) -> int:
    """How many workers Ray's machines can hold at once."""
    room = 0
    for node in ray.nodes():
        free = node["Resources"] if node["Alive"] else {}
        by_gpus = [free.get("GPU", 0) / num_gpus] if num_gpus else []
        room += int(min(free.get("CPU", 0) / num_cpus, *by_gpus, float("inf")))
    if room == 0:
        raise ValueError(
            f"Ray has no machine with runtime.num_cpus={num_cpus:g} cores and "
            f"runtime.num_gpus={num_gpus:g} GPUs"
        )
    return room
